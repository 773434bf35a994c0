"""Tables that fit, and lines to copy."""

from __future__ import annotations

import io

import pytest
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


def test_a_shell_pattern_without_a_slash_is_of_the_name():
    assert "timm/resnet50.a1_in1k" in list_models("resnet50.*")
    assert {"timm/resnet50", "torchvision/resnet50"} <= set(list_models("resnet5?"))
