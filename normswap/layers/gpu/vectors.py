"""Arithmetic on (C,) vectors on a GPU, in one launch where torch takes a dozen or two.

None of it takes time on the device; launching it does, and at batch 2 nothing else counts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normswap.layers.gpu import vector_kernels as kernels
from normswap.layers.gpu.launching import (
    DTYPES,
    PLANS,
    CannotLaunchError,
    Kinds,
    Launch,
    are_usual,
    kind,
    on_device_of,
)
from normswap.layers.gpu.tiles import power_of_two

_BLOCK = 1024
_ELEMENTS = 1024  # of a program that joins
_MOST_ROWS = 256
_LARGEST = 2**31 - 1 - _BLOCK  # indices are 32-bit


def track(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    momentum: float | None,
    correction: float,
) -> bool:
    """Take a batch into the running statistics, as BatchNorm does; False if it is left undone.

    Args:
        mean: (C,), of the batch.
        variance: (C,), biased.
        running_mean: changed where the batch is finite.
        running_var: likewise.
        counter: of batches, or None; one more then.
        momentum: the weight of the batch; None for a cumulative average.
        correction: from the biased variance to the unbiased one.
    """
    kinds = kind(mean), kind(variance), kind(running_mean), kind(running_var)
    launch = _plan_track(len(mean), mean.get_device(), kinds, kind(counter), momentum is None)
    if launch is None:
        return False
    # without a counter a cumulative average is of this batch alone
    rate = 1.0 if momentum is None else float(momentum)
    try:
        with on_device_of(mean):
            launch(mean, variance, running_mean, running_var, counter, rate, float(correction))
    except CannotLaunchError:
        return False
    changed = [running_mean, running_var]
    torch.autograd.graph.increment_version(changed if counter is None else [*changed, counter])
    return True


@lru_cache(maxsize=PLANS)
def _plan_track(
    channels: int, device: int, kinds: Kinds, counter: tuple[Any, ...] | None, cumulative: bool
) -> Launch | None:
    if not are_usual(kinds, device) or not _are_float32(kinds[:2]):
        return None
    if counter is not None and counter != (torch.int64, device, (), True):
        return None
    constants = channels, min(_BLOCK, power_of_two(channels)), cumulative and counter is not None
    return Launch(kernels.track, 1, constants, 4)


def join(
    mean: Tensor, shift: Tensor, variances: Tensor, here: int, rule: str
) -> tuple[list[Tensor], list[Tensor]] | None:
    """CBN's window: μ̄, σ̄² and the part of one batch; shares, deviations and grows of all.

    Args:
        mean: (C,), of the present batch.
        shift: (k, C), means less ``mean``.
        variances: (k, C).
        here: the present batch's row.
        rule: ``"max"`` or ``"drop"``.
    """
    rows, channels = shift.shape
    strides = (*shift.stride(), *variances.stride())
    dtypes = shift.dtype, variances.dtype
    launch = _plan_join(rows, channels, mean.get_device(), kind(mean), strides, dtypes, here, rule)
    if launch is None:
        return None
    window, entries = mean.new_empty((3, channels)), mean.new_empty((3, rows, channels))
    try:
        with on_device_of(mean):
            launch(mean, shift, variances, window, entries)
    except CannotLaunchError:
        return None
    return list(window.unbind()), list(entries.unbind())


@lru_cache(maxsize=PLANS)
def _plan_join(
    rows: int,
    channels: int,
    device: int,
    mean: tuple[Any, ...] | None,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    here: int,
    rule: str,
) -> Launch | None:
    if not are_usual((mean,), device) or not _are_float32((mean,)) or rows > _MOST_ROWS:
        return None
    if dtypes != (torch.float32, torch.float32):
        return None
    deep = power_of_two(rows)
    wide = min(power_of_two(channels), max(16, _ELEMENTS // deep))
    constants = here, rows, channels, *strides, deep, wide, rule == "drop"
    return Launch(kernels.join, -(-channels // wide), constants, 4)


def forget(room: Tensor, patch: Tensor, mean: Tensor, variance: Tensor) -> bool:
    """Make the slopes and the patch of a batch finite; False if it is left undone.

    Args:
        room: (C, F), changed: 0 in the channels whose statistics are not finite.
        patch: changed.
        mean: (C,), of the batch.
        variance: (C,).
    """
    dense = room.is_contiguous() and patch.is_contiguous()
    device, sizes = mean.get_device(), (room.numel(), patch.numel(), room.shape[1])
    kinds = kind(mean), kind(variance)
    dtypes = room.dtype, patch.dtype
    launch = _plan_forget(sizes, device, kinds, dtypes) if dense else None
    if launch is None:
        return False
    try:
        with on_device_of(mean):
            launch(room, patch, mean, variance, torch.finfo(room.dtype).max)
    except CannotLaunchError:
        return False
    torch.autograd.graph.increment_version([room, patch])
    return True


@lru_cache(maxsize=PLANS)
def _plan_forget(
    sizes: tuple[int, int, int],
    device: int,
    kinds: Kinds,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Launch | None:
    if not are_usual(kinds, device) or not _are_float32(kinds) or max(sizes) > _LARGEST:
        return None
    if not all(dtype in DTYPES for dtype in dtypes):
        return None
    programs = sum(-(-size // _BLOCK) for size in sizes[:2])
    return Launch(kernels.forget, programs, (*sizes, _BLOCK), 4)


def _are_float32(kinds: Kinds) -> bool:
    return all(one is not None and one[0] == torch.float32 for one in kinds)
