"""GN, LN and IN: per-sample statistics over groups of channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from normswap import checks
from normswap.errors import PlanError
from normswap.graph.norms import BatchNormState, state_of
from normswap.graph.sites import Site
from normswap.recipes import base
from normswap.recipes.matching import match_groups, predicted_group_drift

PAPER_GROUPS = 32


def nearest(wanted: int, choices: Sequence[int]) -> list[int]:
    """The two of ``choices`` that are nearest to ``wanted``, ascending.

    Example:
        >>> nearest(7, divisors(64)), nearest(32, divisors(20))
        ([4, 8], [10, 20])
    """
    return sorted(sorted(choices, key=lambda n: (abs(n - wanted), n))[:2])


def divisors(channels: int) -> tuple[int, ...]:
    """All divisors of ``channels``, ascending."""
    return tuple(n for n in range(1, channels + 1) if channels % n == 0)


def nearest_groups(channels: int, most: int = PAPER_GROUPS) -> int:
    """The largest number of groups up to ``most`` that divides C and keeps two channels a group.

    Example:
        >>> [nearest_groups(c) for c in (64, 32, 72, 20, 7, 1)]
        [32, 16, 24, 10, 1, 1]
    """
    fitting = [n for n in divisors(channels) if n <= most and channels // n >= 2]
    return max(fitting, default=1)


def _eps_limit(eps: float | None) -> tuple[str, bool, str]:
    return "eps", eps is None or checks.number(eps, 0), "a number of at least 0, or None"


@dataclass(frozen=True)
class _Grouped(base.Recipe):
    fallback: ClassVar[str] = "frozen"
    per_sample: ClassVar[bool] = True

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        del model
        return base.needs_a_map(site)

    def warnings(self, site: Site, *, init: str) -> tuple[str, ...]:
        return base.affine_warnings(site, init)

    def standardise(self, layer: Any, x: Tensor) -> Tensor:
        return F.group_norm(x, layer.num_groups, None, None, layer.eps)

    def scaled(self, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.group_norm(x, layer.num_groups, weight.to(x.dtype), None, layer.eps)

    def sharing(self, layer: Any) -> int | None:
        return int(layer.num_groups)

    def standalone(self, layer: Any) -> str:
        if isinstance(layer, nn.GroupNorm):
            return f"nn.GroupNorm({layer.num_groups}, {layer.num_channels}, eps={layer.eps!r})"
        rank = next(n for n in (1, 2, 3) if isinstance(layer, getattr(nn, f"InstanceNorm{n}d")))
        return f"nn.InstanceNorm{rank}d({layer.num_features}, eps={layer.eps!r}, affine=True)"


@dataclass(frozen=True)
class GroupNorm(_Grouped):
    """Group Normalization, ``torch.nn.GroupNorm``.

    Args:
        groups: number of groups, which must divide C at every site; ``"auto"`` chooses per site
            the number that keeps most of what a trained BN computes, by its running statistics;
            None takes the paper's 32, or the nearest smaller divisor of C that leaves two channels
            in a group, and so does ``"auto"`` for a BN that was never trained.
        max_groups: the bound to use in place of the paper's 32.
        eps: ε; None keeps BN's.
        channels_per_group: in the place of ``groups``: how many channels a group has, which must
            divide C at every site.

    Reference:
        Wu & He 2018, Group Normalization, arXiv 1803.08494.
    """

    target: ClassVar[str] = "gn"
    evidence: ClassVar[str | None] = "a matched gn kept 33 % of EfficientNet-Lite0's decisions"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.GroupNorm,)

    groups: int | Literal["auto"] | None = "auto"
    max_groups: int = PAPER_GROUPS
    eps: float | None = None
    channels_per_group: int | None = None

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        size = self.channels_per_group
        yield "channels_per_group", size is None or checks.whole(size, 1), "a positive integer"
        alone = size is None or self.groups == "auto"
        yield "groups", alone, "either groups or channels_per_group"
        known = self.groups in (None, "auto") or checks.whole(self.groups, 1)
        yield "groups", known, "a positive integer, 'auto' or None"
        yield "max_groups", checks.whole(self.max_groups, 1), "a positive integer"
        yield _eps_limit(self.eps)

    @classmethod
    def read(cls, layer: Any) -> GroupNorm:
        return cls(groups=layer.num_groups)

    @property
    def short(self) -> str:
        return self.target if self.groups is None else f"{self.target}(groups={self.groups})"

    def settle(self, site: Site, norm: nn.Module) -> Self:
        state = state_of(norm)
        eps = state.eps if self.eps is None else self.eps
        groups = self.groups_for(state, site.name)
        return replace(self, groups=groups, eps=eps, channels_per_group=None)

    def groups_for(self, state: BatchNormState, where: str = "the plan") -> int:
        """The number of groups in the place of a BatchNorm."""
        if self.channels_per_group is not None:
            size = _dividing("channels_per_group", self.channels_per_group, state.channels, where)
            return state.channels // size
        if self.groups is None:
            return nearest_groups(state.channels, self.max_groups)
        if self.groups == "auto":
            return automatic_groups(state, self.max_groups)
        return _dividing("groups", self.groups, state.channels, where)

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        del rank, activation
        state = state_of(norm)
        groups = self.groups_for(state)
        eps = state.eps if self.eps is None else self.eps
        new = nn.GroupNorm(groups, state.channels, eps=eps, **base.factory(norm))
        matched = match_groups(state, groups, eps) if base.has_statistics(state) else None
        return base.take_over(norm, base.set_affine(norm, new, matched, init))

    def drift(self, state: BatchNormState) -> float | None:
        return predicted_group_drift(state, self.groups_for(state))

    def sharing_at(self, state: BatchNormState) -> int | None:
        return None if self.wired else self.groups_for(state)


def _dividing(setting: str, value: int, channels: int, where: str) -> int:
    if channels % value:
        near = nearest(value, divisors(channels))
        raise PlanError(
            where,
            got=f"{setting}={value} for {channels} channels",
            need=f"a divisor of {channels}",
            hint=f"{setting}=" + " or ".join(map(str, near)),
        )
    return value


def automatic_groups(state: BatchNormState, most: int = PAPER_GROUPS) -> int:
    """The number of groups with the smallest predicted drift, among the divisors of C.

    Statistics that no batch has touched say nothing: such a BN gets the paper's number.

    Args:
        state: of the BatchNorm.
        most: the largest number to consider.
    """
    if not base.has_statistics(state) or base.looks_fresh(state):
        return nearest_groups(state.channels, most)
    choices = [n for n in divisors(state.channels) if n <= most and state.channels // n >= 2] or [1]
    return min(choices, key=lambda n: (round(predicted_group_drift(state, n), 6), n))


@dataclass(frozen=True)
class _Fixed(_Grouped):
    """One whose groups are settled by what it is."""

    eps: float | None = None

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        yield _eps_limit(self.eps)

    def settle(self, site: Site, norm: nn.Module) -> Self:
        del site
        return replace(self, eps=state_of(norm).eps if self.eps is None else self.eps)


@dataclass(frozen=True)
class LayerNorm(_Fixed):
    """Layer Normalization in the GN paper's sense: one group over C, H and W.

    ConvNeXt's ``LayerNorm2d`` (per pixel, over C) is another layer.

    Args:
        eps: ε; None keeps BN's.

    Reference:
        Ba, Kiros & Hinton 2016, arXiv 1607.06450; Wu & He 2018, section 3.1.
    """

    target: ClassVar[str] = "ln"

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        one_group = GroupNorm(groups=1, eps=self.eps)
        return one_group.build(norm, rank=rank, init=init, activation=activation)

    def drift(self, state: BatchNormState) -> float:
        return predicted_group_drift(state, 1)

    def sharing_at(self, state: BatchNormState) -> int | None:
        del state
        return 1


@dataclass(frozen=True)
class InstanceNorm(_Fixed):
    """Instance Normalization, ``torch.nn.InstanceNormNd`` with γ and β.

    It erases every sample's channel means and so cannot keep a pretrained function.

    Args:
        eps: ε; None keeps BN's.

    Reference:
        Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022.
    """

    target: ClassVar[str] = "in"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
    )

    def warnings(self, site: Site, *, init: str) -> tuple[str, ...]:
        erased = "instance norm erases each sample's channel means: fine-tune before use"
        return (erased, *super().warnings(site, init=init))

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        del activation
        state = state_of(norm)
        eps = state.eps if self.eps is None else self.eps
        cls = getattr(nn, f"InstanceNorm{max(rank, 1)}d")
        new = cls(state.channels, eps=eps, affine=True, **base.factory(norm))
        known = base.has_statistics(state)
        matched = match_groups(state, state.channels, eps) if known else None
        return base.take_over(norm, base.set_affine(norm, new, matched, init))

    def drift(self, state: BatchNormState) -> float:
        return predicted_group_drift(state, state.channels)

    def standardise(self, layer: Any, x: Tensor) -> Tensor:
        return F.instance_norm(x, eps=layer.eps)

    def scaled(self, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.instance_norm(x, weight=weight.to(x.dtype), eps=layer.eps)

    def sharing(self, layer: Any) -> None:
        del layer
