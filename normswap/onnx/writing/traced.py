"""Detectors, by torch's older exporter: it traces, where the newer one refuses to branch on data.

A trace keeps what the one image of the export made the model do. So the graph is put in order
where a trace is known to go wrong, and proven on images of other content and number of detections.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from normswap.errors import ExportError, in_short
from normswap.onnx.file.parsing import read_onnx, reads, save
from normswap.onnx.subject import Subject
from normswap.onnx.writing.draft import Draft, Options, label, quiet
from normswap.onnx.writing.forms import fastest
from normswap.onnx.writing.staged import stage

LAST_OPSET = 20
"""The newest that the older exporter knows."""


def write_traced(subject: Subject, path: Path, options: Options) -> Draft:
    """Export a detector for one image.

    Raises:
        ExportError: torch no longer has that exporter, or cannot trace the model.
    """
    _check(subject, options)
    args, _ = subject.signature.call
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                subject.model,
                args,
                str(path),
                dynamo=False,
                opset_version=options.opset,
                input_names=list(subject.inputs),
                output_names=list(subject.outputs),
                dynamic_axes=_axes(subject, options),
            )
    except Exception as error:
        raise _cannot_trace(subject.model, error) from error
    file = read_onnx(path)
    if file.reaches_out:
        raise ExportError(
            type(subject.model).__name__,
            got="a detector of more than 2 GB",
            need="one that fits into one file",
            hint="a smaller backbone",
        )
    tidy(file.proto)
    _label_nodes(file.proto, subject.model)
    fastest(file.proto)
    staged = stage(file.proto) if options.staged else 0
    save(file)
    return Draft(file, None, options, staged)


def _check(subject: Subject, options: Options) -> None:
    name = type(subject.model).__name__
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise _gone(name)
    if options.opset > LAST_OPSET:
        raise ExportError(
            f"{name}, opset",
            got=str(options.opset),
            need=f"at most {LAST_OPSET} for a detector: torch's older exporter writes it",
            hint=f"--opset {LAST_OPSET} (opset={LAST_OPSET})",
        )
    if options.half:
        raise ExportError(
            f"{name}, half",
            got="True for a detector",
            need="float32: what float16 rounds decides which boxes overlap",
            hint="leaving --half out (half=False)",
        )


def _gone(name: str) -> ExportError:
    return ExportError(
        name,
        got=f"torch {torch.__version__}, which has no TorchScript-based ONNX exporter any more",
        need="one that has it, for detectors alone: the newer exporter refuses them",
        hint="torch 2.14 for the export; the file runs anywhere",
    )


def _cannot_trace(model: nn.Module, error: Exception) -> ExportError:
    name = type(model).__name__
    gone = isinstance(error, TypeError | ImportError | NotImplementedError | ValueError)
    if gone and "dynamo" in str(error):
        return _gone(name)
    return ExportError(
        name,
        got=f"{type(error).__name__} from torch's older exporter: {in_short(error)}",
        need="a detector that can be traced",
        hint="torchvision's own parts",
    )


def _axes(subject: Subject, options: Options) -> dict[str, dict[int, str]]:
    """The number of detections is open, and height and width where that is asked for."""
    rank = len(subject.signature.inputs[0].shape)
    axes: dict[str, dict[int, str]] = {name: {0: "detections"} for name in subject.outputs}
    if options.dynamic_size:
        axes[subject.inputs[0]] = {rank - 2: "height", rank - 1: "width"}
    return axes


def tidy(proto: onnx.ModelProto) -> None:
    """Bring a traced graph into the form of the newer exporter's; the function stays the same.

    - a ``Constant`` node becomes an initializer, and so does every other name of one;
    - a ``Reshape`` to a shape that is computed keeps a size of 0 that was computed, and one that
      leaves a length open names it where it is known: where no box passes the threshold, the file
      would otherwise stop with an error;
    - the values get their shapes recorded, as far as they can be inferred.
    """
    graph = proto.graph
    outputs = {value.name for value in graph.output}
    names = {tensor.name for tensor in graph.initializer}
    alias: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        output = node.output[0] if node.output else ""
        if node.op_type == "Constant" and value is not None and output not in outputs:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = output
            names.add(output)
        elif (
            node.op_type == "Identity"
            and output not in outputs
            and alias.get(node.input[0], node.input[0]) in names
        ):
            alias[output] = alias.get(node.input[0], node.input[0])
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(kept)
    _rename(graph, alias)
    _keep_zeros(graph)
    inferred = onnx.shape_inference.infer_shapes(proto)
    del graph.value_info[:]
    graph.value_info.extend(inferred.graph.value_info)
    _name_lengths(graph)


def _rename(graph: onnx.GraphProto, alias: Mapping[str, str]) -> None:
    """Other names for what nodes read, also in the graphs inside them."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = alias.get(name, name)
        for inner in _inner(node):
            _rename(inner, alias)
            for value in inner.output:
                value.name = alias.get(value.name, value.name)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _keep_zeros(graph: onnx.GraphProto) -> None:
    """Computed shapes mean the zeros that they hold, unless a −1 stands beside them."""
    constants = _constant_shapes(graph)
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in constants:
            continue
        maker = makers.get(node.input[1])
        while maker is not None and maker.op_type == "Cast":
            maker = makers.get(maker.input[0])
        if maker is None or maker.op_type not in ("Concat", "Shape"):
            continue
        parts = [constants.get(name) for name in maker.input]
        if any(part is not None and (part < 0).any() for part in parts):
            continue
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("allowzero", 1))


