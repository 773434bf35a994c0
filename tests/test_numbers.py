"""Numbers that no trained network holds are refused at the source; dead channels are noted."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import normswap
from normswap import ImpossibleNumbersError
from normswap.cli.app import app
from normswap.graph.numbers import dead_channels, impossible_numbers
from normswap.tour import digits_net

SPEC = "python:normswap.tour:digits_net"
NAN, INF = float("nan"), float("inf")
X = torch.zeros(1, 1, 16, 16)


def broken(name, value):
    model = digits_net()
    state = model.state_dict()
    state[name].view(-1)[0] = value
    model.load_state_dict(state)
    return model


BAD = [
    ("bn1.running_var", -0.5, "a negative variance"),
    ("bn1.running_var", NAN, "numbers that are not finite"),
    ("layer1.0.bn2.running_mean", INF, "numbers that are not finite"),
    ("layer2.0.bn1.weight", NAN, "numbers that are not finite"),
    ("layer3.1.conv1.weight", -INF, "numbers that are not finite"),
    ("fc.bias", NAN, "numbers that are not finite"),
]


@pytest.mark.parametrize(("name", "value", "what"), BAD)
def test_a_conversion_refuses_them_by_name(name, value, what):
    model = broken(name, value)
    before = copy.deepcopy(model.state_dict())
    for target in ("gn", "cbn"):
        with pytest.raises(ImpossibleNumbersError, match=f"^{name}: got {what}; need finite"):
            normswap.convert(model, target, example_inputs=X)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip_values(before, model))
    assert isinstance(model.bn1, nn.BatchNorm2d)
    made = normswap.convert(model, "gn", example_inputs=X, allow_nonfinite=True)
    assert isinstance(made.model.bn1, nn.GroupNorm)


def zip_values(state, model):
    return zip(state.values(), model.state_dict().values(), strict=True)


def test_all_of_them_are_counted():
    model = broken("bn1.running_var", -1.0)
    nn.init.constant_(model.fc.weight, NAN)
    nn.init.constant_(model.fc.bias, INF)
    assert set(impossible_numbers(model)) == {"fc.weight", "fc.bias", "bn1.running_var"}
    with pytest.raises(ImpossibleNumbersError, match=r"\(and in 2 more: fc\.bias, bn1\.running"):
        normswap.convert(model, "gn", example_inputs=X)


def test_what_may_be_infinite_may():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("mask", torch.full((4,), -INF))

    assert impossible_numbers(Masked()) == {}
    assert impossible_numbers(Masked().to("meta")) == {}
    assert impossible_numbers(nn.BatchNorm1d(4, track_running_stats=False)) == {}
    assert impossible_numbers(broken("bn1.weight", -3.0)) == {}


@pytest.fixture
def weights(tmp_path):
    def write(name, value):
        path = tmp_path / "w.safetensors"
        save_file(broken(name, value).state_dict(), path)
        return path

    return write


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_the_command_line_names_them_once(command, weights, tmp_path):
    arguments = [command, SPEC, "--checkpoint", weights("bn1.running_var", -0.5)]
    if command == "convert":
        arguments += ["--to", "gn", "-o", tmp_path / "out"]
    refused = run(*arguments, code=1)
    assert refused.stderr.count("bn1.running_var: got a negative variance") == 1
    assert "--allow-nonfinite" in refused.stderr
    assert not (tmp_path / "out").exists()
    run(*arguments, "--allow-nonfinite")
    if command == "convert":
        with pytest.raises(ImpossibleNumbersError):
            normswap.load_model(broken_artefact(tmp_path))


def broken_artefact(tmp_path):
    model = normswap.load_model(SPEC, pretrained=False).model
    nn.init.constant_(model.fc.bias, NAN)
    return normswap.save(model, tmp_path / "broken")


def test_dead_channels_are_a_note(tmp_path):
    model = digits_net()
    model.bn1.running_var[:5] = 0
    model.layer1[0].bn1.running_var[0] = 1e-30
    assert dead_channels(model.bn1) == 5
    plan = normswap.plan(model, "gn", example_inputs=X)
    assert plan.entries[0].notes == ("5 of 16 channels are dead: variance 0",)
    assert plan.notes == (
        "6 of 32 channels are dead (running variance 0) in 2 layers: bn1, layer1.0.bn1",
    )
    assert "dead" in str(plan)
    assert normswap.plan(digits_net(), "gn", example_inputs=X).notes == ()
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    arguments = ("convert", SPEC, "--checkpoint", path, "--to", "frn", "-o", tmp_path / "out")
    assert "6 of 32 channels are dead" in run(*arguments).stdout


@pytest.mark.parametrize(("init", "known"), [("match", True), ("copy", False), ("reset", False)])
def test_nothing_is_predicted_of_what_was_not_matched(init, known, tmp_path):
    arguments = ("convert", SPEC, "--no-pretrained", "--to", "gn", "--init", init)
    drift = json.loads(run(*arguments, "--json", "-o", tmp_path / "out").stdout)["drift"]
    predictions = [site["predicted"] for site in drift["sites"]]
    assert all((value is not None) == known for value in predictions)
    assert len(predictions) == 21
