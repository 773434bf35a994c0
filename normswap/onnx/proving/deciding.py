"""What a detector decides by: the values of its last layers, before any box is kept or dropped.

They are the same whether a box passes the threshold or none does, so they show a wrong weight that
no detection shows: that of a class which does not occur in the images of the proof.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from normswap.onnx.file.detections import rows_apart
from normswap.onnx.file.parity import CEILING, Array
from normswap.onnx.file.parsing import reads
from normswap.onnx.file.selftest import MAX_STORED, MAX_TOLERANCE, Expected
from normswap.onnx.proving.expectation import GroundTruth
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import Subject, as_array
from normswap.running import watched

_DECISIONS = frozenset(
    {"TopK", "NonMaxSuppression", "NonZero", "ArgMax", "RoiAlign", "Shape", "If", "Loop"}
)
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})


@dataclass(frozen=True)
class LastLayer:
    """A layer that nothing but decisions follows.

    Attributes:
        module: its qualified name.
        value: the name of its output in the graph.
        call: the how-manieth call of the module this is.
    """

    module: str
    value: str
    call: int


def last_layers(proto: onnx.ModelProto, model: nn.Module) -> tuple[LastLayer, ...]:
    """The layers whose outputs are decided by, found by the names of their weights."""
    modules = dict(model.named_modules())
    weights = {tensor.name for tensor in proto.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    calls: Counter[str] = Counter()
    found = []
    for node in proto.graph.node:
        if node.op_type not in _WEIGHTED or len(node.input) < 2 or node.input[1] not in weights:
            continue
        module = node.input[1].removesuffix(".weight")
        if module not in modules:
            continue
        if _is_last(node, readers):
            found.append(LastLayer(module, node.output[0], calls[module]))
        calls[module] += 1
    return tuple(found)


def _is_last(node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """Whether every way from a node meets a decision or an end before another layer."""
    seen: set[str] = set()
    waiting = list(node.output)
    while waiting:
        name = waiting.pop()
        for reader in readers.get(name, []):
            if reader.op_type in _WEIGHTED or reader.op_type == "InstanceNormalization":
                return False
            if reader.op_type in _DECISIONS:
                continue
            fresh = [output for output in reader.output if output not in seen]
            seen.update(fresh)
            waiting += fresh
    return True


@dataclass(frozen=True)
class RightLayer:
    """What one layer should give: the values, the rows that are firm, torch's own error."""

    value: Array
    core: Array
    error: float


def right_layers(
    truth: GroundTruth, trial: Trial, layers: Sequence[LastLayer]
) -> dict[str, RightLayer]:
    """The values of a model's last layers in float64, by the names of the graph."""
    models = [(truth.subject, truth.subject.run)]
    if truth.double is not None:
        models.append((truth.double, truth.double.run_double))
    runs = [_layer_values(subject, run, trial, layers) for subject, run in models]
    single, exact = runs[0], runs[-1]
    found = {}
    for name, value in exact.items():
        apart = rows_apart(single[name], value) if name in single else np.full(len(value), np.inf)
        core = apart <= (truth.tolerance or CEILING)
        found[name] = RightLayer(value, core, float(np.max(apart, where=core, initial=0.0)))
    return found


def recorded_layers(
    proto: onnx.ModelProto, truth: GroundTruth, trial: Trial
) -> tuple[Expected, ...]:
    """Of each layer the whole, where it is run on the whole image, or as many firm rows as fit."""
    layers = last_layers(proto, truth.subject.model)
    found = []
    for name, layer in right_layers(truth, trial, layers).items():
        value = layer.value
        if value.shape[0] != 1:
            value = value[layer.core]
            value = value[: MAX_STORED // max(1, math.prod(value.shape[1:]))]
        if layer.core.any() and value.size:
            limit = min(MAX_TOLERANCE, truth.allows(layer.error))
            found.append(Expected.of(name, value, limit, layer.error))
    return tuple(found)


def _layer_values(
    subject: Subject,
    run: Callable[[Sequence[Array]], Any],
    trial: Trial,
    layers: Sequence[LastLayer],
) -> dict[str, Array]:
    wanted = {layer.module for layer in layers}
    seen: dict[str, list[Array]] = {name: [] for name in wanted}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen[name].append(as_array(output).copy())

    with watched(subject.model, keep, wanted):
        run(trial.inputs)
    return {
        layer.value: seen[layer.module][layer.call]
        for layer in layers
        if layer.call < len(seen[layer.module])
    }
