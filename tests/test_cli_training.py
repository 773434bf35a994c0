"""`normswap finetune` and `normswap sweep` on a few random pictures."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import normswap
from normswap.cli.app import app
from normswap.tour import digits_net

SPEC = "python:normswap.tour:digits_net"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def pictures(folder, classes):
    """Six random pictures per class, to be split."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 255, (16, 16), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("digits"), "0123456789")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_file(digits_net().state_dict(), folder / "bn.safetensors")
    checkpoint = ("--checkpoint", folder / "bn.safetensors")
    run("convert", SPEC, *checkpoint, "--to", "gn", "-o", folder / "gn")
    return folder / "gn"


FAST = ("--val-split", "0.5", "--epochs", "1", "--batch-size", "10")


def test_finetune_writes_an_artefact_and_resumes(model, digits, tmp_path):
    arguments = ("finetune", model, "--data", digits, *FAST, "-o", tmp_path / "tuned")
    first = run(*arguments, "--json")
    history = json.loads(first.stdout)
    assert history["steps"] == 3
    assert "teacher: the BatchNorm original" in first.stderr
    tuned = normswap.load(tmp_path / "tuned")
    assert isinstance(tuned.bn1, torch.nn.GroupNorm)
    assert not torch.equal(tuned.fc.weight, normswap.load(model).fc.weight)
    record = json.loads((tmp_path / "tuned" / "normswap.json").read_text())
    assert record["class_names"] == list("0123456789")
    assert record["history"][-1]["step"] == "fine-tuned"

    assert "--resume" in run(*arguments, code=1).stderr
    again = json.loads(run(*arguments, "--resume", "--json").stdout)
    assert again["resumed_from"] == 3


def test_finetune_gives_other_classes_a_head_and_no_teacher(model, tmp_path):
    pets = pictures(tmp_path / "pets", ["cat", "dog", "eel"])
    result = run("finetune", model, "--data", pets, *FAST, "-o", tmp_path / "tuned")
    assert "new head for 3 classes: fc" in result.stderr
    assert "teacher" not in result.stderr
    assert normswap.load(tmp_path / "tuned").fc.out_features == 3
    assert "epoch" in result.stdout


def test_finetune_interrupted_is_130_and_can_go_on(model, digits, tmp_path, monkeypatch):
    import os
    import signal

    from normswap.cli import finetune

    def interrupt(now):
        if now.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return ""

    arguments = ("finetune", model, "--data", digits, *FAST, "-o", tmp_path / "tuned")
    monkeypatch.setattr(finetune, "_facts", interrupt)
    result = run(*arguments, code=130)
    assert "Traceback" not in result.stderr
    monkeypatch.undo()
    resumed = json.loads(run(*arguments, "--resume", "--json").stdout)
    assert 0 < resumed["resumed_from"] < resumed["steps"]


def test_sweep_prints_table_and_picture_and_skips_what_is_done(digits, tmp_path):
    arguments = (
        "sweep", SPEC, "--no-pretrained", "--data", digits, "--val-split", "0.5", "--epochs", "1",
        "--to", "bn,gn", "--batch-sizes", "10,15", "--seeds", "1", "-o", tmp_path / "sweep",
    )  # fmt: skip
    printed = run(*arguments)
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000
    assert "cell 1 of 4" in printed.stderr
    again = run(*arguments, "--json")
    assert "cell" not in again.stderr
    assert len(json.loads(again.stdout)["cells"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "bn,gnn"), "'gnn'; need some of gn"),
        (("--batch-sizes", "1,two"), "'1,two'; need numbers"),
    ],
)
def test_sweep_usage(options, message, digits):
    result = run("sweep", SPEC, "--data", digits, "-o", "nowhere", *options, code=2)
    assert message in result.stderr
