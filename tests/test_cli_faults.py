"""Every fault ends with its exit code, one line that names the cause and a way out, and nothing
half-written.
"""

import errno
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from normswap.cli.app import app
from normswap.cli.boundary import describe
from normswap.tour import digits_net

MODEL = "python:normswap.tour:digits_net"
PLANS = ["--to", "gn", "--dry-run"]


class RunsCode:
    """A pickle that makes a folder when it is loaded carelessly."""

    def __reduce__(self):
        return (os.mkdir, ("code-ran",))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Good and bad inputs, made once; tests get a copy of nothing and must not write here."""
    folder = tmp_path_factory.mktemp("faults")
    torch.manual_seed(0)
    state = digits_net().state_dict()
    save_file(state, folder / "good.safetensors")
    torch.save(state, folder / "good.pth")
    for name in ("good.safetensors", "good.pth"):
        content = (folder / name).read_bytes()
        (folder / name.replace("good", "truncated")).write_bytes(content[: len(content) // 2])
    (folder / "text.pth").write_text("no weights at all")
    save_file({k: v for k, v in state.items() if k != "fc.bias"}, folder / "missing.safetensors")
    save_file({**state, "conv1.more": torch.zeros(1)}, folder / "extra.safetensors")
    save_file({**state, "conv1.weight": torch.zeros(8, 1, 3, 3)}, folder / "shapes.safetensors")
    with (folder / "code.pth").open("wb") as file:
        pickle.dump({"state_dict": RunsCode()}, file)
    torch.save({"state_dict": state, "callback": RunsCode()}, folder / "code-zip.pth")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("three years")
    (folder / "a-file").write_text("")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "broken" / "a.png")
    (folder / "broken" / "b.png").write_bytes((folder / "broken" / "a.png").read_bytes()[:40])
    (folder / "plan.json").write_text('{"entries": 3}')
    (folder / "junk.onnx").write_bytes(b"\x08\x07not an onnx file")
    return folder


@pytest.fixture(scope="module")
def artefact(material):
    """A converted network on disk."""
    arguments = ["convert", MODEL, "--no-pretrained", "--to", "gn", "-o", str(material / "gn")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return material / "gn"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, which must hold no more than the test says afterwards."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result, code, message):
    """The exit code, a single line on stderr that holds the message, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()  # click ends the line of a ^C
    assert len(lines) == 1, result.stderr
    assert re.search(message, lines[0]), lines[0]
    assert "Try " in lines[0] or code == 130, lines[0]
    assert "Traceback" not in result.stderr


