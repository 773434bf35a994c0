"""The hash that version 0.1 wrote (metadata of format 1), kept so that its files still verify.

It names the fields that it covers, one by one. What a runtime reads beyond them makes a file of
format 1 unfit for this hash: ``uncovered`` says so, and such a file is not the proven one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import onnx

from normswap.onnx.file.parsing import OnnxFile, external_bytes, is_external, messages


class _Digest:
    """A SHA-256 over tagged, length-prefixed fields, so that no two structures read the same."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.sha = hashlib.sha256()

    def field(self, tag: str, *values: Any) -> None:
        for value in (tag, *values):
            data = value if isinstance(value, bytes) else str(value).encode()
            self.sha.update(len(data).to_bytes(8, "little"))
            self.sha.update(data)

    def model(self, proto: onnx.ModelProto) -> None:
        opsets = sorted((opset.domain, opset.version) for opset in proto.opset_import)
        self.field("opsets", opsets)
        self.graph(proto.graph)
        for function in proto.functions:
            self.field("function", function.domain, function.name, function.overload)
            self.field("io", list(function.input), list(function.output))
            self.field("attributes", list(function.attribute))
            for attribute in _by_name(function.attribute_proto):
                self.attribute(attribute)
            for node in function.node:
                self.node(node)
        for training in proto.training_info:
            self.graph(training.initialization)
            self.graph(training.algorithm)

    def graph(self, graph: onnx.GraphProto) -> None:
        self.field("graph", len(graph.node), len(graph.initializer))
        for kind, values in (
            ("input", graph.input),
            ("output", graph.output),
            ("value", graph.value_info),
        ):
            for value in values:
                self.field(kind, value.name, value.type.SerializeToString(deterministic=True))
        for node in graph.node:
            self.node(node)
        for tensor in sorted(graph.initializer, key=lambda item: item.name):
            self.tensor(tensor)
        for sparse in graph.sparse_initializer:
            self.field("sparse", list(sparse.dims))
            self.tensor(sparse.values)
            self.tensor(sparse.indices)

    def node(self, node: onnx.NodeProto) -> None:
        self.field("node", node.domain, node.op_type, node.overload)
        self.field("io", list(node.input), list(node.output))
        for attribute in _by_name(node.attribute):
            self.attribute(attribute)

    def attribute(self, attribute: onnx.AttributeProto) -> None:
        self.field("attribute", attribute.name, attribute.type, attribute.ref_attr_name)
        self.field("float", attribute.f.hex(), [value.hex() for value in attribute.floats])
        self.field("int", attribute.i, list(attribute.ints))
        self.field("string", attribute.s, *attribute.strings)
        if attribute.HasField("t"):
            self.tensor(attribute.t)
        for tensor in attribute.tensors:
            self.tensor(tensor)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            self.field("sparse", sparse.SerializeToString(deterministic=True))
        if attribute.HasField("g"):
            self.graph(attribute.g)
        for graph in attribute.graphs:
            self.graph(graph)

    def tensor(self, tensor: onnx.TensorProto) -> None:
        self.field("tensor", tensor.name, tensor.data_type, list(tensor.dims))
        if is_external(tensor):
            self.field("data", external_bytes(self.file, tensor))
        elif tensor.HasField("raw_data"):
            self.field("data", tensor.raw_data)
        else:
            bare = onnx.TensorProto()
            bare.CopyFrom(tensor)
            for noise in ("name", "doc_string"):
                bare.ClearField(noise)
            self.field("typed", bare.SerializeToString(deterministic=True))


def _by_name(attributes: Iterable[onnx.AttributeProto]) -> list[onnx.AttributeProto]:
    return sorted(attributes, key=lambda attribute: attribute.name)


def graph_hash_v1(file: OnnxFile) -> str:
    """SHA-256 over nodes, attributes, initializers, inputs, outputs and opsets, in hex."""
    digest = _Digest(file)
    digest.model(file.proto)
    return digest.sha.hexdigest()


def uncovered(file: OnnxFile) -> str | None:
    """What is in a file that this hash would not see edited; None if there is nothing."""
    opsets = {opset.domain: opset.version for opset in file.proto.opset_import}
    for function in file.proto.functions:
        if any(opsets.get(own.domain) != own.version for own in function.opset_import):
            return "a function with operator versions of its own"
    for message in messages(file.proto):
        if isinstance(message, onnx.AttributeProto):
            sparse = (message.sparse_tensor, *message.sparse_tensors)
            if any(is_external(tensor) for one in sparse for tensor in (one.values, one.indices)):
                return "sparse values outside of the file"
            if message.HasField("tp") or message.type_protos:
                return "a type as an attribute"
    return None
