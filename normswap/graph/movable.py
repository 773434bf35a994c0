"""The convolutions in front of the replaced norms: which may move, and how.

Only what a site alone reads may move, and only where the module runs on the weight that it stores.
What moves stays a weight of the same name and shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normswap.errors import WalkError
from normswap.graph.norms import state_of
from normswap.graph.sites import Site
from normswap.graph.walker import walk
from normswap.layers import producer_problem


@dataclass(frozen=True)
class Movable:
    """The module that makes a site's input, in both models.

    Attributes:
        name: its qualified name.
        module: the one in the converted model, which moves.
        original: the one in the original.
    """

    name: str
    module: nn.Module
    original: nn.Module

    @property
    def tensors(self) -> list[nn.Parameter]:
        """What moves of it."""
        found = (self.module.weight, self.module.bias)
        return [p for p in found if isinstance(p, nn.Parameter)]

    def scale(self, factors: Tensor) -> Tensor:
        """Make the output's channels so many times the original's; returns what that took."""
        loudness = self.loudness()
        relative = factors.to(loudness) / loudness
        weight, bias = self.module.weight, self.module.bias
        assert isinstance(weight, Tensor)
        weight.mul_(relative.view(self._shape()).to(weight))
        if isinstance(bias, Tensor):
            bias.mul_(relative.to(bias))
        return relative

    def loudness(self) -> Tensor:
        """By what factor each channel is louder than the original's: 1 after a conversion."""
        ours, theirs = (self._rows(m.weight) for m in (self.module, self.original))
        found = (ours * theirs).sum(1) / theirs.square().sum(1).clamp_min(1e-30)
        sound = found.isfinite() & (found.abs() > 1e-6)
        return torch.where(sound, found, torch.ones_like(found))

    def _rows(self, weight: Any) -> Tensor:
        rows: Tensor = weight.detach().float()
        return (rows.transpose(0, 1) if self._transposed else rows).flatten(1)

    @property
    def _transposed(self) -> bool:
        return isinstance(self.module, _ConvTransposeNd)

    def _shape(self) -> list[int]:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        ones = [1] * weight.dim()
        ones[1 if self._transposed else 0] = -1
        return ones


def movable_producers(
    names: Iterable[str], model: nn.Module, teacher: nn.Module, batch: Any
) -> tuple[dict[str, Movable], set[str]]:
    """What may move in front of each site, by the site's name; and the sites that run once."""
    try:
        graph = walk(teacher, batch)
    except WalkError:
        return {}, set()
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, teacher))
    owners = _owners(model)
    wanted = set(names)
    found, once = {}, set()
    for site in graph:
        name = next((n for n in site.names if n in wanted), None)
        if name is None or site.calls != 1:
            continue
        once.add(name)
        if site.producer is None or not _alone(site):
            continue
        module, original = ours.get(site.producer.name), theirs[site.producer.name]
        if module is not None and _may_move(module, original, owners):
            found[name] = Movable(site.producer.name, module, original)
    return found, once


def scalable(site: Site, norm: nn.Module, model: nn.Module) -> str | None:
    """The module whose channels may be scaled if this BatchNorm's statistics are, by its name."""
    producer, state = site.producer, state_of(norm)
    own = [t for t in (state.weight, state.bias, state.mean, state.var) if t is not None]
    if site.calls != 1 or producer is None or not _alone(site) or len(own) < 4:
        return None
    module, owners = model.get_submodule(producer.name), _owners(model)
    tensors = [*own, *module.parameters(recurse=False)]
    sound = all(not t.is_meta and not t.is_inference() for t in tensors)
    tied = any(owners[id(t)] > 1 for t in own)
    return producer.name if sound and not tied and _may_move(module, module, owners) else None


def _owners(model: nn.Module) -> Counter[int]:
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def _alone(site: Site) -> bool:
    producer = site.producer
    assert producer is not None
    stored = producer.plain or producer.kind == "Conv2dSame"
    by_itself = producer.alone and not producer.shared and not producer.around
    return producer.calls == 1 and stored and by_itself


def _may_move(module: nn.Module, original: nn.Module, owners: Counter[int]) -> bool:
    if type(module) is not type(original) or producer_problem(module) is not None:
        return False
    own = list(module.parameters(recurse=False))
    if not all(isinstance(m.weight, nn.Parameter) for m in (module, original)):
        return False  # weight_norm and its like make it anew for each forward
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        return False
    return all(p.requires_grad and owners[id(p)] == 1 for p in own)
