"""What a model's source lets the library find by itself: its original, its shape, its head."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from traps import randomise

import normswap
from normswap import sources
from normswap.errors import CalibrationError, SpecError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = sources.build("timm/test_resnet", pretrained=False).model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(model.state_dict(), path)
    return path, model.eval()


@pytest.fixture
def converted(checkpoint):
    source = normswap.load_model("timm/test_resnet", checkpoint=checkpoint[0])
    normswap.convert(source.model, "gn", example_inputs=source.example_inputs())
    return source


def test_the_original_of_a_converted_model(converted, checkpoint):
    x = converted.example_inputs(2)
    found = sources.original_of(converted.model)
    assert torch.equal(found(x), checkpoint[1](x))
    shape = sources.architecture_of(converted.model)
    assert [type(m) for m in shape.modules()] == [type(m) for m in found.modules()]


def test_calibrate_finds_its_own_teacher(converted):
    x = converted.example_inputs(8)
    report = normswap.calibrate(converted.model, images=x, steps=0)
    assert report.after.output_error <= report.before.output_error
    with pytest.raises(CalibrationError, match=r"teacher: got a tensor.*images=…"):
        normswap.calibrate(converted.model, x)
    with pytest.raises(CalibrationError, match="images: got none"):
        normswap.calibrate(converted.model)


def test_an_original_that_cannot_be_had_is_one_clear_error():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    net = normswap.convert(net, "gn", example_inputs=x).model
    for find in (sources.original_of, sources.architecture_of):
        with pytest.raises(SpecError, match="source is not known"):
            find(net)
    with pytest.raises(SpecError, match="source is not known"):
        normswap.calibrate(net, images=x)
    fresh = normswap.load_model("timm/test_resnet", pretrained=False).model
    with pytest.raises(SpecError, match="random weights"):
        sources.original_of(fresh)
    assert sources.architecture_of(fresh)


def test_a_head_is_kept_renamed_or_made_anew():
    source = normswap.load_model("timm/test_resnet", pretrained=False, num_classes=3)
    weight = source.model.get_classifier().weight
    assert sources.fit_head(source, ["a", "b", "c"]) == (("a", "b", "c"), False)
    assert sources.fit_head(source, ["c", "a"]) == (("a", "b", "c"), False)  # it covers them
    assert sources.fit_head(source, ["x", "y", "z"]) == (("x", "y", "z"), False)  # other names
    assert source.model.get_classifier().weight is weight
    assert sources.fit_head(source, list("abcde")) == (tuple("abcde"), True)
    assert source.model(source.example_inputs()).shape == (1, 5)
