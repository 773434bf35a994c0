"""`normswap finetune` and `normswap sweep` on a few random pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import normswap
from normswap.cli.app import app
from normswap.cli.training import _RECIPE
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


def test_the_loss_is_chosen_by_name(model, digits, tmp_path):
    arguments = ("finetune", model, "--data", digits, *FAST, "-o", tmp_path / "tuned")
    run(*arguments, "--loss", "bce")
    written = normswap.training.read_checkpoint(str(tmp_path / "tuned" / "last.pt"))
    assert written["options"]["loss"] == "bce"
    assert "loss='cross-entropy' (was 'bce')" in run(*arguments, "--resume", code=1).stderr
    refused = run(*arguments, "--loss", "focal", code=2).stderr
    assert "'focal' is not one of 'cross-entropy', 'bce'" in refused


def test_every_option_of_a_run_is_one_of_finetune_with_its_default(digits, tmp_path):
    fields = {field.name: field.default for field in dataclasses.fields(normswap.FineTune)}
    arguments = [SPEC, "--data", str(digits), "-o", str(tmp_path / "out")]
    for name in ("finetune", "sweep"):
        chosen = app.get_command(None, name).make_context(name, list(arguments)).params
        usual = {option: chosen[option] for option in _RECIPE}
        assert usual == {option: fields[option] for option in _RECIPE}


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
    from contextlib import nullcontext

    from normswap.cli import finetune

    def interrupt(now):
        if now.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = ("finetune", model, "--data", digits, *FAST, "-o", tmp_path / "tuned")
    monkeypatch.setattr(finetune, "progress", lambda _title: nullcontext(interrupt))
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


def test_finetune_keeps_the_layers_of_an_frn_network(digits, tmp_path):
    """FRN has parameters that the BatchNorm of a fresh model has not: that is no other head."""
    run("convert", SPEC, "--no-pretrained", "--to", "frn", "-o", tmp_path / "frn")
    out = tmp_path / "tuned"
    result = run("finetune", tmp_path / "frn", "--data", digits, *FAST, "-o", out)
    assert "new head" not in result.stderr
    kinds = [type(m).__name__ for m in normswap.load(out).modules()]
    before = [type(m).__name__ for m in normswap.load(tmp_path / "frn").modules()]
    assert kinds == before
    pictures(tmp_path / "abc", "abc")
    result = run(
        "finetune", tmp_path / "frn", "--data", tmp_path / "abc", *FAST, "-o", out, "--force"
    )
    assert "new head for 3 classes" in result.stderr
    tuned = normswap.load(out)
    assert [type(m).__name__ for m in tuned.modules()] == before
    assert tuned(torch.zeros(1, 1, 16, 16)).shape == (1, 3)


def test_finetune_on_other_classes_of_the_same_number(model, digits, tmp_path):
    first = tmp_path / "digits"
    run("finetune", model, "--data", digits, *FAST, "-o", first)
    letters = pictures(tmp_path / "letters", "abcdefghij")
    result = run("finetune", first, "--data", letters, *FAST, "-o", tmp_path / "letters-net")
    assert "takes other names: a, b" in result.stderr
    evaluated = run("evaluate", tmp_path / "letters-net", "--data", letters, "--json")
    assert json.loads(evaluated.stdout)["images"] == 30  # those that were kept out of training


def test_finetune_force_starts_anew(model, digits, tmp_path):
    arguments = ("finetune", model, "--data", digits, *FAST, "-o", tmp_path / "out")
    run(*arguments)
    assert "--force" in run(*arguments, code=1).stderr
    run(*arguments, "--force", "--resume", code=2)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    lost = [tmp_path / "nowhere" if item == digits else item for item in arguments]
    run(*lost, "--force", code=1)  # a typo costs nothing
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert json.loads(run(*arguments, "--force", "--json").stdout)["steps"] == 3


def test_sweep_wants_the_original(model, digits, tmp_path):
    result = run(
        "sweep", model, "--data", digits, "--val-split", "0.5", "-o", tmp_path / "s", code=1
    )
    assert "BatchNorms have been replaced" in result.stderr
    assert SPEC in result.stderr


def test_sweep_of_nothing_but_failures_fails(digits, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise normswap.errors.TrainingError("a cell", got="x", need="y", hint="z")

    monkeypatch.setattr("normswap.sweeps.finetune", broken)
    result = run(
        "sweep", SPEC, "--no-pretrained", "--data", digits, "--val-split", "0.5", "--to", "gn",
        "--batch-sizes", "10", "--seeds", "1", "-o", tmp_path / "sweep", code=1,
    )  # fmt: skip
    assert "failed" in result.output


def test_bench_of_a_converted_model_is_beside_its_original(model):
    result = run(
        "bench", model, "--to", "gn", "--rounds", "1", "--no-onnx", "--image-size", "16", "--json"
    )
    assert [row["target"] for row in json.loads(result.stdout)["rows"]] == ["bn", "gn"]


def test_the_image_size_is_remembered(tmp_path):
    run(
        "convert", SPEC, "--no-pretrained", "--to", "gn", "--image-size", "24",
        "-o", tmp_path / "gn", "--drift", tmp_path / "deep" / "drift.PNG",
    )  # fmt: skip
    assert normswap.load_model(tmp_path / "gn").preprocessing.input_size == (1, 24, 24)
    assert (tmp_path / "deep" / "drift.PNG").read_bytes().startswith(b"\x89PNG")


def test_dry_run_refuses_what_it_would_not_do(tmp_path):
    result = run("convert", SPEC, "--to", "gn", "--dry-run", "--calibrate", tmp_path, code=2)
    assert "--calibrate goes with -o" in result.stderr
