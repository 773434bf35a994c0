"""The self-test that a proven file takes along."""

from __future__ import annotations

import math

import numpy as np

from normswap.errors import ExportError
from normswap.onnx.file.parity import Parity, tolerance_for
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import (
    MAX_STORED,
    MAX_TOLERANCE,
    Expected,
    SelfTest,
    Shift,
    TestInput,
)
from normswap.onnx.proving.deciding import last_layers
from normswap.onnx.proving.detections import DetectorExpectation, right_layers
from normswap.onnx.proving.expectation import Expectation
from normswap.onnx.proving.scenes import TRIES, Scene, Searcher, at_threshold, of_image
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import as_array


def recorded_test(file: OnnxFile, asked: Expectation, parity: Parity) -> SelfTest:
    """The example's shapes, judged as the proof was; inputs without rows keep their values.

    Raises:
        ExportError: the model gives NaN or infinity on such inputs.
    """
    if isinstance(asked, DetectorExpectation):
        return _detector_test(file, asked)
    proven: dict[str, float] = {}
    for case in parity.cases:
        if not case.randomised:
            proven[case.output] = max(case.tolerance, proven.get(case.output, 0.0))
    signature = asked.subject.signature
    inputs = []
    for index, tensor in enumerate(signature.tensors):
        array = as_array(tensor)
        whole = array.dtype.kind != "f" and array.size > 0
        span = (int(array.min()), int(array.max())) if whole else (0, 0)
        kept = None
        if not signature.has_rows(tensor) and array.size <= MAX_STORED:
            kept = tuple(array.reshape(-1).tolist())
        inputs.append(TestInput(tuple(array.shape), str(array.dtype), 1000 + index, *span, kept))
    arrays = [item.make() for item in inputs]
    rows = signature.batch or 1
    reference = asked.truth.reference(Trial("self-test", arrays, rows))
    if not all(np.isfinite(array).all() for array in reference.outputs):
        raise ExportError(
            type(asked.subject.model).__name__,
            got="NaN or Inf from the model itself on random inputs",
            need="a finite output, to record a self-test by",
            hint="example_inputs of the shape and range that the model is made for",
        )
    outputs = tuple(
        Expected.of(name, array, min(MAX_TOLERANCE, max(limit, proven.get(name, 0.0))), error)
        for name, array, limit, error in zip(
            asked.subject.outputs,
            reference.outputs,
            reference.tolerances,
            reference.torch_errors,
            strict=True,
        )
    )
    return SelfTest(tuple(inputs), outputs)


def _detector_test(file: OnnxFile, asked: DetectorExpectation) -> SelfTest:
    """A generated image on which the detector's decisions stand firm, and what it finds there."""
    tensor = asked.subject.signature.tensors[0]
    shape, kind = tuple(tensor.shape), str(as_array(tensor).dtype)
    searcher = Searcher(asked.truth)
    chosen: Scene | None = None
    for seed in range(TRIES):
        item = TestInput(shape, kind, seed, picture=True)
        scenes, _ = of_image(searcher, Trial("self-test", [item.make()], 1), None)
        telling = [scene for scene in scenes if _can_be_recorded(scene)]
        if telling:
            chosen = telling[-1]
            break
    trial = chosen.trial if chosen is not None else Trial("self-test", [item.make()], 1)
    shift = None
    if chosen is not None and chosen.threshold is not None:
        shift = Shift(searcher.thresholds, chosen.threshold)
    moved = shift.other if shift is not None else None
    return SelfTest((item,), _found(chosen), _decided_by(file, asked, trial, moved), shift)


def _can_be_recorded(scene: Scene) -> bool:
    """Whether nothing in a scene is free: it is judged without knowing the model."""
    return 0 < scene.count <= MAX_STORED // 4 and scene.bound == scene.count


def _found(scene: Scene | None) -> tuple[Expected, ...]:
    if scene is None:
        return ()
    return tuple(
        Expected.of(
            name,
            array,
            min(MAX_TOLERANCE, scene.tolerances[name]),
            scene.torch_errors[name],
        )
        for name, array in scene.right.items()
        if scene.steady[name].all()
    )


def _decided_by(
    file: OnnxFile, asked: DetectorExpectation, trial: Trial, threshold: float | None
) -> tuple[Expected, ...]:
    """Of each layer the whole, where it is run on the whole image, or as many firm rows as fit."""
    layers = last_layers(file.proto, asked.subject.model)
    with at_threshold(asked.truth, threshold):
        right = right_layers(asked.truth, trial, layers)
    found = []
    for name, layer in right.items():
        value = layer.value
        if value.shape[0] != 1:
            value = value[layer.core]
            value = value[: MAX_STORED // max(1, math.prod(value.shape[1:]))]
        if layer.core.any() and value.size:
            limit = asked.truth.tolerance or tolerance_for(layer.error)
            found.append(Expected.of(name, value, min(MAX_TOLERANCE, limit), layer.error))
    return tuple(found)
