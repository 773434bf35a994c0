"""Where two computations part: the first value, in the order of the graph, that differs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.utils import _pytree as pytree

from normswap.onnx.files import OnnxFile
from normswap.onnx.parity import Array, Divergence, relative_error
from normswap.onnx.program import Draft, modules_of
from normswap.onnx.session import Failed, Here, Runner
from normswap.onnx.subject import Subject, as_array, flat_tensors

SAME_KERNELS = 5e-6
"""Two files run by the same kernels on the same inputs: any difference beyond this is an edit."""


def against_file(
    file: OnnxFile, good: Draft, inputs: Sequence[Array], runner: Runner
) -> Divergence | None:
    """The first node of ``file`` whose output is not the one of the freshly exported ``good``."""
    right = node_values(good.file, inputs, Here())
    wrong = node_values(file, inputs, runner)
    owners = {name: node for node in good.file.proto.graph.node for name in node.output}
    if isinstance(right, Failed):
        return None
    if isinstance(wrong, Failed):
        return _from_message(file, wrong.message, owners)
    return _first(file.proto, wrong, right, owners, SAME_KERNELS)


def against_program(
    draft: Draft, inputs: Sequence[Array], subject: Subject, tolerance: float
) -> Divergence | None:
    """The first node of a fresh file whose output is not the one of the exported program."""
    found = node_values(draft.file, inputs, Here())
    owners = {name: node for node in draft.file.proto.graph.node for name in node.output}
    if isinstance(found, Failed):
        return _from_message(draft.file, found.message, owners)
    return _first(
        draft.file.proto, found, program_values(draft, inputs, subject), owners, tolerance
    )


def _first(
    proto: onnx.ModelProto,
    found: Mapping[str, Array],
    right: Mapping[str, Array],
    owners: Mapping[str, onnx.NodeProto],
    limit: float,
) -> Divergence | None:
    fallback: Divergence | None = None
    for node in proto.graph.node:
        for name in node.output:
            if name not in found or name not in right:
                continue
            error = relative_error(found[name], right[name])
            if error > limit:
                return _divergence(node, owners.get(name), error, found[name], right[name])
            if error > 0 and fallback is None:
                fallback = _divergence(node, owners.get(name), error, found[name], right[name])
    return fallback


def _divergence(
    node: onnx.NodeProto, good: onnx.NodeProto | None, error: float, found: Array, right: Array
) -> Divergence:
    modules = modules_of(good) if good is not None else modules_of(node)
    modules = modules or modules_of(node) or ("",)
    detail = ""
    if found.shape != right.shape:
        detail = f"shape {list(found.shape)} where {list(right.shape)} is right"
    elif good is not None and good.op_type != node.op_type:
        detail = f"{node.op_type} where {good.op_type} is right"
    elif found.dtype.kind == "f" and not np.isfinite(found).all():
        detail = "NaN or Inf"
    return Divergence(modules[0], modules, node.name or None, node.op_type, error, detail)


def _from_message(
    file: OnnxFile, message: str, owners: Mapping[str, onnx.NodeProto]
) -> Divergence | None:
    """The node that onnxruntime names in its error."""
    named = re.findall(r"[Nn]ode[^'(\"]{0,20}['(\"]+([^'()\"]+)['\")]", message)
    for node in file.proto.graph.node:
        if node.name and node.name in named:
            good = next((owners[name] for name in node.output if name in owners), node)
            modules = modules_of(good) or modules_of(node) or ("",)
            return Divergence(modules[0], modules, node.name, node.op_type, None, message)
    return None


def node_values(
    file: OnnxFile, inputs: Sequence[Array], runner: Runner
) -> dict[str, Array] | Failed:
    """Every value of a graph, run with optimisations off so that no node is fused away."""
    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    known = {value.name for value in proto.graph.output}
    names = [value.name for value in proto.graph.output]
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in known:
                proto.graph.output.add().name = name
                known.add(name)
                names.append(name)
    with tempfile.NamedTemporaryFile(
        dir=file.folder, prefix=f".{file.path.name}.", suffix=".onnx", delete=False
    ) as stream:
        opened = Path(stream.name)
    try:
        opened.write_bytes(proto.SerializeToString())
        found = runner.run(opened, "off", [list(inputs)])[0]
    finally:
        opened.unlink(missing_ok=True)
    return found if isinstance(found, Failed) else dict(zip(names, found, strict=True))


class _Recorder(torch.fx.Interpreter):
    """Runs a program and keeps every value under its node's name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, torch.Tensor):
            self.values[n.name] = as_array(result.clone())
        return result


def program_values(draft: Draft, inputs: Sequence[Array], subject: Subject) -> dict[str, Array]:
    """Every value of the exported program, under the names that the ONNX graph uses for them."""
    module = draft.program.module()
    recorder = _Recorder(module)
    args, kwargs = subject.signature.bind(inputs)
    leaves = list(pytree.tree_leaves((args, kwargs)))
    with torch.no_grad():
        result = recorder.run(*leaves)
    tensors = flat_tensors(result)
    outputs = [value.name for value in draft.file.proto.graph.output]
    named = dict(zip(outputs, (as_array(tensor) for tensor in tensors), strict=False))
    return recorder.values | named
