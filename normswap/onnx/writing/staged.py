"""Norms whose means are taken in stages, for groups so large that one running sum loses digits.

onnxruntime's ``InstanceNormalization`` and ``GlobalAveragePool`` add all values of a group to a few
float32 sums. Rounding grows with the length: about 1e-6 of the scale at 6,000 values, 1e-5 at
60,000, 1e-4 at 600,000, where torch stays at 1e-7. The mean of means over two axes of about equal
length is as exact as torch's; each such norm takes one and a half times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from normswap.onnx.file.parsing import reads
from normswap.onnx.writing.forms import Wiring


def stage(proto: onnx.ModelProto) -> int:
    """Rewrite a graph in place; the function stays the same.

    - ``InstanceNormalization`` (GroupNorm's too) becomes mean, difference, mean of squares,
      quotient;
    - ``GlobalAveragePool`` of squares (FRN's) becomes one mean per axis.

    Args:
        proto: a graph whose values have their shapes recorded.

    Returns:
        How many norms were rewritten; those whose length has no divisor are left as they are.
    """
    rewriter = _Rewriter(proto)
    for node in list(proto.graph.node):
        if node.op_type == "InstanceNormalization":
            rewriter.normalization(node)
        elif node.op_type == "GlobalAveragePool":
            rewriter.pool(node)
        else:
            rewriter.nodes.append(node)
    rewriter.finish()
    return rewriter.rewritten


@dataclass
class _Rewriter(Wiring):
    """The nodes of the new graph, as far as it has come."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    rewritten: int = 0
    released: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        values = (*self.proto.graph.value_info, *self.proto.graph.input)
        self.shapes = {v.name: list(v.type.tensor_type.shape.dim) for v in values}

    def normalization(self, node: onnx.NodeProto) -> None:
        """(x − mean) / √(mean((x − mean)²) + ε), then scale and bias unless they are 1 and 0."""
        shape = self.shapes.get(node.input[0], [])
        split = self.split(node) if len(shape) == 3 else []
        channels = shape[1].dim_value if len(shape) >= 3 else 0
        if not channels or (len(shape) == 3 and not split):
            self.nodes.append(node)
            return
        chain = _Chain(self, node)
        value = node.input[0]
        if split:
            value = chain.add("Reshape", value, chain.constant([0, channels, *split], np.int64))
        axes = range(len(shape) - 1 + bool(split), 1, -1)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        centred = chain.add("Sub", value, chain.mean(value, axes))
        power = chain.mean(chain.add("Mul", centred, centred), axes)
        power = chain.add("Add", power, chain.constant(epsilon, np.float32))
        value = chain.add("Div", centred, chain.add("Sqrt", power))
        for op, name, trivial in (("Mul", node.input[1], 1.0), ("Add", node.input[2], 0.0)):
            if self.filled_with(name, trivial):
                self.released.add(name)
            else:
                wide = chain.constant([1, channels, *(1 for _ in axes)], np.int64)
                value = chain.add(op, value, chain.add("Reshape", name, wide))
        if split:
            length = shape[2].dim_value or -1  # of an empty batch none could be told
            value = chain.add("Reshape", value, chain.constant([0, channels, length], np.int64))
        chain.finish(value)

    def pool(self, node: onnx.NodeProto) -> None:
        """The mean of squares over height and width."""
        if not self.is_square(node.input[0]):
            self.nodes.append(node)
            return
        chain = _Chain(self, node)
        chain.finish(chain.mean(node.input[0], (3, 2)))

    def split(self, node: onnx.NodeProto) -> list[int]:
        """Two lengths whose product is the last axis of (N, groups, length); -1 is the rest."""
        groups, length = (axis.dim_value for axis in self.shapes[node.input[0]][1:])
        if length:
            short = _divisor(length)
            return [length // short, short] if short > 1 else []
        reshape = self.makers.get(node.input[0])
        source = self.shapes.get(reshape.input[0], []) if reshape is not None else []
        channels = source[1].dim_value if len(source) > 2 else 0
        if not groups or not channels or channels % groups or channels == groups:
            return []
        return [channels // groups, -1]

    def finish(self) -> None:
        """Put the nodes into the graph and drop the constants that nobody reads any more."""
        graph = self.proto.graph
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del graph.node[:]
        graph.node.extend(nodes)
        read = {name for node in nodes for name in reads(node)}
        for name in self.released - read:
            graph.initializer.remove(self.constants[name])

    def filled_with(self, name: str, value: float) -> bool:
        """Whether a name is a constant of nothing but ``value``."""
        array = self.constant(name)
        return array is not None and bool((array == value).all())


def _divisor(length: int) -> int:
    """The largest divisor that is not above the square root."""
    return next(d for d in range(math.isqrt(length), 0, -1) if length % d == 0)


@dataclass
class _Chain:
    """The nodes that stand for one node; they keep its label."""

    graph: _Rewriter
    node: onnx.NodeProto

    def __post_init__(self) -> None:
        self.base = self.node.output[0]
        self.made: list[onnx.NodeProto] = []
        self.constants = 0

    def add(self, op: str, *inputs: str) -> str:
        """One more node; returns the name of its output."""
        name = f"{self.base}.stage{len(self.made)}"
        made = helper.make_node(op, inputs, [name], name=f"{self.node.name}.stage{len(self.made)}")
        made.metadata_props.extend(self.node.metadata_props)
        self.made.append(made)
        return name

    def constant(self, value: float | Sequence[int], kind: type[np.generic]) -> str:
        """A constant of its own, which is a few bytes."""
        name = f"{self.base}.constant{self.constants}"
        self.constants += 1
        self.graph.proto.graph.initializer.append(
            numpy_helper.from_array(np.array(value, kind), name)
        )
        return name

    def mean(self, value: str, axes: Sequence[int]) -> str:
        """The mean over several axes, one after the other."""
        for axis in axes:
            value = self.add("ReduceMean", value, self.constant([axis], np.int64))
        return value

    def finish(self, value: str) -> None:
        """The last node takes the old one's name and output."""
        last = self.made[-1]
        assert last.output[0] == value
        last.output[0] = self.base
        last.name = self.node.name
        self.graph.nodes += self.made
        self.graph.rewritten += 1
