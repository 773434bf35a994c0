"""A weight gradient from some of the positions of a convolution's output.

Shapes: N samples, G groups, C channels, F the weights of one channel, P positions of a sample.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from normswap.layers.producers import Call, Pad, groups_of, pad_by_hand, taps_first, with_padding
from normswap.layers.products import product

_FEW = 16
"""Positions of a sample for which alone no matrix product is worth while."""
_SMALL = 1 << 15
"""Numbers below which one product for each sample, summed up later, is cheaper than joining."""


class Positions(NamedTuple):
    """Every how many-th row and column of a map, and the first of them."""

    every: int
    first: int

    def along(self, size: int) -> range:
        """Which of ``size`` rows."""
        return range(self.first, size, self.every)

    def of(self, y: Tensor) -> Tensor:
        """The values there: (N, C, *) to (N, C, P), not a view."""
        kept = [slice(self.first, None, self.every)] * (y.dim() - 2)
        return (
            y[(slice(None), slice(None), *kept)]
            .clone(memory_format=torch.contiguous_format)
            .flatten(2)
        )


def sampled_gradient(
    producer: _ConvNd,
    call: Call,
    grad: Tensor,
    pad: Pad | None,
    at: Positions,
    *,
    out: Tensor,
) -> None:
    """Write ``Σ grad·∂y/∂w`` into ``out``.

    Args:
        producer: the convolution, not a transposed one.
        call: its call.
        grad: (N, C, P), upstream of the sampled positions in the statistics' dtype.
        pad: how the input is padded by hand, or None.
        at: which positions they are.
        out: (C, F), of any float dtype.
    """
    patches = _patches(producer, call, pad, at).to(grad.dtype)
    few = grad.shape[2] <= _FEW
    if grad.shape[0] > 1 and (few or (patches.shape[1] == 1 and out.numel() >= _SMALL)):
        grad, patches = _joined(grad), _joined(patches)
    out.copy_(_contract(grad, patches))


def _contract(grad: Tensor, patches: Tensor) -> Tensor:
    """``Σ_n``, (N, C, P) by (N, G, F, P) to (C, F)."""
    samples, groups, taps, positions = patches.shape
    if samples == groups == 1:
        return product(grad[0], patches[0, 0])
    by_group = grad.view(samples * groups, -1, positions)
    products = torch.bmm(by_group, patches.flatten(0, 1).transpose(1, 2))
    return products.view(samples, -1, taps).sum(0)


def _joined(x: Tensor) -> Tensor:
    """(N, *, P) as (1, *, N·P)."""
    return x.movedim(0, -2).flatten(-2).unsqueeze(0)


def _patches(producer: _ConvNd, call: Call, pad: Pad | None, at: Positions) -> Tensor:
    """What the taps meet: (N, G, F, P), F ordered like the weight's."""
    x, padding, mode = pad_by_hand(producer, call.input, pad)
    settings = (producer.stride, producer.kernel_size, producer.dilation, tuple(padding))
    met, overhangs = _met(x.shape[2:], call.shape[2:], *settings, at, x.device)
    if overhangs:
        x = with_padding(x, padding, mode)
    groups = groups_of(producer)
    if taps_first(producer):
        rows = x.movedim(1, -1).flatten(1, -2)
        seen = rows.index_select(1, met.t().flatten()).view(
            x.shape[0], met.shape[1], met.shape[0], groups, -1
        )
        return seen.permute(0, 3, 2, 4, 1).flatten(2, 3)
    seen = x.flatten(2).index_select(2, met.flatten())
    return seen.view(x.shape[0], groups, -1, met.shape[1])


class _Axis(NamedTuple):
    """Where the taps stand along one axis of the input."""

    size: int
    first: int
    steps: int
    step: int
    taps: int
    dilation: int

    @property
    def last(self) -> int:
        return self.first + (self.steps - 1) * self.step + (self.taps - 1) * self.dilation

    def places(self) -> list[list[int]]:
        """For each tap, the places of all steps."""
        return [
            [self.first + step * self.step + tap * self.dilation for step in range(self.steps)]
            for tap in range(self.taps)
        ]


@lru_cache(maxsize=512)
def _met(
    sizes: torch.Size,
    made: torch.Size,
    strides: tuple[int, ...],
    kernel: tuple[int, ...],
    dilations: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    at: Positions,
    device: torch.device,
) -> tuple[Tensor, bool]:
    """Where in a flattened map each tap stands at each position, (taps, P); and if padded first."""
    axes = [
        _Axis(size, at.first * stride - before, len(at.along(out)), at.every * stride, taps, apart)
        for size, out, stride, taps, apart, (before, _) in zip(
            sizes, made, strides, kernel, dilations, padding, strict=True
        )
    ]
    overhangs = any(axis.first < 0 or axis.last >= axis.size for axis in axes)
    if overhangs:
        axes = [
            axis._replace(size=axis.size + before + after, first=axis.first + before)
            for axis, (before, after) in zip(axes, padding, strict=True)
        ]
    with torch.inference_mode(False):
        met = torch.zeros((1, 1), dtype=torch.int64)
        for axis in axes:
            here = torch.tensor(axis.places())
            met = met[:, None, :, None] * axis.size + here[None, :, None, :]
            met = met.flatten(2).flatten(0, 1)
        return met.to(device), overhangs
