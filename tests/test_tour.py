"""The tour keeps what it promises: the whole of it, with a shorter calibration."""

import json
import sys

import pytest
import torch
from PIL import Image

import normswap
from normswap import tour
from normswap.errors import InstallationError

STAGES = [
    "BN original",
    "GN, copied",
    "GN, matched",
    "GN, matched, calibrated without labels",
    "GN, matched, fine-tuned at batch 2",
    "FRN, matched",
    "BRN",
    "CBN",
    "frozen BN",
]


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour") / "demo"
    return tour.take_tour(folder, calibration_seconds=3, report=lambda _: None)


def accuracy(taken):
    return {stage.name: stage.accuracy for stage in taken.stages}


def test_stages(taken):
    assert [stage.name for stage in taken.stages] == STAGES


def test_matching_keeps_what_copying_loses(taken):
    found = accuracy(taken)
    assert found["BN original"] >= 0.95
    assert found["GN, matched"] >= 0.9 * found["BN original"]
    assert found["GN, copied"] <= 0.4
    assert found["GN, matched, fine-tuned at batch 2"] >= 0.97 * found["BN original"]


def test_targets_with_running_statistics_lose_nothing(taken):
    found = accuracy(taken)
    assert found["BRN"] == found["CBN"] == found["frozen BN"] == found["BN original"]


def test_exported_stages_carry_proof_and_latency(taken):
    exported = [stage for stage in taken.stages if stage.onnx_error is not None]
    assert [stage.name for stage in exported] == [STAGES[0], STAGES[4]]
    for stage in exported:
        assert stage.onnx_error <= 1e-4
        assert stage.latency_ms > 0


def test_artefacts_lie_in_the_folder(taken):
    folder = taken.folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "accuracy.png", "bn.onnx", "bn.safetensors", "digits", "gn", "gn.onnx", "results.json",
    }  # fmt: skip
    assert len(list(folder.glob("digits/*/*/*.png"))) == 1797
    assert json.loads((folder / "results.json").read_text()) == taken.to_json()
    assert isinstance(normswap.load(folder / "gn").bn1, torch.nn.GroupNorm)
    with Image.open(folder / "accuracy.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 10  # something is drawn


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InstallationError, match=r"scikit-learn.*pip install 'normswap\[demo\]'"):
        tour.take_tour(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_restored_when_a_step_fails(monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("no disk")

    threads = torch.get_num_threads()
    monkeypatch.setattr(tour, "write_digits", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        tour.take_tour(tmp_path)
    assert torch.get_num_threads() == threads
