"""The short forms of the training examples run and say what they should."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

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
