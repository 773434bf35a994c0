"""Batch Renormalization on a GPU: two kernels forward, two backward.

Forward: the moments of parts of the batch; then r, d, the running statistics and the output.
Backward: the sums of parts; then all gradients. Both read their batch twice, as BatchNorm does, the
second time in an order that finds much of it in the cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.layers.gpu import batch_renorm_kernels as kernels
from normswap.layers.gpu.launching import (
    PLANS,
    CannotLaunchError,
    Kinds,
    Launch,
    are_usual,
    as_batch,
    is_aligned,
    kind,
    layout_of,
    memory_format_of,
    on_device_of,
    positions_of,
    takes,
)
from normswap.layers.gpu.tiles import Shares, power_of_two, share


class Running(NamedTuple):
    """What a batch changes."""

    mean: Tensor
    variance: Tensor
    counter: Tensor | None


class Forward(NamedTuple):
    """How one kind of batch is worked on."""

    parts: int
    moments: Launch
    renormalise: Launch


class _Backward(NamedTuple):
    memory_format: torch.memory_format
    parts: int
    sums: Launch
    pull: Launch


def plan_for(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    momentum: float | None,
) -> Forward | None:
    """How to work on ``x``, or None where the eager form must do."""
    kinds = (kind(weight), kind(bias), kind(running.mean), kind(running.variance))
    return _plan_forward(
        x.shape,
        x.stride(),
        x.dtype,
        x.get_device(),
        is_aligned(x),
        kinds,
        kind(running.counter),
        momentum is None,
    )


@lru_cache(maxsize=PLANS)
def _plan_forward(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    aligned: bool,  # noqa: ARG001 - a kernel is compiled for it
    kinds: Kinds,
    counter: tuple[Any, ...] | None,
    cumulative: bool,
) -> Forward | None:
    memory_format = memory_format_of(shape, stride) if takes(shape, dtype) else None
    if memory_format is None or not are_usual(kinds, device):
        return None
    if counter is not None and counter != (torch.int64, device, (), True):
        return None
    cut, constants = cut_batch(shape, memory_format)
    pieces = power_of_two(cut.parts)
    counts = cumulative and counter is not None
    moments = Launch(kernels.moments, cut.programs, (*constants, counts), cut.warps)
    constants = (*constants, pieces)
    return Forward(
        cut.parts, moments, Launch(kernels.renormalise, cut.programs, constants, cut.warps)
    )


@lru_cache(maxsize=PLANS)
def _plan_backward(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    aligned: bool,  # noqa: ARG001 - a kernel is compiled for it
    kinds: Kinds,
    needed: tuple[bool, ...],  # noqa: ARG001 - for that too
) -> _Backward | None:
    memory_format = memory_format_of(shape, stride) if takes(shape, dtype) else None
    if memory_format is None or not are_usual(kinds, device):
        return None
    cut, constants = cut_batch(shape, memory_format)
    sums = Launch(kernels.backward_sums, cut.programs, constants, cut.warps)
    constants = (*constants, power_of_two(cut.parts))
    pull = Launch(kernels.backward, cut.programs, constants, cut.warps)
    return _Backward(memory_format, cut.parts, sums, pull)


def cut_batch(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> tuple[Shares, tuple[int, ...]]:
    """The parts, and what all kernels have to know of them."""
    samples, channels, positions = shape[0], shape[1], positions_of(shape)
    layout = layout_of(shape, memory_format)
    dense_channels = memory_format != torch.contiguous_format
    if dense_channels:  # samples follow each other as positions do
        samples, positions = 1, samples * positions
        layout = layout._replace(units=positions)
    cut = share(samples, channels, positions, dense_channels)
    shares = cut.samples, cut.length, cut.row_parts, cut.parts
    return cut, (samples, channels, *shares, *layout, cut.channels, cut.positions)


def forward(
    plan: Forward,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    momentum: float | None,
    eps: float,
    limits: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Y and (4, C) μ, 1/σ, r and d; takes the batch into the running statistics.

    Raises:
        CannotLaunchError: before anything is changed.
    """
    channels = x.shape[1]
    y = torch.empty_like(x)
    statistics = torch.empty((4, channels), dtype=torch.float32, device=x.device)
    scratch = statistics.new_empty((2 * plan.parts + 2) * channels + 1)
    r_high, d_high = limits
    with on_device_of(x):
        # without a counter a cumulative average is of this batch alone
        rate = 1.0 if momentum is None else float(momentum)
        plan.moments(x, scratch, *running, rate)
        bounds = 1.0 / r_high, r_high, d_high
        plan.renormalise(x, y, scratch, statistics, weight, bias, *running, float(eps), *bounds)
    torch.autograd.graph.increment_version([t for t in running if t is not None])
    return y, statistics


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """The gradients of x, γ and β that are ``needed``; None where the eager form must do."""
    kinds = (kind(weight), kind(bias))
    aligned = is_aligned(x)
    plan = _plan_backward(x.shape, x.stride(), x.dtype, x.get_device(), aligned, kinds, needed)
    if plan is None or grad.dtype != x.dtype:
        return None
    grad = as_batch(grad, plan.memory_format)
    sums = statistics.new_empty((2, plan.parts, x.shape[1]))
    grad_x = torch.empty_like(x) if needed[0] else None
    grad_weight = torch.empty_like(weight) if weight is not None and needed[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and needed[2] else None
    try:
        with on_device_of(x):
            plan.sums(x, grad, statistics, sums)
            plan.pull(x, grad, grad_x, statistics, weight, sums, grad_weight, grad_bias)
    except CannotLaunchError:
        return None
    return grad_x, grad_weight, grad_bias
