"""Float16 weights and activations, with the statistics of the norms kept in float32.

A node computes in float16 if its operator loses nothing but precision there and it is not part of
a norm; all others keep float32, with casts where the two meet. The inputs and outputs of the file
stay float32. Squares above 256² overflow float16: that is why norms are left out, as a whole.
An FRN with large inputs fails the proof where onnxruntime's converter is told to leave its nodes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from normswap.errors import ExportError

HALF_OPS = frozenset(
    {"Add", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Elu", "Erf", "Expand", "Flatten"}
    | {"Gelu", "Gemm", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MatMul", "Max"}
    | {"MaxPool", "Min", "Mish", "Mul", "Neg", "PRelu", "Pad", "Relu", "Reshape", "Sigmoid"}
    | {"Slice", "Softplus", "Split", "Squeeze", "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze"}
)
_SHORT: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


def inside(norms: Collection[str], model: nn.Module) -> frozenset[str]:
    """Every module inside a normaliser, the normalisers included."""
    within = tuple(f"{norm}." for norm in norms if norm)
    names = (name for name, _ in model.named_modules())
    return frozenset(name for name in names if name in norms or name.startswith(within))


def to_half(proto: onnx.ModelProto, wide: frozenset[str]) -> None:
    """Rewrite a graph in place.

    Args:
        proto: a freshly exported model.
        wide: names of values that nodes of a norm produce; their nodes keep float32.

    Raises:
        ExportError: control flow, whose subgraphs are not looked into.
    """
    for node in proto.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ExportError(
                "half",
                got=f"a {node.op_type} node with a subgraph",
                need="a model without control flow",
                hint="leaving --half out (half=False)",
            )
    _Rewriter(proto, _float_values(proto), wide).run()


def _float_values(proto: onnx.ModelProto) -> frozenset[str]:
    inferred = onnx.shape_inference.infer_shapes(proto)
    graph = inferred.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    return frozenset(floats)


@dataclass
class _Rewriter:
    proto: onnx.ModelProto
    floats: frozenset[str]
    wide: frozenset[str]
    kinds: dict[str, int] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    fresh: dict[tuple[str, int], str] = field(default_factory=dict)

    def run(self) -> None:
        graph = self.proto.graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            narrow = node.op_type in HALF_OPS and not self.wide & set(node.output)
            kind = TensorProto.FLOAT16 if narrow else TensorProto.FLOAT
            for position, name in enumerate(node.input):
                if name in self.floats:
                    node.input[position] = self.cast(name, kind, constants.get(name))
            self.kinds |= {name: kind for name in node.output if name in self.floats}
            self.nodes.append(node)
        self.outputs()
        kept = [type(node).FromString(node.SerializeToString()) for node in self.nodes]
        used = {name for node in kept for name in node.input} | {v.name for v in graph.output}
        tensors = [t for t in graph.initializer if t.name in used]
        tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in tensors]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(kept)
        graph.initializer.extend(tensors)

    def cast(self, name: str, kind: int, constant: onnx.TensorProto | None) -> str:
        """The name under which ``name`` is to be had in float16 or float32."""
        if self.kinds.get(name, TensorProto.FLOAT) == kind:
            return name
        known = self.fresh.get((name, kind))
        if known is not None:
            return known
        other = f"{name}.{_SHORT[kind]}"
        self.fresh[name, kind] = other
        if constant is not None:
            with np.errstate(over="ignore"):  # an overflow is the proof's to find
                array = numpy_helper.to_array(constant).astype(np.float16)
            self.proto.graph.initializer.append(numpy_helper.from_array(array, other))
        else:
            self.nodes.append(helper.make_node("Cast", [name], [other], to=kind))
        return other

    def outputs(self) -> None:
        """Give the file's outputs back as float32."""
        for value in self.proto.graph.output:
            if self.kinds.get(value.name) != TensorProto.FLOAT16:
                continue
            inner = f"{value.name}.fp16"
            for node in self.nodes:
                for names in (node.input, node.output):
                    for position, name in enumerate(names):
                        if name == value.name:
                            names[position] = inner
            self.nodes.append(helper.make_node("Cast", [inner], [value.name], to=TensorProto.FLOAT))
