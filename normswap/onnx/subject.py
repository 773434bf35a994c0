"""The model under proof: a copy in eval mode, its inputs as flat arrays, its outputs with names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from normswap.copying import copied
from normswap.errors import ExportError, in_short
from normswap.graph.norms import is_norm
from normswap.layers import fold_weights
from normswap.onnx.file.detections import detects
from normswap.onnx.file.parity import Array

_AXES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}


@dataclass(frozen=True)
class Input:
    """One tensor that a model takes.

    Attributes:
        example: its values; bfloat16, which numpy lacks, as float32.
        dtype: torch's name for its kind of number.
        rows: whether its first axis is the batch.
        axes: names of the axes after batch and channels, for images alone.
    """

    example: Array
    dtype: torch.dtype
    rows: bool
    axes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the example."""
        return self.example.shape


@dataclass(frozen=True)
class Signature:
    """How a model is called.

    Attributes:
        leaves: every leaf of (args, kwargs), tensors on the CPU.
        spec: how the leaves nest.
        batch: rows of the example inputs; None if no tensor has any.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    batch: int | None

    @functools.cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The leaves that are tensors: the inputs of the ONNX graph, in order."""
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        return tuple(_input(tensor, self.batch) for tensor in tensors)

    @property
    def examples(self) -> list[Array]:
        """The example inputs."""
        return [item.example for item in self.inputs]

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the example."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def bind(self, arrays: Sequence[Array]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with other tensors in place of the examples."""
        pairs = zip(arrays, self.inputs, strict=True)
        return self.with_leaves([_as_tensor(array, item.dtype) for array, item in pairs]).call

    def with_leaves(self, values: Sequence[Any]) -> Signature:
        """The same call with anything in place of the example tensors."""
        fresh = iter(values)
        leaves = [next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        return replace(self, leaves=tuple(leaves))

    def with_rows(self, rows: int) -> Signature:
        """The same call with the examples repeated or cut to ``rows``."""
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        cut = [
            torch.cat([leaf] * -(-rows // max(1, leaf.shape[0])))[:rows] if item.rows else leaf
            for leaf, item in zip(tensors, self.inputs, strict=True)
        ]
        return replace(self.with_leaves(cut), batch=rows)


def _input(tensor: torch.Tensor, batch: int | None) -> Input:
    rows = batch is not None and tensor.ndim > 0 and tensor.shape[0] == batch
    axes = _AXES.get(tensor.ndim, ()) if rows and tensor.is_floating_point() else ()
    return Input(as_array(tensor), tensor.dtype, rows, axes)


def signature_of(example_inputs: Any) -> Signature:
    """Flatten example inputs.

    A tuple is the positional arguments, a dict the keyword arguments, anything else one
    positional argument.

    Raises:
        ExportError: no tensor among them.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    plain = tuple(
        torch.as_tensor(leaf).detach().cpu()
        if isinstance(leaf, torch.Tensor | np.ndarray)
        else leaf
        for leaf in leaves
    )
    tensors = [leaf for leaf in plain if isinstance(leaf, torch.Tensor)]
    if not tensors or any(tensor.device.type == "meta" for tensor in tensors):
        raise ExportError(
            "example_inputs",
            got=type(example_inputs).__name__ if not tensors else "tensors on the meta device",
            need="at least one tensor with values",
            hint="torch.randn(2, 3, 224, 224)",
        )
    ranked = [tensor for tensor in tensors if tensor.ndim >= 2] or tensors
    batch = int(ranked[0].shape[0]) if ranked[0].ndim else None
    return Signature(plain, spec, batch)


def _as_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of ``as_array``; what was widened beyond float32 stays so."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    narrow = dtype == torch.bfloat16 and tensor.dtype == torch.float32
    return tensor.to(dtype) if narrow else tensor


def as_array(tensor: torch.Tensor) -> Array:
    """A numpy copy of a tensor; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.resolve_conj().numpy()


@dataclass(frozen=True)
class Subject:
    """A model that is ready for export and proof.

    Attributes:
        model: a copy in eval mode on the CPU; the caller's model stays as it is.
        signature: how it is called.
        outputs: names of its output tensors.
        inputs: names of its input tensors.
        norms: names of its normalisers.
        detector: it takes one image, and its outputs are one row per detection.
        spare: further example images of a detector.
    """

    model: nn.Module
    signature: Signature
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    detector: bool = False
    spare: tuple[Array, ...] = ()

    def named(self, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Subject:
        """The same with other names in the file; None keeps those that it has.

        Raises:
            ExportError: not as many as there are tensors, or one that is no name or stands twice.
        """
        mine = _names("input names", inputs, len(self.signature.inputs)) or self.inputs
        theirs = _names("output names", outputs, len(self.outputs)) or self.outputs
        both = set(mine) & set(theirs)
        if both:
            raise ExportError(
                "input and output names",
                got=f"{min(both)!r} for an input and an output",
                need="other names",
                hint="image and logits",
            )
        return replace(self, inputs=mine, outputs=theirs)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """The outputs in the model's own precision."""
        args, kwargs = self.signature.bind(arrays)
        with torch.no_grad():
            return [as_array(tensor) for tensor in flat_tensors(self.model(*args, **kwargs))]

    def in_double(self) -> Subject | None:
        """The same model in float64; None if it cannot run in it."""
        double = replace(self, model=copied(self.model).double())
        try:
            double.run_double(self.signature.with_rows(1).examples)
        except (RuntimeError, TypeError, ValueError):
            return None
        return double

    def run_double(self, arrays: Sequence[Array]) -> list[Array]:
        """The outputs of a float64 model, its floating-point inputs widened."""
        wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
        return self.run(wide)


def flat_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def subject_of(model: nn.Module, example_inputs: Any) -> Subject:
    """Copy a model to the CPU, in eval mode, and run it once to learn its outputs.

    Raises:
        ExportError: a model that cannot be copied or run, or without tensors among its outputs.
    """
    signature = signature_of(example_inputs)
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values()):
        raise ExportError(
            type(model).__name__,
            got="parameters on the meta device",
            need="weights",
            hint="loading a checkpoint first",
        )
    try:
        ready = fold_weights(copied(model).cpu().eval().requires_grad_(requires_grad=False))
        args, kwargs = signature.call
        with torch.no_grad():
            output = ready(*args, **kwargs)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        NotImplementedError,
        AttributeError,
        AssertionError,
    ) as error:
        raise ExportError(
            type(model).__name__,
            got=f"{type(error).__name__} from its own forward in eval mode: {in_short(error)}",
            need="a model that runs on them",
            hint="other example_inputs",
        ) from error
    found = (_detector if _gives_detections(output) else _network)(ready, signature, output)
    norms = tuple(name for name, module in ready.named_modules() if is_norm(module))
    return replace(found, norms=norms)


def _network(ready: nn.Module, signature: Signature, output: Any) -> Subject:
    """A model whose outputs are numbers in an order."""
    names = output_names(output)
    if not names:
        raise ExportError(
            type(ready).__name__,
            got=f"an output of type {type(output).__name__} without tensors",
            need="a tensor, or a list, tuple or dict of tensors",
            hint="a wrapper that returns tensors",
        )
    inputs = _input_names(signature)
    if inputs and _are_logits(output, signature):
        names = ["logits"]
    taken = {*inspect.signature(ready.forward).parameters, *inputs}
    outputs = tuple(f"{n}_out" if n in taken else n for n in names)
    return Subject(ready, signature, outputs, inputs)


def _gives_detections(output: Any) -> bool:
    """Whether an output is torchvision's form of detections: a list of dicts, one per image."""
    return (
        isinstance(output, list | tuple)
        and len(output) > 0
        and all(isinstance(item, dict) and detects(tuple(item)) for item in output)
    )


def _detector(ready: nn.Module, signature: Signature, output: Any) -> Subject:
    """A detector with the first of its example images; a traced graph has one image."""
    inputs, (_, kwargs) = signature.inputs, signature.call
    listed = len(inputs) > 0 and all(len(item.shape) == 3 for item in inputs)
    stacked = len(inputs) == 1 and len(inputs[0].shape) == 4
    if not (listed or stacked) or kwargs or len(inputs) != len(signature.leaves):
        raise ExportError(
            type(ready).__name__,
            got="a detector that is called with more than images",
            need="example_inputs that are a list of images",
            hint="[torch.rand(3, 320, 320)]",
        )
    leaves = signature.leaves
    images = leaves if listed else [part[None] for part in leaves[0]]
    first = signature_of([images[0]] if listed else images[0])
    return Subject(
        ready,
        replace(first, batch=None),
        tuple(str(key) for key in output[0]),
        ("image",),
        detector=True,
        spare=tuple(as_array(image) for image in images[1:]),
    )


def _input_names(signature: Signature) -> tuple[str, ...]:
    """``image`` where that is all a model takes."""
    axes = [item.axes for item in signature.inputs]
    return ("image",) if axes == [_AXES[4]] else ()


def _are_logits(output: Any, signature: Signature) -> bool:
    """Whether an output is one row of numbers per image."""
    return (
        isinstance(output, torch.Tensor)
        and output.ndim == 2
        and signature.batch is not None
        and output.shape[0] == signature.batch
    )


def _names(argument: str, given: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """Names that somebody gave, checked.

    Raises:
        ExportError: not as many as there are tensors, or one that is no name.
    """
    if given is None:
        return None
    names = (given,) if isinstance(given, str) else tuple(given)
    bad = [name for name in names if not str(name).isidentifier() or names.count(name) > 1]
    if len(names) != count or bad:
        raise ExportError(
            argument,
            got=repr(bad[0]) if bad else f"{len(names)} for {count}",
            need="one name for each tensor, each another, of letters, digits and underscores",
            hint=", ".join(("image", "mask", "scale")[:count]) or "none",
        )
    return names


def output_names(output: Any) -> list[str]:
    """One unique name per tensor: ``output``, ``output_0``…, or the keys of a dict."""
    names: list[str] = []
    for path, leaf in pytree.tree_leaves_with_path(output):
        if not isinstance(leaf, torch.Tensor):
            continue
        parts = [_key(entry) for entry in path]
        name = "_".join(parts) if parts and not parts[0].isdigit() else "_".join(["output", *parts])
        while name in names:
            name += "_"
        names.append(name)
    return names


def _key(entry: Any) -> str:
    for field in ("key", "idx", "name"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)
