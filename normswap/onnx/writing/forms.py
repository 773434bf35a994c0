"""The graph in the form that onnxruntime runs fastest, and rightly; the function stays the same.

onnxruntime computes convolutions in a blocked layout that few other operators know. A per-channel
affine after a norm costs two passes in the plain layout, a third for the ReLU and a fourth for a
residual sum. Written as a depthwise 1×1 convolution it runs in the blocked layout, which the next
convolution needs anyway, and takes the ReLU and the sum with it. The mean of squares stays in that
layout as a GlobalAveragePool. Every rewritten file goes through the same proof as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from normswap.onnx.file.parity import Array
from normswap.onnx.file.parsing import reads

BLOCK = 16
"""onnxruntime's largest channel block; other channel counts leave the blocked layout."""


def fastest(proto: onnx.ModelProto) -> None:
    """Rewrite a freshly exported graph in place.

    - ``InstanceNormalization → Reshape → ·γ → +β`` (GroupNorm) gets a depthwise convolution for
      γ and β;
    - ``x · (rsqrt · γ) + β`` (FRN without TLU) likewise, with the per-sample factor before it;
    - ``mean(x·x)`` over height and width becomes a GlobalAveragePool;
    - ``max(·, 0)`` becomes a ReLU;
    - ``Pad`` before ``MaxPool`` names its axes, because onnxruntime otherwise moves the padding
      into the pool, where it counts as -∞ whatever its value (still so in 1.31).
    """
    graph = _Graph(proto)
    for node in list(proto.graph.node):
        if node.op_type == "ReduceMean":
            graph.pool(node)
        elif node.op_type == "Pad":
            graph.pad(node)
        elif node.op_type == "Max":
            graph.rectify(node)
    for node in list(proto.graph.node):
        if node.op_type == "Add":
            graph.affine(node)
    graph.finish()


@dataclass
class Wiring:
    """A graph with its constants and the makers of its values at hand, as it was found."""

    proto: onnx.ModelProto

    def __post_init__(self) -> None:
        graph = self.proto.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}

    def constant(self, name: str) -> Array | None:
        """The values of an initializer that lies in the file itself."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.external_data:
            return None
        return numpy_helper.to_array(tensor)

    def made_by(self, name: str, op: str) -> onnx.NodeProto | None:
        """The node that makes a value, if that is its operator."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == op else None

    def is_square(self, name: str) -> bool:
        """Whether a value is another one times itself."""
        product = self.made_by(name, "Mul")
        return product is not None and product.input[0] == product.input[1]