FAULTS = {
    # name: (arguments, exit code, message)
    "unknown timm model": (
        ["inspect", "timm/resnet5O"],
        1,
        r"timm/resnet5O.*Try .*timm/resnet50",
    ),
    "unknown torchvision model": (
        ["inspect", "torchvision/mobilnet_v2"],
        1,
        r"Try .*torchvision/mobilenet_v2",
    ),
    "unknown torchvision weights": (
        ["inspect", "torchvision/resnet18:IMAGENET"],
        1,
        r"weights IMAGENET.*IMAGENET1K_V1",
    ),
    "unknown kind of model": (["inspect", "resnet50"], 1, r"resnet50.*timm/resnet50"),
    "unknown module": (["inspect", "python:no_such:net"], 1, r"No module named .no_such"),
    "unknown factory": (["inspect", f"{MODEL}s"], 1, r"no digits_nets.*digits_net"),
    "unknown target": (
        ["convert", MODEL, "--to", "gnn", "--dry-run"],
        2,
        r"'gnn'.*Did you mean gn",
    ),
    "no target": (["convert", MODEL, "--dry-run"], 2, r"--to TARGET or --plan FILE"),
    "no output": (["convert", MODEL, "--to", "gn"], 2, r"'-o'"),
    "groups of a target without": (
        ["convert", MODEL, "--to", "brn", "--groups", "4", "--dry-run"],
        2,
        r"--groups goes with --to gn, not with --to brn",
    ),
    "groups that are no number": (
        ["convert", MODEL, "--to", "gn", "--groups", "many", "--dry-run"],
        2,
        r"'many'; need a positive number or auto",
    ),
    "a gradient through a history that no target but cbn has": (
        ["convert", MODEL, "--to", "naive-cbn", "--through-history", "--dry-run"],
        2,
        r"--through-history goes with --to cbn, not with --to naive-cbn",
    ),
    "an option beside a plan that has settled it": (
        ["convert", MODEL, "--plan", "plan.json", "--window", "4", "--dry-run"],
        2,
        r"--window goes with --to TARGET; a plan has settled it",
    ),
    "time for a calibration without images": (
        ["convert", MODEL, "--to", "gn", "--calibrate-seconds", "5", "-o", "out"],
        2,
        r"--calibrate-seconds goes with --calibrate IMAGES",
    ),
    "a drift report of what was not converted": (
        ["convert", MODEL, "--to", "gn", "--drift", "drift.png", "--dry-run"],
        2,
        r"--drift goes with -o, not with --dry-run",
    ),
    "groups that do not divide": (
        ["convert", MODEL, "--to", "gn", "--groups", "5", "--dry-run"],
        1,
        r"bn1: got groups=5 for 16 channels; need a divisor of 16",
    ),
    "pattern without a match": (
        ["convert", MODEL, *PLANS, "--include", "layer9.*"],
        1,
        r"layer9\.\*",
    ),
    "unknown command": (["konvert", MODEL], 2, r"'konvert'; did you mean convert\?"),
    "unknown option": (["convert", MODEL, "--onto", "gn"], 2, r"--onto"),
    "unknown device": (["inspect", MODEL, "--device", "abacus"], 1, r"'abacus'.*--device cpu"),
    "no batchnorm": (
        ["convert", "python:torch.nn:Flatten", *PLANS],
        1,
        r"no BatchNorm layer; need at least one",
    ),
    "no checkpoint": (
        ["inspect", MODEL, "--checkpoint", "gone.pth"],
        1,
        r"gone\.pth.*no such file",
    ),
    "not a checkpoint": (
        ["inspect", MODEL, "--checkpoint", "{material}/text.pth"],
        1,
        r"text\.pth: got an unreadable file",
    ),
    "truncated safetensors": (
        ["inspect", MODEL, "--checkpoint", "{material}/truncated.safetensors"],
        1,
        r"truncated\.safetensors: got an unreadable file",
    ),
    "truncated pth": (
        ["inspect", MODEL, "--checkpoint", "{material}/truncated.pth"],
        1,
        r"truncated\.pth: got an unreadable file",
    ),
    "missing keys": (
        ["inspect", MODEL, "--checkpoint", "{material}/missing.safetensors"],
        1,
        r"1 missing keys: fc\.bias",
    ),
    "extra keys": (
        ["inspect", MODEL, "--checkpoint", "{material}/extra.safetensors"],
        1,
        r"1 extra keys: conv1\.more",
    ),
    "wrong shapes": (
        ["inspect", MODEL, "--checkpoint", "{material}/shapes.safetensors"],
        1,
        r"conv1\.weight \(8, 1, 3, 3\) for \(16, 1, 3, 3\)",
    ),
    "pickle with code": (
        ["inspect", MODEL, "--checkpoint", "{material}/code.pth"],
        1,
        r"code\.pth: got",
    ),
    "zip pickle with code": (
        ["inspect", MODEL, "--checkpoint", "{material}/code-zip.pth"],
        1,
        r"more than tensors: .*mkdir.*nothing of it was run",
    ),
    "output not empty": (
        ["convert", MODEL, "--to", "gn", "-o", "{material}/full"],
        1,
        r"full: got a directory that is not empty.*--force",
    ),
    "output is a file": (
        ["convert", MODEL, "--to", "gn", "-o", "{material}/a-file"],
        1,
        r"a-file: got a file",
    ),
    "output below a file": (
        ["convert", MODEL, "--to", "gn", "-o", "{material}/a-file/gn"],
        1,
        r"a-file: got a file; need a directory",
    ),
    "demo over a full folder": (["demo", "-o", "{material}/full"], 1, r"full: .*--force"),
    "export onto a folder": (
        ["export", MODEL, "-o", "{material}/full"],
        1,
        r"full: got a directory; need the name of a file",
    ),
    "export onto a file": (
        ["export", MODEL, "-o", "{material}/junk.onnx"],
        1,
        r"junk\.onnx: got a file that exists.*--force",
    ),
    "no plan": (
        ["convert", MODEL, "--plan", "{material}/plan.json", "--dry-run"],
        1,
        r"plan: got",
    ),
    "plan that is no json": (
        ["convert", MODEL, "--plan", "{material}/text.pth", "--dry-run"],
        1,
        r"need a plan in JSON",
    ),
    "no onnx file": (["verify", "gone.onnx"], 1, r"gone\.onnx: got no such file"),
    "not an onnx file": (["verify", "{material}/junk.onnx"], 1, r"junk\.onnx"),
    "no labelled images": (
        ["evaluate", MODEL, "--no-pretrained", "--data", "{material}/empty"],
        1,
        r"empty: got no class folders",
    ),
    "no images to calibrate on": (
        ["convert", MODEL, "--to", "gn", "-o", "gn", "--calibrate", "{material}/empty"],
        1,
        r"empty: got a folder without images",
    ),
    "broken image to calibrate on": (
        ["convert", MODEL, "--to", "gn", "-o", "gn", "--calibrate", "{material}/broken"],
        1,
        r"b\.png: got a broken image",
    ),
    "no images": (
        ["export", MODEL, "-o", "net.onnx", "--images", "{material}/empty"],
        1,
        r"empty: got a folder without images",
    ),
    "broken image": (
        ["export", MODEL, "-o", "net.onnx", "--images", "{material}/broken"],
        1,
        r"b\.png: got a broken image",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, material, elsewhere):
    arguments, code, message = FAULTS[fault]
    before = sorted(material.rglob("*"))
    result = run(*(argument.format(material=material) for argument in arguments))
    assert_one_line(result, code, message)
    assert list(elsewhere.iterdir()) == []  # no code ran, nothing half-written
    assert sorted(material.rglob("*")) == before


def test_edited_artefact(artefact, tmp_path):
    edited = shutil.copytree(artefact, tmp_path / "edited")
    weights = edited / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_one_line(run("inspect", edited), 1, r"model\.safetensors: got SHA-256")


def test_artefact_of_a_newer_format(artefact, tmp_path):
    newer = shutil.copytree(artefact, tmp_path / "newer")
    record = json.loads((newer / "normswap.json").read_text())
    record["format_version"] += 1
    (newer / "normswap.json").write_text(json.dumps(record))
    assert_one_line(run("inspect", newer), 1, r"format_version 2.*pip install --upgrade normswap")


def test_directory_that_is_no_artefact(material):
    assert_one_line(run("inspect", material / "full"), 1, r"full: got no normswap\.json")


def test_no_permission_is_found_before_the_work(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("normswap.artifact.load_model", lambda *_, **__: pytest.fail("long work"))
    assert_one_line(
        run("convert", MODEL, "--to", "gn", "-o", "gn"), 1, r"no permission to write.*another -o"
    )


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")]
)
def test_disk_full_or_forbidden_while_writing(number, message, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("normswap.artifact.writing.save_file", refuse)
    result = run("convert", MODEL, "--no-pretrained", "--to", "gn", "-o", "gn")
    assert_one_line(result, 1, message)
    assert list(tmp_path.iterdir()) == []


def test_interrupted(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("normswap.artifact.load_model", interrupt)
    assert_one_line(run("inspect", MODEL), 130, r"interrupted")


def test_unexpected_errors_ask_for_debug_and_debug_shows_the_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("seven\nby zero")

    monkeypatch.setattr("normswap.artifact.load_model", fail)
    result = run("inspect", MODEL)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "ZeroDivisionError: seven by zero. Unexpected: run again with --debug."
    ]
    for arguments in (["--debug", "inspect", MODEL], ["inspect", MODEL, "--debug"]):
        assert "Traceback" in run(*arguments).stderr


def test_out_of_memory_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee …")

    monkeypatch.setattr("normswap.artifact.load_model", fail)
    assert_one_line(run("inspect", MODEL), 1, r"smaller --batch-size")


def test_a_package_that_is_not_installed_is_named_with_the_way_to_get_it():
    code, line = describe(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert code == 1
    assert line.startswith("torch: got no such package")
    assert "pip install normswap" in line
