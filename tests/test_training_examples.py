"""The short forms of the training examples run and say what they should."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import normswap

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_batch(tmp_path):
    arguments = ["--quick", "--epochs", "1", "--out", str(tmp_path), "--start", "pretrained"]
    found = example("small_batch").main(arguments)["pretrained"]
    assert found.targets == ("bn", "gn", "frn", "brn", "cbn", "cbn-paper")
    assert all(cell.failure is None for cell in found.cells)
    assert (tmp_path / "textured" / "pretrained" / "sweep.png").exists()


def test_own_training_loop(capsys):
    found = example("own_training_loop").main(["--epochs", "2"])
    assert found["one more epoch at batch 2"] > 0.9
    assert "3 layers are now gn" in capsys.readouterr().out


def test_own_training_loop_with_a_passage():
    found = example("own_training_loop").main(["--epochs", "2", "--passage", "0.5", "--to", "frn"])
    assert found["at the start of the passage"] == found["BN, batch 32"]
    assert found["one more epoch at batch 2"] > 0.9


def test_segmentation(capsys):
    found = example("segmentation").main(["--quick"])
    assert set(found) == {"bn", "gn"}
    assert "of the BatchNorms are now gn" in capsys.readouterr().out


def test_high_resolution():
    module = example("high_resolution")
    assert set(module.main(["--quick"])) == {"bn, crops only", "bn", "gn", "cbn"}
    good, bad = (module.Surfaces(4, 1000, seed=3)[i] for i in (0, 1))
    assert (good[1], bad[1]) == (0, 1)
    assert good[0].shape == (1, 1000, 1000)
    assert torch.equal(bad[0], module.Surfaces(4, 1000, seed=3)[1][0])


def test_dense_tasks(tmp_path):
    arguments = ["--quick", "--targets", "bn,gn", "--batch-sizes", "2", "--out", str(tmp_path)]
    module = example("dense_tasks")
    found = module.main(arguments)
    assert set(found) == {"segmentation", "detection"}
    for task, result in found.items():
        assert all(cell.failure is None and cell.samples == 8 for cell in result.cells)
        assert (tmp_path / task / "sweep.png").exists()
    table = (tmp_path / "table.md").read_text()
    assert "| gn |" in table
    assert str(tmp_path) not in table
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*.json")}
    assert len(done) == 4
    module.main(arguments)
    assert done == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*.json")}


def test_dense_tasks_share_no_object_and_have_exact_boxes(tmp_path):
    module = example("dense_tasks")
    things, walls = module.drawn_pictures(tmp_path)
    kinds, grounds = module.kinds_of(things, 8), sorted(walls.iterdir())
    assert len(kinds) == 8
    train, test = (module.Scenes(kinds, grounds, 6, 48, part, "detection") for part in (0, 1))
    for name in ("things", "walls"):
        first, second = (_flat(getattr(part, name)) for part in (train, test))
        assert first
        assert second
        assert not first & second
    masks = module.Scenes(kinds, grounds, 6, 48, 0, "segmentation")
    for (image, target), (_, mask) in zip(train, masks, strict=True):
        assert image.shape == (3, 48, 48)
        assert set(mask.unique().tolist()) - {0} == set(target["labels"].tolist())
        for (x0, y0, x1, y1), label in zip(
            target["boxes"].int().tolist(), target["labels"].tolist(), strict=True
        ):
            inside = mask[y0:y1, x0:x1] == label
            assert inside.any(0)[[0, -1]].all()
            assert inside.any(1)[[0, -1]].all()


def _flat(items):
    return {p for item in items for p in (item if isinstance(item, list) else [item])}


@pytest.mark.parametrize("name", ["unet", "retinanet", "faster_rcnn"])
def test_dense_models_convert_and_train(name):
    torch.manual_seed(0)
    factory = getattr(example("dense_models"), name)
    size = {} if name == "unet" else {"image_size": 64}
    model = factory(num_classes=3, pretrained=False, backbone="test_efficientnet", **size)
    image = torch.rand(3, 64, 64)
    result = normswap.convert(
        model, "gn", example_inputs=image[None] if name == "unet" else [image]
    )
    assert result.replaced
    mask = torch.zeros(64, 64, dtype=torch.long)
    box = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    label, task = (mask, "segmentation") if name == "unet" else (box, "detection")
    options = normswap.FineTune(batch_size=1, epochs=1)
    history = normswap.finetune(model, [(image, label)], None, options, task=task)
    assert history.steps == 1
