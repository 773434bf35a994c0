"""Why a proof failed, and where: the first value, in the order of the graph, that differs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from normswap.graph.norms import is_batchnorm, state_of
from normswap.onnx.file.parity import MARGIN, Array, Case, Divergence, relative_error
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.session import Failed, Here, Runner
from normswap.onnx.file.variants import with_outputs, written
from normswap.onnx.subject import Subject, as_array, flat_tensors
from normswap.onnx.writing.draft import Draft, modules_of

SAME_KERNELS = 5e-6
"""Two files run by the same kernels on the same inputs: any difference beyond this is an edit."""


def excuse(model: nn.Module, cases: Sequence[Case], bad: Case) -> str | None:
    """Why it is the network and not the file that failed; None where nothing says so.

    Args:
        model: the network.
        cases: of the proof.
        bad: the first that failed.
    """
    return _batch_statistics(model, bad) or _sensitive(cases)


def _batch_statistics(model: nn.Module, bad: Case) -> str | None:
    """Why a sample's output depends on the others of its batch, where a norm makes it do so."""
    if bad.stage != "row independence":
        return None
    untracked = [
        name or "the model"
        for name, module in model.named_modules()
        if is_batchnorm(module) and state_of(module).mean is None
    ]
    if not untracked:
        return None
    return (
        f"{', '.join(untracked[:3])}: a BatchNorm without running statistics "
        "(track_running_stats=False) normalises by the batch's own, so that a sample's output "
        "depends on the others in its batch; replace it, or train it with running statistics"
    )


def _sensitive(cases: Sequence[Case]) -> str | None:
    """That torch is as far from float64 as the file, where that alone is what failed."""
    errors: dict[str, float] = {}
    for case in cases:
        errors[case.output] = max(case.torch_error, errors.get(case.output, 0.0))
    bad = [case for case in cases if not case.passed]
    if any(case.problem or case.error > MARGIN * errors[case.output] for case in bad):
        return None
    worst = max(errors[case.output] for case in bad)
    return (
        f"this is the network and not the file: torch's own run is {worst:.1e} from float64 on "
        "such inputs, and the file is no further away than rounding explains"
    )


def against_file(
    file: OnnxFile, good: Draft, inputs: Sequence[Array], runner: Runner
) -> Divergence | None:
    """The first node of ``file`` whose output is not the one of the freshly exported ``good``."""
    right = node_values(good.file, inputs, Here())
    if isinstance(right, Failed):
        return None
    pair = _Pair(file.proto, right, _owners(good.file.proto))
    wrong = node_values(file, inputs, runner)
    if isinstance(wrong, Failed):
        return pair.named_in(wrong.message) or _other_inputs(file.proto, good.file.proto)
    return pair.first(wrong, SAME_KERNELS)


def against_program(
    draft: Draft, inputs: Sequence[Array], subject: Subject, tolerance: float
) -> Divergence | None:
    """The first node of a fresh file whose output is not the one of the exported program."""
    if draft.program is None:
        return None
    try:
        right = program_values(draft, inputs, subject)
    except (RuntimeError, AssertionError, TypeError, ValueError):
        return None  # the program itself does not take these inputs: a batch size that is fixed
    pair = _Pair(draft.file.proto, right, _owners(draft.file.proto))
    found = node_values(draft.file, inputs, Here())
    if isinstance(found, Failed):
        return pair.named_in(found.message)
    return pair.first(found, tolerance, other_kernels=True)


def _owners(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in proto.graph.node for name in node.output if name}


