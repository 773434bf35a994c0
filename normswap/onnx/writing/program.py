"""From a model to an ONNX file by torch's exporter, kept quiet, with names that tell modules."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from normswap.errors import ExportError, in_short
from normswap.onnx.file.parsing import OnnxFile, is_external, read_onnx, save, tensors
from normswap.onnx.subject import Subject
from normswap.onnx.writing.forms import fastest
from normswap.onnx.writing.half import norm_names, to_half
from normswap.onnx.writing.staged import stage

ONE_FILE_BYTES = (1 << 31) - (1 << 24)
"""Weights up to here stay inside the file; protobuf ends at 2 GB."""

MODULES_KEY = "normswap.modules"
MIN_OPSET, MAX_OPSET = 18, 23


@dataclass(frozen=True)
class Options:
    """What shapes the graph.

    Attributes:
        opset: version of the default operator set.
        static_batch: the batch axis has the size of the example inputs.
        dynamic_size: height and width may vary as well.
        half: weights and activations in float16, norms in float32.
        staged: the means of norms are taken in stages, which is slower and more exact.
    """

    opset: int = 20
    static_batch: bool = False
    dynamic_size: bool = False
    half: bool = False
    staged: bool = False


@dataclass(frozen=True)
class Draft:
    """A file that has not been proven.

    Attributes:
        file: the file.
        program: what torch.export made of the model on the way; it can be run.
        options: how it was written.
        staged: norms whose means are taken in stages.
    """

    file: OnnxFile
    program: torch.export.ExportedProgram
    options: Options
    staged: int = 0


def write_program(subject: Subject, path: Path, options: Options) -> Draft:
    """Export with torch's dynamo exporter, one file below 2 GB and external data above.

    Raises:
        ExportError: torch cannot export the model; its own first line is quoted.
    """
    signature = subject.signature
    if not options.static_batch and signature.batch is not None and signature.batch < 2:
        signature = signature.with_rows(2)  # torch.export takes a batch of 1 for a constant
    args, kwargs = signature.bind_leaves(signature.tensors)
    try:
        with quiet():
            exported = torch.onnx.export(
                subject.model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=options.opset,
                output_names=list(subject.outputs),
                dynamic_shapes=_dynamic_shapes(subject, options),
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
        _narrow(file, subject.model)
    save(file)
    return Draft(file, exported.exported_program, options, staged)


def _narrow(file: OnnxFile, model: nn.Module) -> None:
    if any(is_external(tensor) for tensor in tensors(file.proto)):
        raise ExportError(
            type(model).__name__,
            got="more than 2 GB of weights with half=True",
            need="a model that fits into one file",
            hint="half=False",
        )
    norms = norm_names(model)
    wide = {
        name
        for node in file.proto.graph.node
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm")  # a BN was folded into these
        and norms & set(modules_of(node))
        for name in node.output
    }
    to_half(file.proto, frozenset(wide))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter: it prints to stdout, logs, and warns of its own internals."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _dynamic_shapes(subject: Subject, options: Options) -> dict[str, Any] | None:
    if options.static_batch and not options.dynamic_size:
        return None
    signature = subject.signature
    axes = {
        name: torch.export.Dim(name) for name in ("batch", "depth", "height", "width", "length")
    }
    specs: list[dict[int, Any] | None] = []
    for tensor in signature.tensors:
        spec: dict[int, Any] = {}
        if signature.has_rows(tensor) and not options.static_batch:
            spec[0] = axes["batch"]
        if options.dynamic_size:
            spec |= {2 + i: axes[name] for i, name in enumerate(signature.spatial(tensor))}
        specs.append(spec or None)
    args, kwargs = signature.bind_leaves(
        [_Spec(spec) for spec in specs]  # wrapped: pytree must not look into the dicts
    )
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
        hint = "static_batch=True, or " + hint
    if options.dynamic_size:
        hint = "dynamic_size=False, or " + hint
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
        scope = _scope(facts, modules, previous)
        owners = [name.rpartition(".")[0] for name in node.input if "." in name]
        names = dict.fromkeys([o for o in owners if o in modules and o] + [scope])
        del node.metadata_props[:]
        entry = node.metadata_props.add()
        entry.key, entry.value = MODULES_KEY, ",".join(names)
        if "namespace" in facts:
            entry = node.metadata_props.add()
            entry.key, entry.value = "namespace", facts["namespace"]
        previous = scope
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


def modules_of(node: onnx.NodeProto) -> tuple[str, ...]:
    """The modules that a node computes, the convolution before the BN folded into it."""
    for entry in node.metadata_props:
        if entry.key == MODULES_KEY:
            return tuple(entry.value.split(","))
    return ()
