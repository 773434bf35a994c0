"""FRN, with a TLU wherever a ReLU followed the BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from normswap import checks, layers
from normswap.graph.norms import BatchNormState, fused_parts, state_of
from normswap.graph.sites import Site
from normswap.recipes import base
from normswap.recipes.matching import match_filter_response, predicted_filter_response_drift

_LINEAR = 1e3
"""ε over E[x²] that makes FRN on a tiny map nearly linear, as BN in eval mode is."""

_HARMLESS = 1e-4
"""Largest share of E[x²] that a learnable ε may start at on a map with statistics of its own."""


@dataclass(frozen=True)
class FilterResponseNorm(base.Recipe):
    """Filter Response Normalization, with a TLU in the place of the ReLU.

    Args:
        eps: ε inside the root.
        tlu: ``"auto"`` puts a TLU wherever the BN's only consumer is a ReLU that can be taken
            out; True takes only such sites; False leaves every activation as it is.
        learnable_eps: False: a fixed ε and, at maps of fewer than 4 elements, the fallback.
            ``"auto"``: a learnable ε at those maps alone, where it starts so large that FRN is
            nearly linear. True: a learnable ε everywhere.
        eps_share: share of E[x²] at which a learnable ε starts; settled per site.

    Reference:
        Singh & Krishnan 2019, Filter Response Normalization Layer, arXiv 1911.09737, section 3.
    """

    target: ClassVar[str] = "frn"
    fallback: ClassVar[str] = "frozen"
    per_sample: ClassVar[bool] = True
    evidence: ClassVar[str | None] = (
        "a matched frn kept 0.3 % of EfficientNet-Lite0's decisions, which is chance"
    )
    pace: ClassVar[float] = 5.0
    takes_as: ClassVar[str] = "TLU"
    layers: ClassVar[tuple[type[nn.Module], ...]] = base.ranks("FilterResponseNorm")

    eps: float = 1e-6
    tlu: Literal["auto"] | bool = "auto"
    learnable_eps: Literal["auto"] | bool = False
    eps_share: float = _HARMLESS

    @property
    def takes(self) -> frozenset[str]:
        return frozenset() if self.tlu is False else frozenset({"relu"})

    @property
    def insists(self) -> bool:
        return self.tlu is True

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        yield "eps", checks.above(self.eps, 0), "a number above 0"
        yield "eps_share", checks.number(self.eps_share, 0), "a number of at least 0"
        for name in ("tlu", "learnable_eps"):
            value = getattr(self, name)
            yield name, isinstance(value, bool) or value == "auto", "True, False or 'auto'"

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        del model
        if site.calls == 0:
            return base.NEVER_RAN
        return None if self.learnable_eps else base.needs_a_map(site)

    def settle(self, site: Site, norm: nn.Module) -> FilterResponseNorm:
        del norm
        tiny = base.needs_a_map(site) is not None
        learnable = tiny if self.learnable_eps == "auto" else self.learnable_eps
        return replace(self, learnable_eps=learnable, eps_share=_LINEAR if tiny else _HARMLESS)

    def warnings(self, site: Site, *, init: str) -> tuple[str, ...]:
        tiny = base.needs_a_map(site) is not None
        note = ("a map this small: FRN relies on its learnable ε",) if tiny else ()
        return (*base.affine_warnings(site, init), *note)

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        state = state_of(norm)
        parts = fused_parts(norm)
        # A dropout between norm and ReLU stays between them; the TLU then stands after it.
        tlu = activation is not None
        apart = tlu and parts is not None and not isinstance(parts[0], nn.Identity)
        new = base.ranked("FilterResponseNorm", rank)(
            state.channels,
            eps=self.eps,
            learnable_eps=bool(self.learnable_eps),
            tlu=tlu and not apart,
            **base.factory(norm),
        )
        eps = self._start_eps(new, state)
        matched = match_filter_response(state, eps) if eps is not None else None
        base.set_affine(norm, new, matched, init)
        frozen = [p for p in (state.weight, state.bias) if p is not None]
        if frozen and not any(p.requires_grad for p in frozen):
            new.requires_grad_(False)  # τ and ε too
        act: nn.Module | None = nn.Identity() if tlu else None
        if apart:
            act = layers.ThresholdedLinearUnit(state.channels, **base.factory(norm))
        return base.take_over(norm, new, act=act)

    def _start_eps(self, new: nn.Module, state: BatchNormState) -> Tensor | None:
        """The ε to match at, per channel; None without statistics. Sets a learnable ε to it."""
        if not base.has_statistics(state) or state.mean is None or state.var is None:
            return None
        power = state.var.detach().double() + state.mean.detach().double() ** 2
        learnt = self.eps_share * power if self.learnable_eps else torch.zeros_like(power)
        if isinstance(new.eps_l, nn.Parameter):
            with torch.no_grad():
                new.eps_l.copy_(learnt)
        return self.eps + learnt

    def drift(self, state: BatchNormState) -> float:
        return predicted_filter_response_drift(state)

    def standardise(self, layer: Any, x: Tensor) -> Tensor:
        return layers.plain_filter_response_norm(x, None, None, None, layer.eps_l, layer.eps)

    def scaled(self, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        return layers.filter_response_norm(x, weight, None, None, layer.eps_l, layer.eps)

    def standalone(self, layer: Any) -> str:
        learnable, tlu = layer.eps_l is not None, layer.tau is not None
        options = f"eps={layer.eps!r}, learnable_eps={learnable}, tlu={tlu}"
        return f"FilterResponseNorm({layer.num_features}, {options})"

    def taken(self, layer: Any) -> str | None:
        return None if layer.tau is None else "relu"
