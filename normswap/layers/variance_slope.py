"""How a batch's variance depends on the weights of the layer that made it: ``∂v/∂w``.

``D = (2/m)·Σ (y − μ)·patch`` is one more weight gradient. It only ever meets small changes of the
weights, so on maps a sample of the positions does: every second row and column of a map makes a
quarter of the work. The sample's D is scaled, channel by channel, to the batch's own variance:
``⟨D, w⟩ = 2v`` holds as it does for the whole map, and with it BatchNorm's scale invariance.

Shapes: C channels, F the weights of one channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.layers.batch_statistics import batch_moments, per_channel
from normswap.layers.producers import Call, Pad, every_nth, format_of, groups_of, weight_gradient

_FEWEST = 32
"""Positions below which a sample would say too little about a batch."""
_TRUSTED = 4.0
"""The largest factor between the variances of batch and sample that is made up for."""
_TINY = 1e-30


def sampling_step(producer: nn.Module, shape: torch.Size, sampling: int) -> int:
    """Every how many-th row and column of a map of this ``shape`` is looked at.

    Transposed convolutions and linear layers have no rows of their own to leave out, and strided
    depthwise convolutions would only get slower.
    """
    if sampling == 1 or not isinstance(producer, _ConvNd) or isinstance(producer, _ConvTransposeNd):
        return 1
    if groups_of(producer) == shape[1] and max(producer.stride) > 1:
        return 1
    positions = shape[0] * math.prod(-(-size // sampling) for size in shape[2:])
    return sampling if positions >= _FEWEST else 1


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
        sampling: take every how many-th row and column; 1 for all.
        out: (C, F).

    Returns:
        (C,).
    """
    mean, variance = moments
    every = sampling_step(producer, call.shape, sampling) if y.shape == call.shape else 1
    if every == 1:
        upstream = y.to(mean.dtype) - per_channel(mean, y)
        scale = 2.0 * y.shape[1] / y.numel()
        along = variance * 2.0
    else:
        scale = 1.0
        upstream, along = _sampled(every_nth(y, [every] * (y.dim() - 2)), variance, format_of(y))
    weight_gradient(producer, call, upstream, pad, every=every, scale=scale, out=out)
    return along


def _sampled(
    view: Tensor, variance: Tensor, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """``(2/m)·(y − μ)`` of a sample, scaled to the batch's variance, and ``⟨D, w⟩``."""
    sample = view.to(variance.dtype, copy=True, memory_format=memory_format)
    mean, seen = batch_moments(sample)
    # a sample that saw nothing has no slope, whatever its factor
    ratio = (variance / (seen + _TINY)).clamp_(1.0 / _TRUSTED, _TRUSTED)
    factor = ratio * (2.0 * view.shape[1] / view.numel())
    upstream = sample.sub_(per_channel(mean, view)).mul_(per_channel(factor, view))
    return upstream, ratio.mul_(seen).mul_(2.0)
