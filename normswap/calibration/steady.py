"""Scales of a producer's channels with which a group's statistics are steady from sample to sample.

A BatchNorm does not see by what factor, of either sign, a convolution in front of it is multiplied
per channel; its running statistics take it up. A GroupNorm does: a group's mean and variance are
sums over its channels, and what a sample does to a loud channel it does to the whole group. So the
factors are free, and there are as many as channels: enough to let what the channels do to the sums
cancel. Signs balance the means, sizes the variances. The original's function stays as it is; the
norm stays a GroupNorm, which computes all of its statistics from the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS, _RATE = 80, 0.06
_PULL = 0.1
_LOUDEST = 8.0
"""No channel is made louder or quieter than by this factor, beside unit variance."""
_SILENT = 1e-3
"""Channels of a smaller share of the largest spread are not made louder than that allows."""


@dataclass(frozen=True)
class Moments:
    """Mean and mean square of every sample's channels, both (N, C), before the norm."""

    mean: Tensor
    square: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(torch.cat([self.mean, other.mean]), torch.cat([self.square, other.square]))

    @property
    def spread(self) -> Tensor:
        """Standard deviation of every channel over all samples and positions, never 0."""
        found = (self.square.mean(0) - self.mean.mean(0).square()).clamp_min(0).sqrt()
        return found.clamp_min(_SILENT * found.max()).clamp_min(1e-12)


def steady_scales(moments: Moments, gain: Tensor, groups: int, pull: float = _PULL) -> Tensor:
    """The factors (C,), signs included, with which a GroupNorm errs least.

    Args:
        moments: of what the original feeds its BatchNorm.
        gain: what a channel's output counts, |γ|.
        groups: number of groups.
        pull: weight of the mean square of the factors' logarithms beside the error, the start's
            being 1.
    """
    spread = moments.spread
    if len(spread) == groups:
        return torch.ones_like(spread)
    unit = Moments(moments.mean / spread, moments.square / spread.square())
    error = _Error(unit, gain, groups)
    signs = _balanced(unit.mean - unit.mean.mean(0), groups)
    scales = _descended(error, min(torch.ones_like(signs), signs, key=error.elsewhere), pull)
    found = scales / spread
    return found * _loudness(moments, groups) / _loudness(_scaled(moments, found), groups)


def _scaled(moments: Moments, scales: Tensor) -> Moments:
    return Moments(moments.mean * scales, moments.square * scales.square())


def _loudness(moments: Moments, groups: int) -> Tensor:
    """Root of each group's variance, spread over its channels; that of the weights stays."""
    mean, square = (m.mean(0).view(groups, -1) for m in (moments.mean, moments.square))
    found = (square.mean(1) - mean.mean(1).square()).clamp_min(1e-24).sqrt()
    return found.repeat_interleave(mean.shape[1])


def _balanced(deviation: Tensor, groups: int) -> Tensor:
    """Signs with which the channels' deviations from their means cancel, the loudest first."""
    signs = torch.ones(deviation.shape[1], dtype=deviation.dtype, device=deviation.device)
    members = torch.arange(len(signs), device=signs.device).view(groups, -1)
    order = deviation.square().sum(0)[members].argsort(1, descending=True)
    total = torch.zeros(groups, len(deviation), dtype=signs.dtype, device=signs.device)
    for column in members.gather(1, order).T:  # one channel of every group
        each = deviation[:, column].T
        flip = torch.where((total * each).sum(1) > 0, -1.0, 1.0).to(each)
        signs[column] = flip
        total += flip[:, None] * each
    return signs


class _Error:
    """What a GroupNorm with the best γ and β leaves of the error, on two halves of the samples."""

    def __init__(self, unit: Moments, gain: Tensor, groups: int) -> None:
        few = len(unit.mean) < 8
        held = torch.arange(len(unit.mean), device=gain.device) % 4 == 3
        self.shape = groups
        self.gain = gain.square()
        self.parts = [Moments(unit.mean[i], unit.square[i]) for i in (~held | few, held | few)]

    def seen(self, scales: Tensor) -> Tensor:
        """On the samples that the scales are made for."""
        return self._of(self.parts[0], scales)

    def elsewhere(self, scales: Tensor) -> float:
        """On the others."""
        return float(self._of(self.parts[1], scales))

    def _of(self, part: Moments, scales: Tensor) -> Tensor:
        found = _scaled(part, scales)
        samples, channels = found.mean.shape
        mean, square = (m.view(samples, self.shape, -1).mean(2) for m in (found.mean, found.square))
        each = channels // self.shape
        deviation = (square - mean.square()).clamp_min(1e-9).sqrt().repeat_interleave(each, 1)
        mean = mean.repeat_interleave(each, 1)
        # x̂ = (s·x − mean)/deviation against x, over all samples and positions
        centre = ((found.mean - mean) / deviation).mean(0)
        power = ((found.square - 2 * mean * found.mean + mean.square()) / deviation.square()).mean(
            0
        )
        level = part.mean.mean(0)
        both = ((scales * part.square - mean * part.mean) / deviation).mean(0) - centre * level
        whole = part.square.mean(0) - level.square()
        left = whole - both.square() / (power - centre.square()).clamp_min(1e-9)
        return (self.gain * left).sum() / (self.gain * whole).sum().clamp_min(1e-12)


def _descended(error: _Error, signs: Tensor, pull: float) -> Tensor:
    """Scales of these signs after some steps of Adam; the best on the samples held out."""
    with torch.enable_grad():
        exponent = torch.zeros_like(signs, requires_grad=True)
        optimizer = torch.optim.Adam([exponent], lr=_RATE)
        start = float(error.seen(signs).detach()) + 1e-9
        best, lowest = signs, error.elsewhere(signs)
        for step in range(1, _STEPS + 1):
            optimizer.zero_grad()
            scales = signs * exponent.exp()
            loss = error.seen(scales) / start + pull * exponent.square().mean()
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                exponent.clamp_(-math.log(_LOUDEST), math.log(_LOUDEST))
                if step % 10 == 0:
                    now = signs * exponent.exp()
                    reached = error.elsewhere(now)
                    if reached < lowest:
                        best, lowest = now.clone(), reached
    return best.detach()
