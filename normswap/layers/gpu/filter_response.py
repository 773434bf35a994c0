"""FRN with its TLU on a GPU: one kernel forward, two backward; one more each where rows are long.

Memory: forward reads x and writes z, backward reads x and the gradient and writes ∂x. Long rows
(what does not fit a program's registers) are read a second time, in an order that finds much of
them in the cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.layers.gpu import filter_response_kernels as kernels
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
from normswap.layers.gpu.tiles import Tiles, cut, power_of_two

_ROWS = 64  # of the channels' sums, at a time


class _Forward(NamedTuple):
    parts: int
    squares: Launch | None
    respond: Launch


class _Backward(NamedTuple):
    memory_format: torch.memory_format
    rows: int
    sums: Launch | None
    pull: Launch | None
    channels: Launch | None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor | None,
    eps_l: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """Z and the (N, C) inverse roots, or None where the eager form must do."""
    kinds = (kind(weight), kind(bias), kind(tau), kind(eps_l))
    aligned = is_aligned(x)
    plan = _plan_forward(x.shape, x.stride(), x.dtype, x.get_device(), aligned, kinds)
    if plan is None:
        return None
    samples, channels = x.shape[:2]
    y = torch.empty_like(x)
    root = torch.empty((samples, channels), dtype=torch.float32, device=x.device)
    epsilon = float(abs(eps))
    try:
        with on_device_of(x):
            if plan.squares is None:
                plan.respond(x, y, root, weight, bias, tau, eps_l, epsilon)
            else:
                partial = root.new_empty((plan.parts, samples, channels))
                plan.squares(x, partial)
                plan.respond(x, y, root, weight, bias, tau, eps_l, partial, epsilon)
    except CannotLaunchError:
        return None
    return y, root


@lru_cache(maxsize=PLANS)
def _plan_forward(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    aligned: bool,  # noqa: ARG001 - a kernel is compiled for it
    kinds: Kinds,
) -> _Forward | None:
    memory_format = memory_format_of(shape, stride) if takes(shape, dtype) else None
    if memory_format is None or not are_usual(kinds, device):
        return None
    tiles, sizes = _cut(shape, memory_format)
    layout = layout_of(shape, memory_format)
    block = tiles.channels, tiles.positions

    def launch(kernel: Any, *constants: int) -> Launch:
        return Launch(kernel, tiles.programs, constants, tiles.warps)

    if tiles.parts == 1:
        return _Forward(1, None, launch(kernels.forward_whole, sizes[1], *layout, *block))
    length, pieces = tiles.length, power_of_two(tiles.parts)
    return _Forward(
        tiles.parts,
        launch(kernels.forward_squares, *sizes, length, *layout, *block),
        launch(kernels.forward_parts, *sizes, tiles.parts, length, *layout, *block, pieces),
    )


def backward(
    grad: Tensor,
    x: Tensor,
    inverse_root: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """The gradients of x, γ, β, τ and ε_l that are ``needed``; None where the eager form must do.

    Args:
        grad: of z.
        x: as it came in.
        inverse_root: what the forward returned.
        vectors: γ, β, τ and ε_l, or None for what is absent.
        needed: which of the five.
    """
    weight, bias, tau, eps_l = vectors
    kinds = (kind(weight), kind(bias), kind(tau), kind(eps_l))
    aligned = is_aligned(x)
    plan = _plan_backward(x.shape, x.stride(), x.dtype, x.get_device(), aligned, kinds, needed)
    if plan is None or grad.dtype != x.dtype:
        return None
    grad = as_batch(grad, plan.memory_format)
    grad_x = torch.empty_like(x) if needed[0] else None
    outcomes = [
        torch.empty_like(v) if v is not None and wanted else None
        for v, wanted in zip(vectors, needed[1:], strict=True)
    ]
    sums = None
    if plan.rows > 0:
        sums = torch.empty((3, plan.rows, x.shape[1]), dtype=torch.float32, device=x.device)
    try:
        with on_device_of(x):
            if plan.sums is not None:
                plan.sums(x, grad, inverse_root, weight, bias, tau, sums)
            if plan.pull is not None:
                plan.pull(x, grad, grad_x, inverse_root, weight, bias, tau, sums)
            if plan.channels is not None:
                plan.channels(sums, inverse_root, weight, eps_l, *outcomes)
    except CannotLaunchError:
        return None
    return grad_x, *outcomes


@lru_cache(maxsize=PLANS)
def _plan_backward(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    aligned: bool,  # noqa: ARG001 - a kernel is compiled for it
    kinds: Kinds,
    needed: tuple[bool, ...],
) -> _Backward | None:
    memory_format = memory_format_of(shape, stride) if takes(shape, dtype) else None
    if memory_format is None or not are_usual(kinds, device):
        return None
    tiles, sizes = _cut(shape, memory_format)
    layout = layout_of(shape, memory_format)
    block = tiles.channels, tiles.positions
    rows = sizes[0] * tiles.parts
    channels = _channels(sizes, rows) if any(needed[1:]) else None

    def launch(kernel: Any, *constants: int) -> Launch:
        return Launch(kernel, tiles.programs, constants, tiles.warps)

    if tiles.parts == 1:
        pull = launch(kernels.backward_whole, *sizes, *layout, *block)
        return _Backward(memory_format, 0 if channels is None else rows, None, pull, channels)
    constants = (*sizes, tiles.parts, tiles.length, *layout, *block)
    return _Backward(
        memory_format,
        rows,
        launch(kernels.backward_sums, *constants),
        launch(kernels.backward_parts, *constants, power_of_two(tiles.parts))
        if needed[0]
        else None,
        channels,
    )


def _channels(sizes: tuple[int, int], rows: int) -> Launch:
    samples, channels = sizes
    deep = min(_ROWS, power_of_two(rows))
    wide = max(16, min(64, 1024 // deep))
    constants = (samples, channels, rows, deep, wide)
    return Launch(kernels.backward_channels, -(-channels // wide), constants, 4)


def _cut(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> tuple[Tiles, tuple[int, int]]:
    """The tiles, and N and C."""
    sizes = shape[0], shape[1]
    return cut(*sizes, positions_of(shape), memory_format != torch.contiguous_format), sizes
