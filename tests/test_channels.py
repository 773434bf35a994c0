"""Inputs of any number of channels: what models take, and images that have as many."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.models import adapt_input_conv
from torch import nn

import normswap
from normswap import data
from normswap.cli.app import app
from normswap.data import Preprocessing
from normswap.errors import ArtifactError, DataError, SpecError
from normswap.factories import Request
from normswap.factories.python_models import from_python
from normswap.factories.stems import take_channels

MODULE = """
import timm
import torch
from torch import nn


def tiny(in_chans=3, num_classes=5, **options):
    return timm.create_model("resnet10t", in_chans=in_chans, num_classes=num_classes, **options)


def grey():
    return tiny(1)


def five():
    return tiny(5)


def features():
    return tiny(1, features_only=True)


def documented():
    return tiny(2)


documented.preprocessing = {
    "input_size": [2, 64, 64], "mean": [0.1, 0.2], "std": [1, 1], "interpolation": "bilinear"
}


def sized():
    model = tiny(1)
    model.input_size = (1, 48, 32)
    return model


def edge():
    model = tiny(4)
    model.input_size = 40
    return model


class FromRGB(nn.Module):
    input_size = (3, 32, 32)

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        red, green, blue = x.unbind(1)
        return self.bn(self.conv((red + green + blue)[:, None])).mean((2, 3))


class Stale(FromRGB):
    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))
