"""From BatchNorm's running statistics to the affine parameters of a per-sample normaliser.

BN's running statistics say what per-sample statistics are on average. Putting them in their place
and solving for γ′ and β′ makes the new layer equal BN wherever a sample is an average one. All
arithmetic is float64; all arguments and results have shape (C,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normswap.graph.norms import BatchNormState

DEAD = 1e-10
"""A channel whose variance is this small a part of its group's carries no signal, only β."""


DROWNED = 100.0
"""Noise of a group's statistics over a channel's variance, from which on its slope is shrunk."""


@dataclass(frozen=True)
class Affine:
    """γ′ and β′ of shape (C,), float64."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Population:
    """BN in float64: y = slope·(x − mean) + bias, with x of variance var."""

    mean: Tensor
    var: Tensor
    slope: Tensor
    bias: Tensor


def population(state: BatchNormState) -> Population:
    """What BN's running statistics say, with the average in the place of what is not finite."""
    assert state.mean is not None
    assert state.var is not None
    mean, var = state.mean.detach().double(), state.var.detach().double()
    sound = mean.isfinite() & var.isfinite()
    weight = torch.ones_like(mean) if state.weight is None else state.weight.detach().double()
    bias = torch.zeros_like(mean) if state.bias is None else state.bias.detach().double()
    slope = weight * (var + state.eps).rsqrt()
    if not sound.all():  # BN's output there is β or NaN; the channel's group must not suffer
        slope = torch.where(sound, slope, torch.zeros_like(slope))
        mean, var = _filled(mean, sound, 0.0), _filled(var, sound, 1.0)
    return Population(mean, var, slope, bias)


def _filled(values: Tensor, sound: Tensor, default: float) -> Tensor:
    """``values`` with the average of the sound ones in the place of the others."""
    middle = values[sound].mean() if sound.any() else torch.full_like(values[0], default)
    return torch.where(sound, values, middle)


