"""Models of one's own on the command line: nothing is invisible, nothing silently undone."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from normswap.cli.app import app

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn


class NormedConv(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(super().forward(x))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("m", torch.zeros(8))
        self.register_buffer("s2", torch.ones(8))

    def forward(self, x):
        return F.batch_norm(x, self.m, self.s2, self.g, self.b, eps=0.01)


def sized(model, size=16):
    model.input_size = (3, size, size)
    return model


def normed():
    return sized(nn.Sequential(NormedConv(3, 8, 3), nn.ReLU()))


def odd():
    return sized(nn.Sequential(nn.Conv2d(3, 8, 3), Odd(), nn.ReLU()))


def tokens():
    tail = (nn.Flatten(), nn.Linear(8 * 14 * 14, 8), nn.BatchNorm1d(8))
    return sized(nn.Sequential(nn.Conv2d(3, 8, 3), *tail))


def untracked():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    return sized(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()))
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    """A module of its own for every test: Python imports each name once."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return f"python:{name}"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_norm_inside_a_convolution_is_converted(name, tmp_path):
    run("convert", f"{name}:normed", "--to", "gn", "-o", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "normswap.json").read_text())
    assert "0.norm" in json.dumps(record)


@pytest.mark.parametrize(
    ("factory", "options", "reason"),
    [
        ("normed", ["--to", "bn"], "BatchNorm already"),
        ("normed", ["--to", "gn", "--exclude", "*"], "excluded"),
        ("tokens", ["--to", "gn", "--fallback", "keep"], "one element per channel"),
        ("odd", ["--to", "gn"], "calls batch_norm itself"),
        ("untracked", ["--to", "frozen"], "no running statistics"),
    ],
)
def test_a_conversion_of_nothing_fails_and_writes_nothing(name, tmp_path, factory, options, reason):
    out = tmp_path / "out"
    result = run("convert", f"{name}:{factory}", *options, "-o", out, code=1)
    assert reason in result.stderr
    assert "original's function" not in result.output
    assert not out.exists()


def test_where_nothing_is_known_nothing_is_trusted(name, tmp_path):
    result = run("convert", f"{name}:untracked", "--to", "gn", "-o", tmp_path / "out")
    assert "nothing can be predicted of 1 layer (no" in result.stdout
    json_out = run("convert", f"{name}:untracked", "--to", "gn", "-o", tmp_path / "b", "--json")
    assert json.loads(json_out.stdout)["drift"]["trusted"] is False


def test_inspect_names_what_cannot_be_replaced(name):
    shown = run("inspect", f"{name}:odd").stdout
    assert "note: 1:batch_norm: Odd calls batch_norm itself" in shown
    found = json.loads(run("inspect", f"{name}:odd", "--json").stdout)
    assert [other["name"] for other in found["others"]] == ["1:batch_norm"]


ROLES = "weight=g, bias=b, mean=m, var=s2"


@pytest.mark.parametrize("roles", [ROLES, ROLES + ", eps=0.01"])
def test_a_class_can_be_declared_to_be_a_batchnorm(name, tmp_path, roles):
    module = name.removeprefix("python:")
    declared = ("--batchnorm", f"{module}:Odd({roles})")
    out = tmp_path / "out"
    result = run("convert", f"{name}:odd", "--to", "frozen", *declared, "-o", out)
    assert "original's function" in result.stdout
    inspected = json.loads(run("inspect", f"{name}:odd", *declared, "--json").stdout)
    assert [site["names"] for site in inspected["sites"]] == [["1"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no module and class"),
        ("{}:Nothing", "no Nothing in"),
        ("{}:Odd(weigth=g)", "'weigth=g'.*NAME one of weight, bias"),
        ("{}:odd", "a class that derives from torch.nn.Module"),
        ("{}:Odd(weight=g, bias=b, mean=m, var=v)", "no tensor of shape .C,. as 'v'"),
        ("os:abort", "Python's own library"),
    ],
)
def test_declarations_that_cannot_be_followed_are_told(name, text, message):
    text = text.format(name.removeprefix("python:"))
    result = run("inspect", f"{name}:odd", "--batchnorm", text, code=1)
    assert re.search(message, result.stderr), result.stderr
