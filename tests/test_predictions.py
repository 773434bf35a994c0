"""Images without labels: which class, and how sure; classes one by one."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import normswap
from normswap.cli.app import app
from normswap.data import Preprocessing
from normswap.errors import DataError
from normswap.predictions import predictions
from normswap.training.tasks.confusion import Confusion

GREY = Preprocessing((3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


class Brightness(nn.Module):
    """Three classes: dark, middling, bright."""

    def forward(self, x):
        level = x.mean((1, 2, 3))
        return torch.stack([1 - 2 * level, 0.4 + 0 * level, 2 * level - 1], dim=1) * 10


@pytest.fixture
def greys(tmp_path):
    folder = tmp_path / "greys"
    for name, level in (("a", 0), ("b/c", 128), ("b/d", 255)):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (level,) * 3).save(path)
    return folder


def test_the_likeliest_class_and_its_probability(greys):
    names = ("dark", "middling", "bright")
    found = list(predictions(Brightness(), greys, GREY, class_names=names, top=2, batch_size=2))
    assert [item.file.name for item in found] == ["a.png", "c.png", "d.png"]
    assert [item.classes[0] for item in found] == list(names)
    wanted = torch.tensor([10.0, 4.0, -10.0]).softmax(0)
    assert found[0].probabilities == pytest.approx(wanted[:2].tolist(), abs=1e-4)


def test_without_names_classes_are_numbers(greys):
    assert [p.classes for p in predictions(Brightness(), greys / "a.png", GREY)] == [("0",)]


def test_broken_images_stop_it_or_are_named(greys):
    (greys / "b" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="bad"):
        list(predictions(Brightness(), greys, GREY))
    found = list(predictions(Brightness(), greys, GREY, on_broken="skip"))
    assert [bool(item.problem) for item in found].count(True) == 1
    assert sum(len(item.classes) for item in found) == 3


def test_the_confusion_of_a_classifier():
    images = torch.stack([torch.full((3, 4, 4), level) for level in (0.0, 0.0, 0.5, 1.0, 1.0)])
    labels = torch.tensor([0, 1, 1, 2, 0])
    judge = Confusion()
    metrics = normswap.evaluate(Brightness(), (images, labels), batch_size=2, task=judge)
    assert judge.counts.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    assert metrics.top1 == pytest.approx(3 / 5)
    first = judge.by_class()[0]
    assert (first.images, first.top1, first.taken_for, first.times) == (2, 0.5, 2, 1)
    assert judge.by_class()[2].taken_for is None


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "net"
    source = normswap.load_model("timm/resnet18", pretrained=False, num_classes=3)
    normswap.save(source.model, folder, class_names=["dark", "middling", "bright"])
    return folder


def test_predict_on_the_command_line(artefact, greys):
    arguments = ("predict", artefact, greys, "--image-size", "32")
    table = run(*arguments).stdout
    assert "a.png" in table
    assert "%" in table
    found = json.loads(run(*arguments, "--top", "3", "--json").stdout)
    assert len(found) == 3
    assert sum(item["probability"] for item in found[0]["classes"]) == pytest.approx(1)
    assert {item["class"] for item in found[0]["classes"]} == {"dark", "middling", "bright"}


def test_predict_with_onnx_says_the_same(artefact, greys, tmp_path):
    file = tmp_path / "net.onnx"
    run("export", artefact, "-o", file, "--image-size", "32")
    mine, theirs = (
        json.loads(run("predict", what, greys, *size, "--json").stdout)
        for what, size in ((artefact, ("--image-size", "32")), (file, ()))
    )
    assert [item["classes"][0]["class"] for item in mine] == [
        item["classes"][0]["class"] for item in theirs
    ]
    assert mine[0]["classes"][0]["probability"] == pytest.approx(
        theirs[0]["classes"][0]["probability"], abs=1e-3
    )


def test_evaluate_class_by_class(artefact, greys, tmp_path):
    data = tmp_path / "data"
    for name, level in (("dark", 0), ("bright", 255)):
        (data / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32), (level,) * 3).save(data / name / f"{index}.png")
    arguments = ("evaluate", artefact, "--data", data, "--image-size", "32")
    picture = tmp_path / "confusion.png"
    found = json.loads(run(*arguments, "--per-class", "--confusion", picture, "--json").stdout)
    assert {row["class"]: row["images"] for row in found["classes"]} == {"dark": 3, "bright": 3}
    shares = [row["top1"] for row in found["classes"]]
    assert shares == sorted(shares)
    assert sum(shares) / 2 == pytest.approx(found["top1"])
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 100
    assert "mostly taken for" in run(*arguments, "--per-class").stdout
    assert "classes" not in json.loads(run(*arguments, "--json").stdout)
