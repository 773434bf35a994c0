"""From a model to an ONNX file by torch's exporter, kept quiet, with names that tell modules."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from normswap.errors import ExportError, in_short
from normswap.onnx.file.parsing import OnnxFile, read_onnx, save
from normswap.onnx.subject import Subject
from normswap.onnx.writing.draft import Draft as Draft
from normswap.onnx.writing.draft import Options as Options
from normswap.onnx.writing.draft import label, modules_of, quiet
from normswap.onnx.writing.forms import fastest
from normswap.onnx.writing.half import inside, to_half
from normswap.onnx.writing.staged import stage
from normswap.onnx.writing.traced import write_traced

ONE_FILE_BYTES = (1 << 31) - (1 << 24)
"""Weights up to here stay inside the file; protobuf ends at 2 GB."""


def write_program(subject: Subject, path: Path, options: Options) -> Draft:
    """Export with torch's dynamo exporter, one file below 2 GB and external data above.

    Detectors go to torch's older exporter, which traces: this one refuses them.

    Raises:
        ExportError: torch cannot export the model; its own first line is quoted.
    """
    if subject.detector:
        return write_traced(subject, path, options)
    signature, shapes = subject.signature, _dynamic_shapes(subject, options)
    if not options.static_batch and signature.batch is not None and signature.batch < 2:
        signature = signature.with_rows(2)  # torch.export takes a batch of 1 for a constant
    args, kwargs = signature.call
    try:
        with quiet():
            exported = torch.onnx.export(
                subject.model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=options.opset,
                input_names=list(subject.inputs) or None,
                output_names=list(subject.outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
            assert exported is not None
            assert exported.exported_program is not None
            exported.save(path, external_data=_bytes_of(subject.model) > ONE_FILE_BYTES)
    except Exception as error:
        raise _cannot_export(subject.model, error, options) from error
    file = read_onnx(path)
    _label_nodes(file.proto, subject.model)
    fastest(file.proto)
    staged = stage(file.proto) if options.staged else 0
    if options.half:
        _narrow(file, subject)
    save(file)
    return Draft(file, exported.exported_program, options, staged)


def _narrow(file: OnnxFile, subject: Subject) -> None:
    if file.reaches_out:
        raise ExportError(
            type(subject.model).__name__,
            got="more than 2 GB of weights with half=True",
            need="a model that fits into one file",
            hint="leaving --half out (half=False)",
        )
    norms = inside(subject.norms, subject.model)
    wide = {
        name
        for node in file.proto.graph.node
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm")  # a BN was folded into these
        and norms & set(modules_of(node))
        for name in node.output
    }
    to_half(file.proto, frozenset(wide))


def _dynamic_shapes(subject: Subject, options: Options) -> dict[str, Any] | None:
    if options.static_batch and not options.dynamic_size:
        return None
    signature = subject.signature
    axes = {
        name: torch.export.Dim(name) for name in ("batch", "depth", "height", "width", "length")
    }
    specs: list[_Spec] = []  # wrapped: pytree must not look into the dicts
    for item in signature.inputs:
        spec: dict[int, Any] = {}
        if item.rows and not options.static_batch:
            spec[0] = axes["batch"]
        if options.dynamic_size:
            spec |= {2 + i: axes[name] for i, name in enumerate(item.axes)}
        specs.append(_Spec(spec or None))
    args, kwargs = signature.with_leaves(specs).call
    bound = inspect.signature(subject.model.forward).bind(*args, **kwargs).arguments
    shapes: dict[str, Any] = pytree.tree_map(
        lambda leaf: leaf.axes if isinstance(leaf, _Spec) else None, dict(bound)
    )
    return shapes


@dataclass(frozen=True)
class _Spec:
    axes: dict[int, Any] | None


def _bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _cannot_export(model: nn.Module, error: Exception, options: Options) -> ExportError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    hint = "a model without data-dependent control flow"
    if not options.static_batch:
        hint = "--static-batch (static_batch=True), or " + hint
    if options.dynamic_size:
        hint = "leaving --dynamic-size out (dynamic_size=False), or " + hint
    return ExportError(
        type(model).__name__,
        got=f"{type(cause).__name__} from torch's own exporter: {in_short(cause)}",
        need="a model that torch.onnx.export can take",
        hint=hint,
    )


def _label_nodes(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Keep the modules a node computes; drop stack traces, which hold paths of this machine."""
    modules = dict(model.named_modules())
    previous = ""
    for node in proto.graph.node:
        facts = {entry.key: entry.value for entry in node.metadata_props}
        previous = _scope(facts, modules, previous)
        label(node, modules, previous)
        if "namespace" in facts:
            node.metadata_props.add(key="namespace", value=facts["namespace"])
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]


def _scope(facts: dict[str, str], modules: dict[str, nn.Module], previous: str) -> str:
    try:
        scopes = ast.literal_eval(facts.get("pkg.torch.onnx.name_scopes", ""))
    except (ValueError, SyntaxError):
        return previous  # a node that the exporter's optimiser made: its neighbour's module
    for scope in reversed(scopes):
        name = str(scope).partition("@")[0]
        if name in modules:
            return name
    return previous
