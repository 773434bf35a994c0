"""Tables that fit, and lines to copy."""

from __future__ import annotations

import io
import logging
import shlex

import pytest
import timm
import torch
from click.testing import CliRunner
from rich.console import Console

from normswap.cli import console
from normswap.cli.app import app
from normswap.sources import list_models

COLUMNS = ("name", "kind", "size", "remarks", "empty")
NAME = "features.denseblock4.denselayer32.norm2"
ROWS = [(NAME, "BatchNormAct2d", 1024, "stands behind features.denseblock4.denselayer32.relu2", "")]


def printed(width, monkeypatch, **options):
    text = io.StringIO()
    monkeypatch.setattr(console, "stdout", lambda: Console(file=text, width=width))
    console.print_table(COLUMNS, ROWS, numeric=("size",), **options)
    return text.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_no_name_is_broken_at_any_width(width, monkeypatch):
    text = printed(width, monkeypatch, droppable=("kind", "remarks", "empty"))
    assert NAME in text
    assert "1024" in text
    assert "remarks" in text
    assert ("features.denseblock4.denselayer32.relu2" in text) or "left out" in text


def test_columns_go_by_importance_and_are_named(monkeypatch):
    droppable = ("kind", "remarks", "empty")
    assert "left out" not in printed(200, monkeypatch, droppable=droppable)
    assert "left out for want of width: kind, remarks" in printed(
        60, monkeypatch, droppable=droppable
    )
    assert "BatchNormAct2d" in printed(80, monkeypatch, droppable=("empty", "remarks", "kind"))
    assert "empty" not in printed(200, monkeypatch, droppable=droppable)
    assert "empty" in printed(200, monkeypatch)


def test_inspect_at_80_columns(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console, "stdout", lambda: Console(file=text, width=80))
    arguments = ["inspect", "timm/test_resnet", "--no-pretrained", "--num-classes", "7"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    lines = text.getvalue().splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "…" not in text.getvalue()
    assert sum("layer4.0.downsample.2" in line for line in lines) == 1
    assert sum("layer4.0.downsample.1" in line for line in lines) == 1  # what feeds it
    follow = (
        "normswap convert timm/test_resnet --no-pretrained --num-classes 7 --to gn -o converted"
    )
    assert lines[-1] == f"next: {follow}"


@pytest.mark.parametrize("width", [20, 40, 50, 60, 70, 80, 90, 120, 200])
def test_no_word_of_a_column_that_shrinks_is_lost(width, monkeypatch):
    """At 80 columns rich divided the text for one width and cut it to another."""
    text = io.StringIO()
    monkeypatch.setattr(console, "stdout", lambda: Console(file=text, width=width))
    remark = "4 of 32 channels are dead: variance 0"
    others = "gn, gn-ws → frozen; evonorm → frozen"
    wide = ("name", "with", "cannot take", "remarks made of it", "犬 and 猫")
    row = ("blocks.2.0.bn1", "groups=8, init=match", others, remark, "犬犬犬 猫猫")
    sites = ("name", "C", "map", "producer", "activation", "cannot take")
    site = ("blocks.2.0.bn1", "144", "12×12", "Conv2d blocks.2.0.conv_pw", "relu6 (fused)", others)
    for columns, cells in ((wide, row), (sites, site)):
        text.truncate(0)
        console.print_table(columns, [cells], numeric=("C", "map"))
        shown = [word for word in text.getvalue().replace("\0", "").split() if word[0] != "─"]
        assert sorted(shown) == sorted(word for cell in (*columns, *cells) for word in cell.split())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_of_text_are_broken_between_words_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    text = "recommended: frozen: it keeps features.denseblock4.denselayer32.norm2.and.more, exactly"
    with console.quiet_libraries(debug=False):
        for stream in (Terminal(), io.StringIO()):
            monkeypatch.setattr("sys.stdout", stream)
            monkeypatch.setattr("sys.stderr", stream)
            console.say(text)
            console.say_next("convert", "timm/some_long_name_of_a_model", "--to", "gn", "-o", "out")
            logging.getLogger("normswap").warning("%s", text)
            lines = stream.getvalue().splitlines()
            assert " ".join(" ".join(lines).split()).count(text) == 2
            follow = "next: normswap convert timm/some_long_name_of_a_model --to gn -o out"
            assert follow in lines  # to be copied
            rest = [line for line in lines if line != follow]
            narrow = all(len(line) <= 30 or len(line.split()) == 1 for line in rest)
            assert narrow == stream.isatty()


def dead(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_var[:3] = 0
    torch.save(model.state_dict(), tmp_path / "dead.pth")
    return ["timm/test_resnet", "--checkpoint", str(tmp_path / "dead.pth"), "--num-classes", "7"]


def test_what_is_true_of_every_target_is_said_once(tmp_path):
    done = CliRunner().invoke(app, ["inspect", *dead(tmp_path)])
    assert done.exit_code == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "channels are dead" in line)
    assert line.startswith("all: 45 of 1040 channels are dead (running variance 0) in 15 layers")
    assert sum("7 × no TLU" in line for line in done.stdout.splitlines()) == 1
    assert done.stdout.count("takes the place of 8 ReLUs") == 1
    assert "frn, evonorm: takes the place of 8 ReLUs" in done.stdout


def test_a_dry_run_ends_with_the_command_that_does_it(tmp_path):
    model = ["timm/test_resnet", "--no-pretrained"]
    options = ["--to", "gn(groups=4)", "--exclude", "bn1", "--exclude", "conv1.*", "--init", "copy"]
    done = CliRunner().invoke(app, ["convert", *model, *options, "--dry-run"])
    assert done.exit_code == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("next: normswap convert timm/test_resnet --no-pretrained --to 'gn(")
    words = shlex.split(last)[2:]
    assert {*options, "-o"} <= {*words}
    written = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "out")])
    assert written.exit_code == 0, written.stderr
    json_alone = CliRunner().invoke(app, ["convert", *model, *options, "--dry-run", "--json"])
    assert "next:" not in json_alone.stdout


def test_a_shell_pattern_without_a_slash_is_of_the_name():
    assert "timm/resnet50.a1_in1k" in list_models("resnet50.*")
    assert {"timm/resnet50", "torchvision/resnet50"} <= set(list_models("resnet5?"))
