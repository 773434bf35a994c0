"""The targets that are BatchNorm itself: synchronised, frozen, and plain again."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from normswap import layers
from normswap.graph.norms import fused_parts, state_of
from normswap.graph.sites import Site
from normswap.recipes import base

_PLAIN = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d"})
_SYNCHRONISED = frozenset({"SyncBatchNorm", "SyncBatchNormAct"})


@dataclass(frozen=True)
class SyncBatchNorm(base.Recipe):
    """BatchNorm over all processes: ``torch.nn.SyncBatchNorm``, or timm's with an activation.

    It trains on GPUs only; in eval mode it is BN everywhere.
    """

    target: ClassVar[str] = "syncbn"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.SyncBatchNorm,)

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        del model
        if site.calls == 0:
            return base.NEVER_RAN
        if site.kind in _SYNCHRONISED:
            return "it is SyncBatchNorm already"
        return _no_fused_class(site)

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        del rank, init, activation
        return _standard(
            norm, layers.SyncBatchNorm, ("normswap.layers.sync_batch_norm_act", "SyncBatchNormAct")
        )


@dataclass(frozen=True)
class FrozenBatchNorm(base.Tracked):
    """BatchNorm in eval form for good.

    Args:
        trainable: γ and β keep their gradient flags; False freezes them too.
    """

    target: ClassVar[str] = "frozen"
    family: ClassVar[str] = "FrozenBatchNorm"
    layers: ClassVar[tuple[type[nn.Module], ...]] = base.ranks("FrozenBatchNorm")

    trainable: bool = True

    @property
    def buffers_beside_parameters(self) -> bool:
        """Only while γ and β are trained."""
        return self.trainable

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        new = super().build(norm, rank=rank, init=init, activation=activation)
        if not self.trainable:
            for name, parameter in list(new.named_parameters(recurse=False)):
                # A parameter of its own: the original's gradient flag is not ours to change.
                fixed = nn.Parameter(parameter.detach(), requires_grad=False)
                new.register_parameter(name, fixed)
        return new

    def settings(self, norm: nn.Module) -> dict[str, Any]:
        del norm
        return {}


@dataclass(frozen=True)
class BatchNorm(base.Recipe):
    """Plain BatchNorm again, from ``brn``, ``cbn``, ``frozen`` or ``syncbn``, exactly."""

    target: ClassVar[str] = "bn"

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        del model
        if site.calls == 0 and site.kind in _SYNCHRONISED:
            return base.NEVER_RAN  # which of BatchNorm1d, 2d and 3d it would be is not known
        return "it is BatchNorm already" if site.kind in _PLAIN else _no_fused_class(site)

    def build(
        self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
    ) -> nn.Module:
        del init, activation
        cls = getattr(nn, f"BatchNorm{max(rank, 1)}d")
        return _standard(norm, cls, ("timm.layers.norm_act", "BatchNormAct2d"))


def _no_fused_class(site: Site) -> str | None:
    fused = site.activation is not None and site.activation.fused
    apart = fused and site.rank != 2
    return "a BatchNorm that carries its activation exists for 2d maps only" if apart else None


def _standard(norm: nn.Module, cls: type[nn.Module], fused: tuple[str, str]) -> nn.Module:
    """A BatchNorm of class ``cls``; if ``norm`` carries an activation, of the one that does too.

    ``fused`` is the module and the name of that class, which is imported only then.
    """
    state = state_of(norm)
    parts = fused_parts(norm)
    if parts is not None:
        home, name = fused
        cls = getattr(importlib.import_module(home), name)
    new = cls(
        state.channels,
        eps=state.eps,
        momentum=base.origin_of(norm)["momentum"],
        affine=state.weight is not None,
        track_running_stats=state.mean is not None,
        **base.factory(norm),
    )
    if parts is not None:
        new.drop, new.act = parts
    return base.take_over(norm, base.share_tensors(norm, new))
