"""How a batch's variance depends on the weights of the layer that made it: ``∂v/∂w``.

``D = (2/m)·Σ (y − μ)·patch`` is one more weight gradient. It only ever meets small changes of the
weights, so on maps a sample of the positions does, the sparser the larger the map. The sample's D
is scaled, channel by channel, to the batch's own variance: ``⟨D, w⟩ = 2v`` holds as it does for
the whole map, and with it BatchNorm's scale invariance.

Shapes: G groups, C channels, F the weights of one channel, R positions of a sample.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.layers.batch_statistics import per_channel
from normswap.layers.producers import Call, Pad, groups_of, weight_gradient
from normswap.layers.sampled_gradient import Positions, sampled_gradient

_FEWEST = 32
"""Positions below which a sample would say too little about a batch."""
_ENOUGH = 96
"""Positions that a sample need not exceed."""
_PART = 8
"""The part of all positions that it need not exceed either."""
_WORTH_A_SAMPLE = 1024
"""Positions from which on a sample is cheaper than all for strided depthwise convolutions."""
_WORTH_GATHERING = 4096
"""Positions from which on a sparse sample is cheaper than every ``sampling``-th for the others."""
_TRUSTED = 4.0
"""The largest factor between the variances of batch and sample that is made up for."""
_TINY = 1e-30


def sampling_step(producer: nn.Module, shape: torch.Size, sampling: int) -> int:
    """Every how many-th row and column of a map of this ``shape`` is looked at.

    ``sampling``, or more on maps that are so large that enough positions are left. Transposed
    convolutions and linear layers have no rows of their own to leave out.
    """
    if sampling == 1 or not isinstance(producer, _ConvNd) or isinstance(producer, _ConvTransposeNd):
        return 1
    if not _is_depthwise(producer, shape):
        return _largest_step(shape, sampling)
    # their kernel takes little more time for the whole map than a gather for a part
    positions = shape[0] * math.prod(shape[2:])
    if max(producer.stride) > 1:
        return 1 if positions < _WORTH_A_SAMPLE else _largest_step(shape, sampling)
    step = _largest_step(shape, sampling)
    return min(step, sampling) if positions < _WORTH_GATHERING else step


def _is_depthwise(producer: nn.Module, shape: torch.Size) -> bool:
    return groups_of(producer) == shape[1]


@lru_cache(maxsize=1024)
def _largest_step(shape: torch.Size, sampling: int) -> int:
    def left(step: int) -> int:
        at = _sample(step, sampling)
        return shape[0] * math.prod(len(at.along(size)) for size in shape[2:])

    if left(sampling) < _FEWEST:
        return 1
    enough = max(_FEWEST, min(_ENOUGH, left(1) // _PART))
    step = sampling
    while step < max(shape[2:]) and left(step + 1) >= enough:
        step += 1
    return step


def _sample(step: int, sampling: int) -> Positions:
    """A sparse sample keeps away from the border, which would weigh too much in it."""
    return Positions(step, (step - 1) // 2 if step > sampling else 0)


def variance_slope(
    producer: nn.Module,
    call: Call,
    y: Tensor,
    moments: tuple[Tensor, Tensor],
    pad: Pad | None,
    *,
    sampling: int,
    out: Tensor,
) -> Tensor:
    """Write D into ``out`` and return ``⟨D, w⟩``.

    Args:
        producer: the convolution or linear layer.
        call: its call.
        y: what it made, channels on axis 1; of the output's shape, or of a view of it.
        moments: mean and variance of ``y``, (C,).
        pad: how the input is padded by hand, or None.
        sampling: take every how many-th row and column, and fewer of large maps; 1 for all.
        out: (C, F).

    Returns:
        (C,).
    """
    mean, variance = moments
    every = sampling_step(producer, call.shape, sampling) if y.shape == call.shape else 1
    if every == 1:
        centred = y.to(mean.dtype) - per_channel(mean, y)
        weight_gradient(producer, call, centred, pad, scale=2.0 * y.shape[1] / y.numel(), out=out)
        return variance * 2.0
    at = _sample(every, sampling)
    upstream, along = _sampled(at.of(y).to(variance.dtype), variance)
    assert isinstance(producer, _ConvNd)  # others are looked at whole
    if at.first == 0 and _is_depthwise(producer, y.shape):
        # neighbouring taps share what they read, and the kernel for all makes use of that
        upstream = upstream.view(len(y), -1, *[len(at.along(size)) for size in y.shape[2:]])
        weight_gradient(producer, call, upstream, pad, every=every, out=out)
    else:
        sampled_gradient(producer, call, upstream, pad, at, out=out)
    return along


def _sampled(sample: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """``(2/m)·(y − μ)`` of a sample, scaled to the batch's variance, and ``⟨D, w⟩``."""
    sample.sub_(sample.mean((0, 2), keepdim=True))
    # a sample that saw nothing has no slope, whatever its factor
    squares = (sample * sample).sum((0, 2), keepdim=True).add_(_TINY)
    positions = sample.shape[0] * sample.shape[2]
    factor = variance.view(1, -1, 1) / squares
    factor.clamp_(1.0 / _TRUSTED / positions, _TRUSTED / positions).mul_(2.0)
    return sample.mul_(factor), squares.mul_(factor).flatten()
