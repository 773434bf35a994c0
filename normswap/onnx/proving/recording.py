"""The self-test that a proven file takes along."""

from __future__ import annotations

import numpy as np

from normswap.errors import ExportError
from normswap.onnx.file.parity import Parity
from normswap.onnx.file.selftest import MAX_STORED, MAX_TOLERANCE, Expected, SelfTest, TestInput
from normswap.onnx.proving.expectation import Expectation
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import as_array


def recorded_test(asked: Expectation, parity: Parity) -> SelfTest:
    """The example's shapes, judged as the proof was; inputs without rows keep their values.

    Raises:
        ExportError: the model gives NaN or infinity on such inputs.
    """
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
