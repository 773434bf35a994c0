"""Numbers that no trained network holds, and channels that died; looked for once, at the source."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normswap.errors import ImpossibleNumbersError
from normswap.graph.norms import is_batchnorm, state_of

_ENDLESS = "numbers that are not finite"
_DEAD = 1e-6  # of ε: the channel's output is β, whatever its input was in training


def impossible_numbers(model: nn.Module) -> dict[str, str]:
    """Parameters and running statistics that nothing can be computed with, and why.

    Masks and other buffers may hold infinity, so of the buffers BatchNorm's alone are looked at.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> _ = norm.running_var.fill_(-1.0)
        >>> impossible_numbers(nn.Sequential(norm))
        {'0.running_var': 'a negative variance'}
    """
    endless = {name: _ENDLESS for name, p in model.named_parameters() if not _finite(p)}
    return endless | impossible_statistics(model)


def impossible_statistics(model: nn.Module) -> dict[str, str]:
    """Running statistics of BatchNorms that no arithmetic survives, and why."""
    return {
        name: what
        for prefix, module in model.named_modules()
        if is_batchnorm(module)
        for name, what in _of_one(prefix, module)
    }


def _of_one(prefix: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    state = state_of(module)
    for tensor in (state.mean, state.var):
        if tensor is None or tensor.is_meta:
            continue
        if not _finite(tensor):
            yield _name(module, prefix, tensor), _ENDLESS
        elif tensor is state.var and bool((tensor < 0).any()):
            yield _name(module, prefix, tensor), "a negative variance"


def _name(module: nn.Module, prefix: str, tensor: Tensor) -> str:
    own = next((name for name, value in module.named_buffers() if value is tensor), "statistics")
    return f"{prefix}.{own}" if prefix else own


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.detach()).all())


def check_numbers(model: nn.Module) -> None:
    """Raise unless a model's weights and running statistics are numbers that one can work with.

    Raises:
        ImpossibleNumbersError: they are not; the text names the layers.
    """
    found = impossible_numbers(model)
    if not found:
        return
    (first, what), *rest = found.items()
    named = ", ".join(name for name, _ in rest[:3])
    more = f" (and in {len(rest)} more: {named}{', …' if len(rest) > 3 else ''})" if rest else ""
    raise ImpossibleNumbersError(
        first,
        got=what + more,
        need="finite weights and statistics, and variances of 0 or more",
        hint="other weights; --allow-nonfinite (allow_nonfinite=True) takes these to look at them",
    )


def dead_channels(norm: nn.Module) -> int:
    """How many channels of a BatchNorm never varied while its statistics were taken."""
    state = state_of(norm)
    if state.var is None or state.var.is_meta:
        return 0
    return int((state.var < _DEAD * state.eps).sum())
