"""What a user sees: every message once, hints that can be followed, a next line to copy."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import normswap
from normswap.cli import completion
from normswap.cli.app import app
from normswap.cli.boundary import describe
from normswap.cli.console import hush, progress, quiet_libraries, say
from normswap.cli.options import ModelChoice
from normswap.errors import RETURNED, NormSwapError, PlanError, SpecError, in_short
from normswap.progress import Progress

NET = (
    "from torch import nn\n"
    "def make(num_classes=3):\n"
    "    return nn.Sequential(nn.Conv2d(3, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(),\n"
    "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
    "                         nn.Linear(64, num_classes))\n"
)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def net(tmp_path, monkeypatch):
    (tmp_path / "screen_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return "python:screen_net:make"


def images(folder, count=8):
    import torch
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (16, 16, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


@pytest.mark.parametrize("name", ["model.pth", "some/where.safetensors", "last.CKPT"])
def test_weights_in_the_place_of_a_model_get_their_option(name):
    with pytest.raises(SpecError, match=rf"a file of weights.*timm/NAME --checkpoint {name}"):
        normswap.load_model(name)


def test_an_onnx_file_in_the_place_of_a_model_is_told_where_it_goes():
    done = run("convert", "model.onnx", "--to", "gn", "-o", "x")
    assert done.exit_code == 1
    assert "got an ONNX file" in done.stderr
    assert "`normswap verify`" in done.stderr


def test_the_nearest_numbers_of_groups_are_offered(net):
    done = run("convert", net, "--no-pretrained", "--to", "gn(groups=7)", "--dry-run")
    assert "got groups=7 for 64 channels; need a divisor of 64. Try groups=4 or 8." in done.stderr


def test_calibration_is_reported_once(net, tmp_path):
    folder = images(tmp_path / "photos")
    done = run(
        "convert", net, "--no-pretrained", "--image-size", 16, "--to", "gn", "--calibrate", folder,
        "--calibrate-seconds", 0.5, "-o", "c",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert (done.stdout + done.stderr).count("calibrated on 8 images") == 1
    last = done.stdout.splitlines()[-1]
    assert last == f"next: normswap finetune c --trust {net} --data DATA --batch-size 2 -o c-tuned"


def test_a_whole_round_ends_every_screen_with_a_next_line(net, tmp_path, monkeypatch):
    folder = images(tmp_path / "data")
    assert run("convert", net, "--no-pretrained", "--to", "gn", "-o", "c").exit_code == 0
    tune = ("finetune", "c", "--trust", net, "--data", folder, "--val-split", 0.5, "--image-size")
    tune = (*tune, 16, "--batch-size", 2, "--epochs", 1, "-o", "t")
    done = run(*tune)
    assert done.exit_code == 0, done.stderr
    assert "1 epochs" not in done.stdout + done.stderr
    assert "training on 4 images, 1 epoch: 2 updates" in done.stderr
    assert (
        done.stdout.splitlines()[-1] == f"next: normswap evaluate t --trust {net} --data {folder}"
    )
    again = run(*tune[:-4], "--epochs", 5, "--resume", "-o", "t")
    assert again.exit_code == 1
    assert "`normswap finetune t -o ANOTHER`" in again.stderr
    assert "next:" not in run("evaluate", "t", "--trust", net, "--data", folder).stdout
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    done = run("evaluate", "t", "--trust", net, "--data", folder)
    assert done.stdout.splitlines()[-1] == f"next: normswap export t --trust {net} -o t.onnx"
    done = run("predict", "t", "--trust", net, folder)
    assert done.stdout.splitlines()[-1].startswith("next: normswap evaluate t --trust")


def test_one_process_of_several_speaks(capsys):
    with quiet_libraries(debug=False):
        logger = logging.getLogger("normswap")
        logger.info("first")
        logger.info("returned", extra=RETURNED)
        hush()
        logger.info("second")
        logger.warning("third")
        logger.error("fourth")
        say("fifth")
        with progress("sixth") as show:
            show(Progress(1, 2))
    logger = logging.getLogger("normswap")
    with quiet_libraries(debug=False):
        logger.info("seventh")
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == "first\nfourth\nseventh\n"


def test_an_error_inside_an_error_says_its_need_and_its_hint_once():
    inner = PlanError("1", got="groups=7 for 64 channels", need="a divisor", hint="groups=8")
    outer = NormSwapError("the plan", got=in_short(inner), need="another", hint="gn")
    assert str(outer) == "the plan: got 1: groups=7 for 64 channels; need another. Try gn."
    code, text = describe(click.BadParameter(str(inner)))
    assert (code, text.count("Try ")) == (2, 1)


def test_targets_and_models_are_offered_behind_the_cursor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "normswap.json").write_text("{}")

    def offered(complete, text):
        return [item.value for item in complete(None, None, text)]

    assert offered(completion.complete_target, "bn,f") == ["bn,frn", "bn,frozen"]
    assert offered(completion.complete_target, "evo") == ["evonorm"]
    assert offered(completion.complete_model, "t") == ["timm/", "torchvision/", "tuned"]
    assert offered(completion.complete_model, "m") == ["mine/"]
    names = offered(completion.complete_model, "torchvision/resnet5")
    assert names == ["torchvision/resnet50"]
    monkeypatch.setattr("normswap.sources.list_models", None)  # the second time it is not asked
    assert offered(completion.complete_model, "torchvision/resnet5") == names


def test_a_shell_gets_its_completions(tmp_path):
    words = {"COMP_WORDS": "normswap convert timm/x --to g", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "normswap"],
        env=os.environ | words | {"_NORMSWAP_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,gn", "plain,gn-ws", "plain,gbn"]


def test_names_for_files_in_lines_to_copy():
    def short(spec):
        return ModelChoice(spec, None, True, None, None, 0, None).short_name

    assert short("timm/resnet18.a1_in1k") == "resnet18-a1_in1k"
    assert short("torchvision/resnet50:IMAGENET1K_V2") == "IMAGENET1K_V2"
    assert short("python:mine.models:net") == "net"
    assert short("out/tuned/") == "tuned"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_knows_few_signs(encoding, tmp_path):
    """Tables, arrows and class names: a substitute on the screen, nothing lost in JSON."""
    code = (
        "import sys, click\n"
        "from normswap.cli.app import app\n"
        "from normswap.cli.options import cli_command\n"
        "from normswap.cli.console import print_json, print_table, say\n"
        "from normswap.cli import app as home\n"
        "@cli_command('signs')\n"
        "def signs():\n"
        "    print_table(('name', 'map'), [('naïve', '3×3 → 1×1')])\n"
        "    say('γ and β → done')\n"
        "    print_json({'class': '犬'})\n"
        "    raise ValueError('… é')\n"
        "home.COMMANDS = (*home.COMMANDS, 'signs')\n"
        "type(app).get_command = lambda *_: signs\n"
        "app(['signs'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    text = done.stdout.decode(encoding)
    assert done.returncode == 1
    assert "? and ? ? done" in text
    assert '"class": "\\u72ac"' in text
    assert b"Traceback" not in done.stderr
    assert b"ValueError" in done.stderr
