"""Run a model on the meta device: shapes without arithmetic, and quickly.

torch computes the shape of many simple operations by decomposing them in Python, which costs more
than building the model. The commonest of them keep their first input's shape and dtype, which no
release can change, and take a short way here. Strides are torch's own business and do change from
release to release, so a tensor that is not plainly contiguous always takes torch's way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_META = torch.device("meta")
_FACTORIES = frozenset(_device_constructors())  # what torch.device(...) as a context acts on
_ACTIVATIONS = frozenset(
    {F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.hardtanh, F.silu, F.mish, F.leaky_relu, F.elu}
)
_NORMS = frozenset({F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm})
_OTHERS = frozenset(
    {F.gelu, F.sigmoid, torch.relu, torch.sigmoid, torch.tanh}
    | {Tensor.relu, Tensor.sigmoid, Tensor.tanh}
)
_ARITHMETIC = frozenset(
    {torch.add, torch.mul, torch.sub, torch.div, Tensor.add, Tensor.mul, Tensor.sub, Tensor.div}
)


def run_on_meta(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a torch function; take the short way where there is one, and make tensors on meta."""
    if func in _FACTORIES and kwargs.get("device") is None:
        return func(*args, **{**kwargs, "device": "meta"})
    first = args[0] if args else None
    if _is_plain(first):
        if func in _ACTIVATIONS:
            inplace = kwargs.get("inplace", False) or any(a is True for a in args[1:])
            return torch.relu_(first) if inplace else first.new_empty(first.shape)
        if (
            func in _NORMS
            or func in _OTHERS
            or (func in _ARITHMETIC and not kwargs and _keeps_first(first, args[1:]))
        ):
            return first.new_empty(first.shape)  # four times as fast as empty_like
    if func is torch.cat and kwargs.keys() <= {"dim"}:
        joined = _joined(*args, **kwargs)
        return func(*args, **kwargs) if joined is None else args[0][0].new_empty(joined)
    if isinstance(func, FunctionType):
        with _META:  # it may make tensors itself
            return func(*args, **kwargs)
    return func(*args, **kwargs)


class OnMeta(TorchFunctionMode):
    """A context in which every torch function takes :func:`run_on_meta`'s way."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch in the place of ``func``."""
        return run_on_meta(func, args, kwargs or {})


def _joined(tensors: Any, dim: int = 0) -> list[int] | None:
    """Shape of ``torch.cat(tensors, dim)``, or None where that is not plain."""
    first = tensors[0]
    shape = list(first.shape)
    plain = all(
        t.is_meta and t.is_contiguous() and t.dtype == first.dtype and t.ndim == len(shape) > 0
        for t in tensors
    )
    if not plain:
        return None
    rests = {(*t.shape[:dim], *t.shape[dim:][1:]) for t in tensors}
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return shape if len(rests) == 1 else None


def _is_plain(x: Any) -> TypeGuard[Tensor]:
    """Whether ``x`` is a tensor of which a short way may make another."""
    return isinstance(x, Tensor) and x.is_meta and x.is_floating_point() and x.is_contiguous()


def like_first(*args: Any, **kwargs: Any) -> Tensor:
    """What any normaliser gives on the meta device: a tensor like its one input."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


def _keeps_first(first: Tensor, rest: tuple[Any, ...]) -> bool:
    """Whether arithmetic with the one operand in ``rest`` gives a tensor like ``first``."""
    if len(rest) != 1:
        return False
    other = rest[0]
    if not isinstance(other, Tensor):
        return isinstance(other, float | int)
    missing = first.ndim - other.ndim
    return (
        other.dtype == first.dtype
        and other.is_contiguous()
        and missing >= 0
        and all(b in (a, 1) for a, b in zip(first.shape[missing:], other.shape, strict=True))
    )


@contextmanager
def without_autocast() -> Iterator[None]:
    """Meanwhile ``torch.autocast(x.device.type)`` of a tensor on meta does nothing.

    Torch knows no autocast there and raises; nothing is computed there either.
    """
    original = torch.autocast.__init__

    @functools.wraps(original)
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            original(self, "cpu", enabled=False)
        else:
            original(self, device_type, *args, **kwargs)

    torch.autocast.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


def put_on_meta(modules: Iterable[nn.Module]) -> None:
    """Put tensors without memory in the place of the modules' own; the caller restores them.

    Raises:
        NotImplementedError: for TorchScript's modules, before anything has changed: their tensors
            lie where :func:`~normswap.graph.preserved.preserved` cannot reach them.
    """
    modules = list(modules)
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise NotImplementedError("a module of TorchScript keeps its own tensors")
    twins: dict[Tensor, Tensor] = {}
    for module in modules:
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for name, tensor, home in [(n, t, h) for h in held for n, t in h.items()]:
            if tensor is not None:
                if tensor not in twins:
                    twins[tensor] = _twin(tensor)
                home[name] = twins[tensor]


def _twin(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