"""

SIZES = {
    "grey": (1, 176, 176),
    "five": (5, 176, 176),
    "features": (1, 176, 176),
    "documented": (2, 64, 64),
    "sized": (1, 48, 32),
    "edge": (4, 40, 40),
    "FromRGB": (3, 32, 32),
    "Stale": (1, 32, 32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    (made / "own_channels.py").write_text(MODULE)
    return made


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", SIZES)
def test_the_model_says_what_it_takes(here, name):
    built = from_python(Request(f"python:own_channels:{name}", f"own_channels:{name}"))
    assert built.preprocessing.input_size == SIZES[name]
    x = torch.zeros(1, *SIZES[name])
    assert normswap.convert(built.model, "gn", example_inputs=x).replaced


def test_a_documented_preprocessing_is_taken_as_it_is(here):
    built = from_python(Request("python:own_channels:documented", "own_channels:documented"))
    assert built.preprocessing.mean == (0.1, 0.2)
    assert built.preprocessing.interpolation == "bilinear"


def test_channels_of_a_factory_and_of_a_config(here):
    source = normswap.load_model("python:own_channels:tiny", in_chans=4, num_classes=3)
    assert source.preprocessing.input_size[0] == 4
    assert source.preprocessing.mean == (0.485, 0.456, 0.406, 0.485)
    assert source.model(source.example_inputs()).shape == (1, 3)
    with pytest.raises(SpecError, match="a factory that takes in_chans"):
        normswap.load_model("python:own_channels:grey", in_chans=4)


@pytest.mark.parametrize(
    ("spec", "channels"),
    [
        ("timm/resnet10t", 5),
        ("torchvision/mobilenet_v3_small", 1),
        ("torchvision/googlenet", 4),
        ("torchvision/r3d_18", 1),
    ],
)
def test_libraries_build_for_other_channels_and_artefacts_remember(spec, channels, tmp_path):
    source = normswap.load_model(spec, pretrained=False, in_chans=channels, num_classes=4)
    assert source.preprocessing.input_size[0] == channels
    size = source.preprocessing.input_size
    x = torch.randn(1, *size[:-2], 48, 48)
    model = normswap.convert(source.model, "gn", example_inputs=x).model
    normswap.save(model, tmp_path / "out")
    again = normswap.load_model(tmp_path / "out")
    assert again.preprocessing.input_size[0] == channels
    assert torch.equal(again.model(x), model.eval()(x))
    with pytest.raises(ArtifactError, match="together with in_chans"):
        normswap.load_model(tmp_path / "out", in_chans=channels)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_a_pretrained_stem_follows_timms_rule(channels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4))
    before = model[0].weight.detach().clone()
    take_channels(model, channels, "own", pretrained=True)
    assert torch.equal(model[0].weight, adapt_input_conv(channels, before))
    assert model(torch.randn(2, channels, 9, 9)).shape == (2, 4, 4, 4)


def test_a_grey_image_is_to_a_grey_stem_what_three_equal_channels_are_to_the_old_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 1, 6, 6)
    right = model(x.expand(1, 3, 6, 6))
    torch.testing.assert_close(take_channels(model, 1, "own", pretrained=True)(x), right)


def test_a_model_with_two_stems_is_refused():
    two = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)])
    with pytest.raises(SpecError, match="2 convolutions of 3 channels"):
        take_channels(two, 4, "own", pretrained=False)
    with pytest.raises(SpecError, match="in_chans: got 0"):
        normswap.load_model("timm/resnet10t", in_chans=0)


# --- images ---------------------------------------------------------------------------------------


def flat(size, values):
    """What the transform must give for constant bands: (value / 255 - mean) / std."""
    return torch.tensor(values).view(-1, 1, 1).expand(-1, size, size)


def preprocessing(channels, size=8):
    mean = tuple(0.1 * (i + 1) for i in range(channels))
    return Preprocessing((channels, size, size), mean, (0.5,) * channels, "bilinear", 1.0)


def written(folder, channels, value=lambda band: 20 * (band + 1)):
    """An image file with as many channels, each constant."""
    bands = [np.full((12, 10), value(band), np.uint8) for band in range(channels)]
    if channels == 4:
        Image.fromarray(np.stack(bands, -1), "RGBA").save(folder / "a.png")
        return folder / "a.png"
    pages = [Image.fromarray(band) for band in bands]
    pages[0].save(folder / "a.tiff", save_all=True, append_images=pages[1:])
    return folder / "a.tiff"


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("train", [False, True])
def test_every_channel_is_read_scaled_and_normalised(tmp_path, channels, train):
    path = written(tmp_path, channels)
    wants = preprocessing(channels)
    image = data.read_image(path, channels)
    still = {"hflip": 0.0, "vflip": 0.0, "color_jitter": None} if train else {}
    found = data.transform(wants, train, **still)(image)
    right = [(20 * (i + 1) / 255 - m) / 0.5 for i, m in enumerate(wants.mean)]
    torch.testing.assert_close(found, flat(8, right), rtol=0, atol=1e-5)
    assert data.load_images(tmp_path, wants).shape == (1, channels, 8, 8)


def test_all_channels_are_cut_and_turned_alike(tmp_path):
    ramp = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    pages = [Image.fromarray(ramp)] * 5
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    make = data.transform(Preprocessing((5, 16, 16), (0.0,) * 5, (1.0,) * 5), train=True)
    image = data.read_image(tmp_path / "a.tif", 5)
    torch.manual_seed(0)
    first, second = make(image), make(image)
    assert all(torch.equal(band, first[0]) for band in first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 4])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix, channels):
    pages = [Image.fromarray(np.full((8, 8), 257 * v, np.uint16)) for v in (10, 40, 90, 200)]
    if channels == 1 or suffix == "png":
        pages[1].save(tmp_path / f"a.{suffix}")
        values = [40] if channels == 1 else [40, 40, 40, 255]
    else:
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
        values = [10, 40, 90, 200]
    wants = Preprocessing((channels, 8, 8), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
    found = data.load_images(tmp_path, wants)[0]
    torch.testing.assert_close(found, flat(8, [v / 255 for v in values]), rtol=0, atol=1e-5)


def test_an_image_of_other_channels_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"rgb\.png: got 3 channels.*need the 5 channels"):
        data.load_images(tmp_path, preprocessing(5))


def test_grey_sixteen_bit_images_calibrate_a_model_of_ones_own(here, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0)
    for index in range(4):
        values = noise.integers(0, 65535, (64, 64)).astype(np.uint16)
        Image.fromarray(values).save(images / f"{index}.png")
    arguments = ["convert", "python:own_channels:sized", "--to", "gn", "-o", str(tmp_path / "out")]
    calibrate = ["--calibrate", str(images), "--calibrate-seconds", "5", "--json"]
    result = CliRunner().invoke(app, arguments + calibrate)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibration"] is not None


def test_in_chans_on_the_command_line(tmp_path):
    out = str(tmp_path / "out")
    options = ["timm/resnet10t", "--no-pretrained", "--in-chans", "2", "--to", "gn", "-o", out]
    result = CliRunner().invoke(app, ["convert", *options])
    assert result.exit_code == 0, result.output
    assert normswap.load_model(out).model.conv1[0].weight.shape[1] == 2
    assert timm.create_model("resnet10t", in_chans=2).conv1[0].weight.shape[1] == 2
