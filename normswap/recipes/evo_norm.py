"""EvoNorm-S0: normaliser and activation in one, for a BatchNorm with its SiLU or ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.graph.norms import BatchNormState, fused_parts, state_of
from normswap.graph.sites import Site
from normswap.recipes import base
from normswap.recipes.group_norm import GroupNorm
from normswap.recipes.matching import (
    Affine,
    group_moments,
    population,
    predicted_group_drift,
)

_GATES = (0.0, *np.logspace(-3, 3, 121))
"""Steepness of the gate, in standard deviations of the channel, among which the match chooses."""

_NODES = 48
"""Points of a normal distribution at which the match compares the two functions."""


@dataclass(frozen=True)
class EvoNorm(GroupNorm):
    """EvoNorm-S0, in the place of a BatchNorm and of the SiLU or ReLU behind it.

    A BatchNorm that no such activation follows gets the fallback. The match is a least-squares fit:
    the gate is centred on zero, where BN's activation is not, so it is near, not exact.

    Args:
        groups: number of groups, as :class:`GroupNorm` takes it.
        max_groups: the bound to use in place of the paper's 32.
        eps: ε; None keeps BN's.
        channels_per_group: in the place of ``groups``: how many channels a group has.

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, table 1.
    """

    target: ClassVar[str] = "evonorm"
    takes_as: ClassVar[str] = "evonorm"
    layers: ClassVar[tuple[type[nn.Module], ...]] = base.ranks("EvoNorm")

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"silu", "relu"})

    @property
    def insists(self) -> bool:
        return True

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        parts = fused_parts(model.get_submodule(site.name))
        if parts is not None and not isinstance(parts[0], nn.Identity):
            return "a dropout stands between it and its activation"
        return base.needs_a_map(site)

    @classmethod
    def read(cls, layer: Any) -> EvoNorm:
        return cls(groups=layer.groups)

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        state = state_of(norm)
        groups = self.groups_for(state)
        eps = state.eps if self.eps is None else self.eps
        new = base.ranked("EvoNorm", rank)(
            state.channels, groups=groups, eps=eps, **base.factory(norm)
        )
        fit = None
        if base.has_statistics(state) and init == "match":
            fit = _fit(state, groups, eps, activation or "silu")
            with torch.no_grad():
                new.get_parameter("v").copy_(fit.gate)
        base.set_affine(norm, new, None if fit is None else fit.affine, init)
        if not (
            new.get_parameter("weight").requires_grad or new.get_parameter("bias").requires_grad
        ):
            new.requires_grad_(False)  # v too
        return base.take_over(norm, new, act=nn.Identity(), taken=activation)

    def drift(self, state: BatchNormState) -> float:
        groups = self.groups_for(state)
        # the noise of the groups' statistics; on top comes what the fit misses
        noise = predicted_group_drift(state, groups)
        return float((noise**2 + _fit(state, groups, state.eps, "silu").error) ** 0.5)

    def standardise(self, layer: Any, x: Tensor) -> Tensor:
        found: Tensor = layer.standardised(x)
        return found

    def scaled(self, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        return base.Recipe.scaled(self, layer, x, weight)

    def sharing(self, layer: Any) -> int | None:
        del layer  # its gate feels what its producer's scale is, so that one has to stay
        return None

    def standalone(self, layer: Any) -> str:
        return f"EvoNorm({layer.num_features}, groups={layer.groups}, eps={layer.eps!r})"

    def aim(self, layer: nn.Module, y: Tensor) -> Tensor:
        activated: Tensor = getattr(F, self.taken(layer) or "silu")(y)
        return activated


@dataclass(frozen=True)
class _Fit:
    affine: Affine
    gate: Tensor
    error: float


def _fit(state: BatchNormState, groups: int, eps: float, activation: str) -> _Fit:
    """v, γ′ and β′ with which EvoNorm is nearest to BN and its activation on a normal channel.

    For each steepness of the gate, γ′ and β′ are those of the regression of ``act(BN(x))`` on
    ``x·σ(v·x)/√(v_g + ε)``; the steepness with the smallest residual stays, per channel. The sign
    of v is that of BN's slope: the gate opens where BN's output grows.
    """
    bn = population(state)
    _, spread = group_moments(bn.mean, bn.var, groups)
    nodes, shares = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = torch.as_tensor(shares / shares.sum()).to(bn.mean)
    std = bn.var.sqrt()
    x = bn.mean[:, None] + std[:, None] * torch.as_tensor(nodes).to(bn.mean)
    target = getattr(F, activation)(bn.slope[:, None] * (x - bn.mean[:, None]) + bn.bias[:, None])
    mean = target @ weights
    varies = ((target - mean[:, None]) ** 2) @ weights
    least = torch.full_like(mean, torch.inf)
    gate, weight, bias = torch.zeros_like(mean), torch.zeros_like(mean), mean.clone()
    unit = torch.where(bn.slope < 0, -1.0, 1.0) / std.clamp_min(1e-12)
    for steepness in _GATES:
        v = steepness * unit
        made = x * torch.sigmoid(v[:, None] * x) * (spread + eps).rsqrt()[:, None]
        centre = made @ weights
        apart = made - centre[:, None]
        power = (apart**2) @ weights
        together = (apart * (target - mean[:, None])) @ weights
        slope = torch.where(power > 0, together / power.clamp_min(1e-300), 0.0)
        missed = varies - slope * together
        better = missed < least
        least = torch.where(better, missed, least)
        gate, weight = torch.where(better, v, gate), torch.where(better, slope, weight)
        bias = torch.where(better, mean - slope * centre, bias)
    error = least.clamp_min(0).sum() / varies.sum().clamp_min(1e-300)
    return _Fit(Affine(weight, bias), gate, float(error))
