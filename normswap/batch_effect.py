"""What BatchNorm's own statistics would do at a batch size, on images: nothing is trained.

Two looks at the untouched model. In eval mode, layer by layer: how far the mean of a batch is from
the running one, and how much it varies from batch to batch. Then end to end: how many of its own
decisions the model keeps when every BatchNorm takes the statistics of a batch of that size, as it
does in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.copying import copied
from normswap.drift import Agreement
from normswap.errors import in_short
from normswap.graph import batchnorms
from normswap.graph.norms import state_of
from normswap.running import call, evaluating, hooked, input_of, leaves

_FEWEST = 8
"""Images that are looked at, however little time there is."""


@dataclass(frozen=True)
class SiteEffect:
    """One BatchNorm, in the running standard deviations of its channels; medians over channels.

    Attributes:
        name: qualified name.
        shift: distance of the images' own mean from the running one.
        noise: standard deviation of the means of random batches around the images' own mean.
    """

    name: str
    shift: float
    noise: float


@dataclass(frozen=True)
class BatchEffect:
    """What BatchNorm would do at a batch size.

    Attributes:
        batch_size: images that share statistics.
        images: images seen.
        sites: every BatchNorm with running statistics that ran, in the order of the modules.
        kept: share of the model's decisions that stay when batches of this size are normalised by
            their own statistics; one minus the outputs' relative error where nothing is decided;
            None where it cannot run so (``refused``).
        refused: why it cannot; None too where the images are fewer than one batch.
        judged: images that ``kept`` is of; fewer than ``images`` where time was short.
    """

    batch_size: int
    images: int
    sites: tuple[SiteEffect, ...]
    kept: float | None
    refused: str | None = None
    judged: int = 0

    @property
    def shift(self) -> float:
        """The median over the layers."""
        return _median([site.shift for site in self.sites])

    @property
    def noise(self) -> float:
        """The median over the layers."""
        return _median([site.noise for site in self.sites])


def measure_batch_effect(
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> BatchEffect:
    """Look at a model's BatchNorms at a batch size, on images.

    Args:
        model: the BatchNorm original; it is not changed.
        images: preprocessed, in any order, on the model's device.
        batch_size: images that share statistics.
        seconds: after which no further images are looked at.
        clock: what ``seconds`` are read from.

    Returns:
        BatchEffect: by layer and end to end.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> _ = net.train()(torch.randn(64, 3, 8, 8))
        >>> measure_batch_effect(net.eval(), torch.randn(32, 3, 8, 8), 2).batch_size
        2
    """
    begun = clock()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = images[order.to(images.device)]
    moments, outputs = _eval_moments(
        model, shuffled, batch_size, lambda: clock() - begun < seconds / 2
    )
    seen = shuffled[: sum(len(found[0]) for found in outputs)]
    kept, refused, judged = _kept_in_training_mode(
        model, seen, outputs, batch_size, lambda: clock() - begun < seconds
    )
    sites = tuple(_site(name, bn, parts, batch_size) for (name, bn), parts in moments.items())
    return BatchEffect(batch_size, len(seen), sites, kept, refused, judged)


Moments = dict[tuple[str, nn.Module], list[Tensor]]


@torch.no_grad()
def _eval_moments(
    model: nn.Module, images: Tensor, fewest: int, go_on: Callable[[], bool]
) -> tuple[Moments, list[list[Tensor]]]:
    """Every image's channel means before every BatchNorm, and what the model says."""
    found: Moments = {}
    hooks = []
    for bn, names in batchnorms(model).items():
        if state_of(bn).mean is not None:
            seen = found.setdefault((names[0], bn), [])
            hooks.append(bn.register_forward_pre_hook(_keep_means(seen), with_kwargs=True))
    outputs: list[list[Tensor]] = []
    with evaluating(model), hooked(*hooks):
        for at, batch in enumerate(torch.split(images, _FEWEST)):
            if at and at * _FEWEST >= fewest and not go_on():
                break
            outputs.append([leaf.clone() for leaf in leaves(call(model, batch.clone()))])
    return {key: parts for key, parts in found.items() if parts}, outputs


def _keep_means(seen: list[Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        seen.append(x.float().flatten(2).mean(2) if x.dim() > 2 else x.float())

    return hook


def _site(name: str, bn: nn.Module, parts: list[Tensor], batch_size: int) -> SiteEffect:
    """Means of independent images: a batch's mean varies by 1/b of what theirs do."""
    means, state = torch.cat(parts), state_of(bn)
    assert state.mean is not None
    assert state.var is not None
    unit = (state.var.float() + state.eps).sqrt()
    shift = (means.mean(0) - state.mean.float()).abs() / unit
    noise = means.std(0, correction=0) / unit / math.sqrt(batch_size)
    return SiteEffect(name, float(shift.median()), float(noise.median()))


@torch.no_grad()
def _kept_in_training_mode(
    model: nn.Module,
    images: Tensor,
    outputs: list[list[Tensor]],
    batch_size: int,
    go_on: Callable[[], bool],
) -> tuple[float | None, str | None, int]:
    """The share of decisions that stay under each batch's statistics, or why none; of how many."""
    twin = copied(model).eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.train()  # alone: dropout is another matter
    agreement, error, spread, at = Agreement(), 0.0, 0.0, 0
    said = [torch.cat(leaf) for leaf in zip(*outputs, strict=True)] if _alike(outputs) else []
    while at + batch_size <= len(images) and (at == 0 or go_on()):
        part = slice(at, at + batch_size)
        at += batch_size
        try:
            found = leaves(call(twin, images[part].clone()))
        except (RuntimeError, ValueError) as problem:  # one value per channel, mostly
            return None, in_short(problem), 0
        reference = [leaf[part] for leaf in said]
        agreement.add(found, reference)
        for ours, theirs in zip(found, reference, strict=False):
            error += float((ours - theirs).square().sum())
            spread += float((theirs - theirs.mean()).square().sum())
    if at == 0 or agreement.value is not None:
        return agreement.value, None, at
    if not spread:
        return None, "no outputs", 0
    return max(0.0, 1 - math.sqrt(error / spread)), None, at


def _alike(outputs: list[list[Tensor]]) -> bool:
    """Whether every batch gave as many outputs, one row an image."""
    return len({len(found) for found in outputs}) == 1 and all(
        leaf.dim() and len(leaf) == len(found[0]) for found in outputs for leaf in found
    )


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median()) if values else math.nan