@dataclass(frozen=True)
class _Pair:
    """A graph in doubt beside the right values.

    Attributes:
        proto: the graph in doubt.
        right: every right value, by name.
        owners: the node of the right graph that makes a value.
    """

    proto: onnx.ModelProto
    right: Mapping[str, Array]
    owners: Mapping[str, onnx.NodeProto]

    def first(
        self, found: Mapping[str, Array], limit: float, *, other_kernels: bool = False
    ) -> Divergence | None:
        """The first node beyond ``limit``; failing that, the first that differs at all.

        Between other kernels everything differs a little, which then says nothing.
        """
        slight: Divergence | None = None
        for node in self.proto.graph.node:
            for name in node.output:
                if name not in found or name not in self.right:
                    continue
                error = _difference(found[name], self.right[name])
                if error > limit:
                    return self.divergence(node, name, found[name], error)
                if error > 0 and slight is None and not other_kernels:
                    slight = self.divergence(node, name, found[name], error)
        return slight

    def divergence(self, node: onnx.NodeProto, name: str, value: Array, error: float) -> Divergence:
        """What is to be said of a node whose output is wrong."""
        good, smuggled = self.owners.get(name), self.smuggled(node)
        detail = ""
        if smuggled is not None:
            detail = f"behind a {smuggled.op_type} that the model does not have"
        elif value.shape != self.right[name].shape:
            detail = f"shape {list(value.shape)} where {list(self.right[name].shape)} is right"
        elif good is not None and good.op_type != node.op_type:
            detail = f"{node.op_type} where {good.op_type} is right"
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            detail = "NaN or Inf"
        modules = self.modules(node)
        renamed = smuggled is not None and good is not None and good.op_type == smuggled.op_type
        if smuggled is not None and not renamed:  # the fault is between the two: name both
            upstream = [m for i in smuggled.input if i in self.owners for m in self.of_value(i)]
            modules = tuple(dict.fromkeys([*upstream, *modules]))
        return Divergence(modules[0], modules, node.name or None, node.op_type, error, detail)

    def of_value(self, name: str) -> tuple[str, ...]:
        """The modules that make a value in the right graph."""
        return modules_of(self.owners[name]) if name in self.owners else ()

    def modules(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """The modules of a node; the right graph's word counts, the doubtful file's comes last."""
        for name in node.output:
            if self.of_value(name):
                return self.of_value(name)
        return modules_of(node) or ("",)

    def smuggled(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The node that makes an input of ``node`` which the right graph does not have."""
        makers = _owners(self.proto)
        for name in node.input:
            if name in makers and name not in self.right and name not in self.owners:
                return makers[name]
        return None

    def named_in(self, message: str) -> Divergence | None:
        """The node that onnxruntime names in an error."""
        names = re.findall(r"[Nn]ode[^'(\"]{0,20}['(\"]+([^'()\"]+)['\")]", message)
        for node in self.proto.graph.node:
            if node.name and node.name in names:
                modules = self.modules(node)
                return Divergence(modules[0], modules, node.name, node.op_type, None, message)
        return None


def _other_inputs(proto: onnx.ModelProto, good: onnx.ModelProto) -> Divergence | None:
    """An input of the graph whose axes are not the right ones."""
    for mine, right in zip(proto.graph.input, good.graph.input, strict=False):
        if _axes(mine) != _axes(right):
            detail = f"input {mine.name!r} has axes {_axes(mine)} where {_axes(right)} is right"
            return Divergence("", ("",), None, None, None, detail)
    return None


def _axes(value: onnx.ValueInfoProto) -> list[str | int]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


def _difference(value: Array, right: Array) -> float:
    if value.shape == right.shape and np.array_equal(
        value, right, equal_nan=value.dtype.kind == "f"
    ):
        return 0.0  # a mask may hold infinities on purpose
    return relative_error(value, right)


def node_values(
    file: OnnxFile, inputs: Sequence[Array], runner: Runner
) -> dict[str, Array] | Failed:
    """Every value of a graph, run with optimisations off so that no node is fused away."""
    names = dict.fromkeys(value.name for value in file.proto.graph.output)
    made = dict.fromkeys(n for node in file.proto.graph.node for n in node.output if n)
    inner = [name for name in made if name not in names]
    with written(file, with_outputs(file.proto, inner)) as path:
        found = runner.run(path, ["off"], [list(inputs)])[0][0]
    return found if isinstance(found, Failed) else dict(zip([*names, *inner], found, strict=True))


class _EveryValue(torch.fx.Interpreter):
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
    assert draft.program is not None
    module = draft.program.module()
    run = _EveryValue(module)
    args, kwargs = subject.signature.bind(inputs)
    leaves = list(pytree.tree_leaves((args, kwargs)))
    with torch.no_grad():
        result = run.run(*leaves)
    tensors = flat_tensors(result)
    outputs = [value.name for value in draft.file.proto.graph.output]
    named = dict(zip(outputs, (as_array(tensor) for tensor in tensors), strict=False))
    return run.values | named
