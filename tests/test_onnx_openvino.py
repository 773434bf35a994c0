"""What other readers than onnxruntime make of the files: OpenVINO, where it is installed."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_support import Net, live
from test_onnx_detectors import detector, image
from torchvision.models.detection.ssd import SSD

import normswap
from normswap.onnx import export_onnx
from normswap.onnx.file.detections import Cut, match
from normswap.onnx.file.parity import relative_error
from normswap.onnx.proving import proof

openvino = pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def one_export(monkeypatch):
    monkeypatch.setattr(proof, "_randomised_cases", lambda *_: [])


def with_openvino(path, batch):
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    found = compiled({"image": batch})
    names = [value.name for value in onnxruntime.InferenceSession(str(path)).get_outputs()]
    return {name: np.asarray(found[compiled.output(name)]) for name in names}


def with_onnxruntime(path, batch):
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": batch}), strict=True))


@pytest.mark.parametrize("target", ["gn", "frn", "cbn"])
def test_openvino_computes_the_same_at_every_batch(target, tmp_path):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = normswap.convert(live(Net()), target, example_inputs=x).model
    path = tmp_path / "m.onnx"
    assert export_onnx(model, path, example_inputs=x).passed
    for rows in (1, 3):
        batch = np.random.default_rng(rows).standard_normal((rows, 3, 16, 16)).astype("f4")
        right, mine = with_onnxruntime(path, batch), with_openvino(path, batch)
        assert relative_error(mine["logits"], right["logits"]) < 1e-4


def test_openvino_finds_what_onnxruntime_finds(tmp_path):
    path = tmp_path / "m.onnx"
    assert export_onnx(detector(SSD), path, example_inputs=[image()]).passed
    batch = image(3).numpy()
    right, mine = with_onnxruntime(path, batch), with_openvino(path, batch)
    assert len(right["scores"]) > 0
    assert match(mine, right, {"boxes": 1e-4, "scores": 1e-4}, Cut(0.01)).whole
