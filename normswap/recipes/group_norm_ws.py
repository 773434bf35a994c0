"""GN-WS: GroupNorm behind a convolution whose weight is standardised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from normswap import layers
from normswap.graph.norms import BatchNormState, state_of
from normswap.graph.sites import Site
from normswap.layers.weight_standardisation import EPS
from normswap.recipes import base
from normswap.recipes.group_norm import GroupNorm
from normswap.recipes.matching import match_groups, population

_ROUNDING = 1e-9
"""A filter's mean whose square is this small a part of its variance explains nothing."""


@dataclass(frozen=True)
class WeightStandardisedGroupNorm(GroupNorm):
    """GroupNorm, with the weight of the convolution before it standardised.

    A BatchNorm without a plain convolution of its own gets ``gn``. The match is coarse: what a
    filter's mean contributes is lost, and how much that was is estimated from all channels
    together. Export and ``unwrap`` fold the standardisation into plain weights.

    Args:
        groups: number of groups, as :class:`GroupNorm` takes it.
        max_groups: the bound to use in place of the paper's 32.
        eps: ε of the GroupNorm; None keeps BN's.
        channels_per_group: in the place of ``groups``: how many channels a group has.

    Reference:
        Qiao et al. 2019, Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, arXiv 1903.10520, section 3.
    """

    target: ClassVar[str] = "gn-ws"
    fallback: ClassVar[str] = "gn"
    wired: ClassVar[bool] = True
    layers: ClassVar[tuple[type[nn.Module], ...]] = ()  # they are GroupNorm's

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        refusal = base.needs_a_map(site) or base.needs_a_producer(site)
        if refusal is not None or site.producer is None:
            return refusal
        conv = model.get_submodule(site.producer.name)
        if type(conv) not in layers.standardised_classes or site.producer.around:
            return f"{site.producer.kind} is no plain convolution"
        if not site.producer.plain:
            return f"{site.producer.kind} does not run on its stored weight"
        weight = conv.get_parameter("weight")
        return "its filters have one element each" if weight[0].numel() == 1 else None

    def warnings(self, site: Site, *, init: str) -> tuple[str, ...]:
        lost = "weight standardisation drops the mean of every filter: calibrate or fine-tune"
        return (lost, *super().warnings(site, init=init))

    def wire(
        self, layer: nn.Module, producer: nn.Module, *, norm: nn.Module, init: str
    ) -> Callable[[], None]:
        before = type(producer)
        state = state_of(norm)
        if init == "match" and base.has_statistics(state) and not base.on_meta(producer):
            groups = self.groups_for(state)
            eps = state.eps if self.eps is None else self.eps
            behind = _behind_standardised(state, producer)
            base.set_affine(norm, layer, match_groups(behind, groups, eps), init)
        producer.__class__ = layers.standardised_classes[before]

        def undo() -> None:
            producer.__class__ = before

        return undo

    def drift(self, state: BatchNormState) -> None:
        del state  # it depends on the filters, of which the statistics say nothing


def _behind_standardised(state: BatchNormState, conv: Any) -> BatchNormState:
    """The BatchNorm that would compute the same if the filters of ``conv`` were standardised.

    With filters of mean m and deviation s, the output x = Σ w·p + b of the convolution becomes
    (x − b − m·P)/s + b, where P is the sum of the patch p. All channels of a group of the
    convolution see the same patches: E[P] is that which explains their means best.
    """
    bn = population(state)
    rows = conv.weight.detach().double().flatten(1)
    middle = rows.mean(1)
    deviation = (rows.var(1, correction=0) + EPS).sqrt()
    bias = 0.0 if conv.bias is None else conv.bias.detach().double()
    offset, by_group = bn.mean - bias, middle.view(conv.groups, -1)
    explained = (offset.view_as(by_group) * by_group).sum(1, keepdim=True)
    certain = by_group.square() + _ROUNDING * deviation.view_as(by_group).square()
    patch = explained / certain.sum(1, keepdim=True)
    mean = (offset - (by_group * patch).flatten()) / deviation + bias
    var = bn.var / deviation**2
    weight: Tensor = bn.slope * deviation * (var + state.eps).sqrt()
    return replace(state, mean=mean, var=var, weight=weight, bias=bn.bias)