def _name_lengths(graph: onnx.GraphProto) -> None:
    """(0, G, −1), GroupNorm's shape: of no boxes no length can be told.

    Where the length is not known either, the file computes it, behind boxes alone.
    """
    constants = _constant_shapes(graph)
    known = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    }
    of_boxes = _behind_boxes(graph)
    nodes: list[onnx.NodeProto] = []
    for found in graph.node:
        node = onnx.NodeProto.FromString(found.SerializeToString())
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        copies = not any(a.i for a in node.attribute if a.name == "allowzero")
        if shape is not None and copies and {0, -1} <= set(shape.tolist()):
            others = [
                length
                for axis, length in enumerate(known.get(node.input[0], ()))
                if axis >= len(shape) or shape[axis] != 0
            ]
            if others and 0 not in others:  # 0 where a length is open
                length = math.prod(others) // math.prod(shape[shape > 0].tolist())
                settled = np.where(shape == -1, length, shape)
                node.input[1] = f"{node.output[0]}.shape"
                graph.initializer.append(onnx.numpy_helper.from_array(settled, node.input[1]))
            elif node.input[0] in of_boxes and len(shape) == 3 and shape[0] == 0 < shape[1]:
                nodes += _computed_shape(graph, node, int(shape[1]))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _computed_shape(
    graph: onnx.GraphProto, node: onnx.NodeProto, groups: int
) -> list[onnx.NodeProto]:
    """Nodes that make (N, G, length) of what ``node`` reads, which takes it from then on."""
    value, base = node.input[0], node.output[0]
    count, rest, total, length, shape, wide = (
        f"{base}.{name}" for name in ("count", "rest", "total", "length", "shape", "groups")
    )
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([groups]), wide))
    node.input[1] = shape
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("allowzero", 1))
    return [
        onnx.helper.make_node("Shape", [value], [count], start=0, end=1),
        onnx.helper.make_node("Shape", [value], [rest], start=1),
        onnx.helper.make_node("ReduceProd", [rest], [total], keepdims=1),
        onnx.helper.make_node("Div", [total, wide], [length]),
        onnx.helper.make_node("Concat", [count, wide, length], [shape], axis=0),
    ]


def _behind_boxes(graph: onnx.GraphProto) -> set[str]:
    """The values that follow from what was cut out of a map for each box."""
    found: set[str] = set()
    for node in graph.node:
        if _cuts_boxes(node) or not found.isdisjoint(reads(node)):
            found.update(node.output)
    return found


def _cuts_boxes(node: onnx.NodeProto) -> bool:
    inside = (inner for graph in _inner(node) for inner in graph.node)
    return node.op_type == "RoiAlign" or any(map(_cuts_boxes, inside))


def _constant_shapes(graph: onnx.GraphProto) -> dict[str, Any]:
    """What an initializer of whole numbers holds, by its name."""
    kind = onnx.TensorProto.INT64
    whole = (tensor for tensor in graph.initializer if tensor.data_type == kind)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole}


def _label_nodes(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Say which module a node computes, as the newer exporter's files do."""
    modules = dict(model.named_modules())
    for node in proto.graph.node:
        label(node, modules, _scope(node.output[0], modules) if node.output else "")
        node.doc_string = ""
        if not node.name:
            node.name = f"node_{node.output[0]}"


def _scope(value: str, modules: Mapping[str, Any]) -> str:
    """The module of ``/backbone/body/body.0/body.0.1/Mul_output_0``: ``backbone.body.0.1``."""
    found, before = "", ""
    for part in value.split("/")[1:-1]:
        inner = part.removeprefix(f"{before}.")
        names = (part, inner, part.rpartition("_")[0], inner.rpartition("_")[0])
        joined = [f"{found}.{name}".strip(".") for name in names if name]
        step = next((name for name in joined if name in modules and name != found), None)
        if step is None:
            break
        found, before = step, part
    return found