@dataclass
class _Graph(Wiring):
    """What a rewriting in place needs besides: who reads a value, and which nodes are gone."""

    gone: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        graph = self.proto.graph
        self.uses: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in reads(node):
                self.uses.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}

    def only_use(self, name: str) -> bool:
        """Whether a value is used once and is no output of the graph."""
        return len(self.uses.get(name, [])) == 1 and name not in self.outputs

    def split(self, node: onnx.NodeProto) -> tuple[str, Array] | None:
        """The variable and the per-channel constant (C, 1, 1) that a node combines."""
        if len(node.input) != 2:
            return None
        for variable, other in (node.input, reversed(node.input)):
            values = self.constant(other)
            if values is not None and values.ndim in (3, 4) and values.dtype == np.float32:
                channels = values.shape[-3]
                if values.size == channels and channels % BLOCK == 0:
                    return variable, values.reshape(-1)
        return None

    def pool(self, node: onnx.NodeProto) -> None:
        """Mean of squares over height and width."""
        axes = self.constant(node.input[1]) if len(node.input) > 1 else None
        keeps = all(a.i == 1 for a in node.attribute if a.name == "keepdims")
        if not self.is_square(node.input[0]) or axes is None or not keeps:
            return
        if sorted(int(axis) for axis in axes.reshape(-1)) != [2, 3] or not self.is_image(node):
            return
        node.op_type = "GlobalAveragePool"
        del node.input[1:], node.attribute[:]

    def pad(self, node: onnx.NodeProto) -> None:
        """Zeros around the windows of a MaxPool."""
        pads = self.constant(node.input[1])
        pooled = any(user.op_type == "MaxPool" for user in self.uses.get(node.output[0], []))
        if not pooled or pads is None or len(node.input) > 3 or pads.size % 2:
            return
        padded = np.flatnonzero(pads.reshape(2, -1).any(axis=0))
        names = [f"{node.output[0]}.{part}" for part in ("pads", "axes")]
        values = (pads.reshape(2, -1)[:, padded].reshape(-1), padded.astype(np.int64))
        self.proto.graph.initializer.extend(map(numpy_helper.from_array, values, names))
        value = node.input[2] if len(node.input) == 3 else ""
        del node.input[1:]
        node.input.extend([names[0], value, names[1]])

    def is_image(self, node: onnx.NodeProto) -> bool:
        """Whether a node's output is known to have four axes."""
        for value in self.proto.graph.value_info:
            if value.name == node.output[0]:
                return len(value.type.tensor_type.shape.dim) == 4
        return False

    def rectify(self, node: onnx.NodeProto) -> None:
        """A TLU whose thresholds are all zero."""
        if len(node.input) != 2:
            return
        values = self.constant(node.input[1])
        if values is not None and values.dtype == np.float32 and not values.any():
            node.op_type = "Relu"
            del node.input[1:]

    def affine(self, add: onnx.NodeProto) -> None:
        """γ and β as a depthwise convolution."""
        shift = self.split(add)
        product = self.made_by(shift[0], "Mul") if shift else None
        if shift is None or product is None or not self.only_use(product.output[0]):
            return
        if self.feeds_threshold(add):
            return
        scale = self.split(product)
        if scale is not None:
            self.after_group_norm(add, product, scale, shift[1])
        else:
            self.after_response_norm(add, product, shift[1])

    def feeds_threshold(self, add: onnx.NodeProto) -> bool:
        """A TLU with thresholds of its own stays in the plain layout, and so does what it clips."""
        return any(node.op_type == "Max" for node in self.uses.get(add.output[0], []))

    def after_group_norm(
        self, add: onnx.NodeProto, product: onnx.NodeProto, scale: tuple[str, Array], shift: Array
    ) -> None:
        reshape = self.made_by(scale[0], "Reshape")
        norm = self.made_by(reshape.input[0], "InstanceNormalization") if reshape else None
        if norm is None or scale[1].size != shift.size or not self.is_image(add):
            return
        self.gone.add(id(product))
        self.convolve(add, scale[0], scale[1], shift)

    def after_response_norm(
        self, add: onnx.NodeProto, product: onnx.NodeProto, shift: Array
    ) -> None:
        for position in (0, 1):
            factor = self.made_by(product.input[position], "Mul")
            if factor is None or not self.only_use(factor.output[0]):
                continue
            scale = self.split(factor)
            root = self.made_by(scale[0], "Reciprocal") if scale else None
            if scale is None or root is None or scale[1].size != shift.size:
                continue
            self.gone.add(id(factor))
            product.input[position] = scale[0]
            product.output[0] += (
                ".unscaled"  # no longer the value that the model calls by this name
            )
            self.convolve(add, product.output[0], scale[1], shift)
            return

    def convolve(self, add: onnx.NodeProto, variable: str, scale: Array, shift: Array) -> None:
        """Turn an Add into the convolution; it keeps its name, its output and its label."""
        weight, bias = (f"{add.output[0]}.{name}" for name in ("weight", "bias"))
        self.proto.graph.initializer.extend(
            [
                numpy_helper.from_array(scale.reshape(-1, 1, 1, 1), weight),
                numpy_helper.from_array(shift, bias),
            ]
        )
        add.op_type = "Conv"
        del add.input[:], add.attribute[:]
        add.input.extend([variable, weight, bias])
        add.attribute.extend(
            [
                helper.make_attribute("group", int(scale.size)),
                helper.make_attribute("kernel_shape", [1, 1]),
            ]
        )

    def finish(self) -> None:
        """Drop the nodes that were taken over and the constants that nobody reads any more."""
        graph = self.proto.graph
        for index in reversed(range(len(graph.node))):
            if id(graph.node[index]) in self.gone:
                del graph.node[index]
        made = {name for node in graph.node for name in node.output}
        for index in reversed(range(len(graph.value_info))):
            if graph.value_info[index].name not in made:
                del graph.value_info[index]
        read = {name for node in graph.node for name in reads(node)} | self.outputs
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name not in read:
                del graph.initializer[index]