def group_moments(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Population mean and variance of each group, spread back over its channels.

    ``m_g = mean_{c∈g} μ_c``, ``v_g = mean_{c∈g}(σ²_c + (μ_c − m_g)²)``.
    """
    by_group = mean.view(groups, -1)
    centre = by_group.mean(1, keepdim=True)
    spread = (var.view(groups, -1) + (by_group - centre) ** 2).mean(1, keepdim=True)
    return centre.expand_as(by_group).reshape(-1), spread.expand_as(by_group).reshape(-1)


def match_groups(state: BatchNormState, groups: int, eps: float) -> Affine:
    """γ′ and β′ with which a GroupNorm equals BN at population statistics.

    ``γ′_c = γ_c·s_c·√(v_g + ε′)``, ``β′_c = β_c + γ_c·s_c·(m_g − μ_c)``. LayerNorm is one group,
    InstanceNorm is C groups. A dead channel keeps β alone: its slope would only amplify the noise
    of its group's statistics. A channel whose variance is a thousandth of its group's keeps the
    share of its slope that errs least.
    """
    bn = population(state)
    centre, spread = group_moments(bn.mean, bn.var, groups)
    alive = bn.var > DEAD * spread
    slope = bn.slope * _trust(bn, _group_noise(bn, groups, centre, spread))
    weight = slope * (spread + eps).sqrt()
    bias = bn.bias + slope * (centre - bn.mean)
    return Affine(
        torch.where(alive, weight, torch.zeros_like(weight)), torch.where(alive, bias, bn.bias)
    )


def match_filter_response(state: BatchNormState, eps: float | Tensor) -> Affine:
    """γ′ and β′ with which FRN equals BN at population statistics.

    ``γ′_c = γ_c·s_c·√(σ²_c + μ²_c + ε_f)``, ``β′_c = β_c − γ_c·s_c·μ_c``.
    """
    bn = population(state)
    power = bn.var + bn.mean**2
    alive = bn.var > DEAD * power
    weight = bn.slope * (power + eps).sqrt()
    bias = bn.bias - bn.slope * bn.mean
    return Affine(
        torch.where(alive, weight, torch.zeros_like(weight)), torch.where(alive, bias, bn.bias)
    )


MEAN_SHARE = 0.2
"""Share of a channel's variance that lies between samples: a typical trained network's."""

POWER_SPREAD = 0.35
"""Variance of a sample's channel variance, over its square: a typical trained network's."""

MEANS_TOGETHER, POWERS_TOGETHER = 0.05, 0.4
"""Correlation between channels of their sample means and of their sample variances, likewise."""


def _pooled(variance: Tensor, groups: int, correlation: float) -> Tensor:
    """Variance of a group's mean of quantities with these variances, spread over its channels."""
    by_group = variance.view(groups, -1)
    apart = by_group.mean(1, keepdim=True) / by_group.shape[1]
    joint = by_group.sqrt().mean(1, keepdim=True) ** 2
    pooled = (1 - correlation) * apart + correlation * joint
    return pooled.expand_as(by_group).reshape(-1)


def predicted_group_drift(state: BatchNormState, groups: int) -> float:
    """Predicted relative output error of a matched GroupNorm, from the running statistics alone.

    A sample's group mean is off by δ and the root of its group variance by a share r. Channel c
    then errs by ``γ_c·s_c·(r·(x_c − m_g) − δ)``. With channels that fluctuate as those of trained
    networks do, Var δ and E r² follow from σ² and μ: they fall with the size of the group, and the
    error grows with ``√v_g / σ_c``, a channel much quieter than its group.
    """
    bn = population(state)
    centre, spread = group_moments(bn.mean, bn.var, groups)
    noise = _group_noise(bn, groups, centre, spread)
    kept = _trust(bn, noise)
    error = kept**2 * noise + (1 - kept) ** 2 * bn.var
    return _relative(bn, error, bn.var > DEAD * spread)


def _group_noise(bn: Population, groups: int, centre: Tensor, spread: Tensor) -> Tensor:
    """Variance, in units of x, of what a sample's group statistics add to each channel."""
    offset = (bn.mean - centre) ** 2
    shift = _pooled(MEAN_SHARE * bn.var, groups, MEANS_TOGETHER)
    power = POWER_SPREAD * bn.var**2 + 4 * offset * MEAN_SHARE * bn.var
    stretch = _pooled(power, groups, POWERS_TOGETHER) / (4 * spread.clamp_min(1e-300) ** 2)
    return stretch * (bn.var + offset) + shift


def _trust(bn: Population, noise: Tensor) -> Tensor:
    """Share of its slope that a channel keeps: all, unless its group drowns it.

    A channel a thousand times quieter than its group would pass on the group's fluctuations many
    times louder than its own signal. There the slope that errs least, v/(v + noise), is kept.
    """
    return torch.where(noise > DROWNED * bn.var, bn.var / (bn.var + noise), 1.0)


def predicted_filter_response_drift(state: BatchNormState) -> float:
    """Predicted relative output error of a matched FRN, from the running statistics alone.

    The root mean square of a sample's channel is off by a share r, the output by ``γ_c·s_c·r·x_c``.
    """
    bn = population(state)
    total = bn.var + bn.mean**2
    power = POWER_SPREAD * bn.var**2 + 4 * bn.mean**2 * MEAN_SHARE * bn.var
    stretch = power / (4 * total.clamp_min(1e-300) ** 2)
    return _relative(bn, stretch * total, bn.var > DEAD * total)


def _relative(bn: Population, error: Tensor, alive: Tensor) -> float:
    """Root mean square error over the channels' spread, each weighted by what it puts out."""
    share = torch.where(alive, bn.slope**2 * error, torch.zeros_like(error))
    total = (bn.slope**2 * bn.var).sum().clamp_min(1e-300)
    return float((share.sum() / total).sqrt())
