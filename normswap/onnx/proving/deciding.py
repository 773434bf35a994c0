"""What a detector decides by: the values of its last layers, before any box is kept or dropped.

They are the same whether a box passes the threshold or none does, so they show a wrong weight that
no detection shows: that of a class which does not occur in the images of the proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import nn

from normswap.onnx.file.parity import Array
from normswap.onnx.subject import Subject, as_array
from normswap.onnx.writing.forms import reads

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


def layer_values(
    subject: Subject, inputs: Sequence[Array], layers: Sequence[LastLayer]
) -> dict[str, Array]:
    """What the model's own layers give, by the names of the graph."""
    wanted = {layer.module for layer in layers}
    seen: dict[str, list[Array]] = {name: [] for name in wanted}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen[name].append(as_array(output).copy())

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in subject.model.named_modules()
        if name in wanted
    ]
    try:
        subject.run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer.value: seen[layer.module][layer.call]
        for layer in layers
        if layer.call < len(seen[layer.module])
    }
