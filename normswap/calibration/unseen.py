"""Steady scales for producers where there are no images: made-up samples say what goes together.

A network fed with noise leaves its usual range from layer to layer. Not so where every BatchNorm's
input is first brought to the running moments: then each layer works where it works on real samples,
and what its channels do to a sample's statistics together is a matter of the weights. Producer and
BatchNorm are then rewritten exactly, ``w_c ← s_c·w_c``, ``μ_c ← s_c·μ_c``, ``σ²_c ← s_c²·σ²_c``,
so that whoever matches the BatchNorm next matches one whose channels are scaled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.calibration.steady import Moments, steady_scales
from normswap.errors import SwapError, WalkError, some
from normswap.graph import Movable, call
from normswap.graph.norms import BatchNormState, is_batchnorm, state_of
from normswap.planning import Plan, inputs_for
from normswap.recipes.base import has_statistics
from normswap.running import evaluating, hooked, input_of

_log = logging.getLogger("normswap")

_SAMPLES, _FEWEST = 128, 8
_NUMBERS = 5_000_000
"""Input values of one pass."""
_WIDE = 64
"""Sides from here on are halved: four times the samples say more than samples of the full size."""
_PULL = 0.5
"""Towards equal loudness, of scales from samples that are none."""
_PATCHES = 40
"""Most patches that cover a sample."""

Made = Callable[[list[int], torch.Generator], Tensor]


@dataclass(frozen=True)
class _Site:
    name: str
    norm: nn.Module
    producer: Movable
    groups: int

    @property
    def own(self) -> list[Tensor]:
        """What is rewritten of the BatchNorm."""
        state = state_of(self.norm)
        return [t for t in (state.mean, state.var, state.weight) if t is not None]


@contextmanager
def scaled(model: nn.Module, plan: Plan, example_inputs: Any) -> Iterator[None]:
    """The same function with other scales in front of the BatchNorms that ``plan`` says.

    The BatchNorms are rewritten for the block alone, in which they are replaced; the producers
    stay as they became, unless it raises.

    Args:
        model: that the plan was made for.
        plan: which producers get scales.
        example_inputs: what the model is called with; None: what it remembers.

    Raises:
        PlanError: some do, and nothing says what the model is called with.
        SwapError: the plan does not fit the model.
    """
    if not any(entry.scaled for entry in plan):
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        modules = dict(model.named_modules(remove_duplicate=False))
        sites = _sites(modules, plan)
        # a plan names calls that are no modules, too
        norms = [m for m in map(modules.get, (e.name for e in plan)) if m and is_batchnorm(m)]
        moments = _of_noise(model, sites, norms, inputs_for(model, example_inputs))
        _tell_of_others([site.name for site in sites if site.name not in moments])
        own = [(t, t.clone()) for site in sites for t in site.own]
        weights = [(t, t.clone()) for site in sites for t in site.producer.tensors]
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            for site in sites:
                if site.name in moments:
                    _rewrite(site, moments[site.name])
        yield
    except BaseException:
        _put_back(weights)
        raise
    finally:
        _put_back(own)


def _tell_of_others(names: list[str]) -> None:
    if names:
        _log.warning(
            "%s: matched without steady scales: the model does not take made-up samples, or they "
            "do not say what goes together there",
            some(names, 1),
        )


def _put_back(values: list[tuple[Any, Tensor]]) -> None:
    with torch.inference_mode(mode=False), torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)


def _sites(modules: Mapping[str, nn.Module], plan: Plan) -> list[_Site]:
    found = []
    for entry in plan.swapped:
        if entry.scaled is None or entry.recipe is None:
            continue
        norm, producer = (modules.get(name) for name in (entry.name, entry.scaled))
        if norm is None or producer is None or _outputs(producer) != entry.channels:
            raise SwapError(
                entry.scaled,
                got=f"{type(producer).__name__} in front of {entry.name}",
                need=f"the convolution of {entry.channels} channels that the plan was made for",
                hint="a new plan for this model",
            )
        groups = entry.recipe.sharing_at(state_of(norm))
        if groups is not None:
            movable = Movable(entry.scaled, producer, producer)
            found.append(_Site(entry.name, norm, movable, groups))
    return found


def _outputs(module: nn.Module) -> int:
    found = getattr(module, "out_channels", getattr(module, "out_features", 0))
    return found if isinstance(found, int) else 0


def _rewrite(site: _Site, moments: Moments) -> None:
    state = state_of(site.norm)
    mean, var, weight = state.mean, state.var, state.weight
    assert mean is not None
    assert var is not None
    assert weight is not None
    scales = steady_scales(moments, weight.float().abs(), site.groups, _PULL).double()
    if not (scales.isfinite() & (scales != 0)).all():
        return
    site.producer.scale(scales.float())
    old = var.double() + state.eps
    new = var.double() * scales.square() + state.eps
    weight.mul_(((new / old).sqrt() / scales).to(weight))  # ε stays, so γ makes up for it
    mean.mul_(scales.to(mean))
    var.mul_(scales.square().to(var))


# --- what noise says ------------------------------------------------------------------------------


def _of_noise(
    model: nn.Module, sites: list[_Site], norms: list[nn.Module], inputs: Any
) -> dict[str, Moments]:
    """Moments of made-up samples; none where the model does not take them."""
    known = [norm for norm in dict.fromkeys(norms) if has_statistics(state_of(norm))]
    for smaller in (2, 1):  # not every model takes a smaller size
        draw = torch.Generator().manual_seed(0)
        batches = [_made_like(inputs, made, draw, smaller) for made in (_white, _patches)]
        if any(batch is None for batch in batches):
            return {}
        found: dict[nn.Module, list[Moments]] = {site.norm: [] for site in sites}
        hooks = [norm.register_forward_pre_hook(_hook(found), with_kwargs=True) for norm in known]
        with hooked(*hooks), evaluating(model):
            try:
                for batch in batches:
                    call(model, batch)
            except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, WalkError):
                _log.debug("noise of this size is refused", exc_info=True)
                continue
        joined = {site.name: _joined(found[site.norm]) for site in sites if found[site.norm]}
        return {name: moments for name, moments in joined.items() if moments is not None}
    return {}


def _hook(found: dict[nn.Module, list[Moments]]) -> Any:
    """Note a sample's moments, and bring the input to those that the BatchNorm remembers."""

    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, state = input_of(args, kwargs), state_of(norm)
        seen = x.float().flatten(2)
        mean = seen.mean(2)
        # ten times faster on a CPU than Tensor.var
        square = torch.linalg.vector_norm(seen, dim=2).square() / seen.shape[2]
        moments, instead = _in_place_of(x, Moments(mean, square), state)
        if norm in found:
            found[norm].append(moments)
        return (instead,), {}

    return hook


def _in_place_of(x: Tensor, seen: Moments, state: BatchNormState) -> tuple[Moments, Tensor]:
    """What stands in the place of ``x``, of the running moments, and its samples' moments."""
    assert state.mean is not None
    assert state.var is not None
    level, running = state.mean.float(), state.var.float().clamp_min(0)
    centre = seen.mean.mean(0)
    spread = (seen.square.mean(0) - centre.square()).clamp_min(0)
    gain = ((running + state.eps) / (spread + state.eps)).sqrt()
    mean = level + gain * (seen.mean - centre)
    var = (seen.square - seen.mean.square()).clamp_min(0) * gain.square()
    slope = (running + state.eps).sqrt()
    instead = F.batch_norm(x.float(), centre, spread, slope, level, False, 0.0, state.eps)
    return Moments(mean, var + mean.square()), instead.to(x)


def _joined(parts: list[Moments]) -> Moments | None:
    found = Moments(torch.cat([p.mean for p in parts]), torch.cat([p.square for p in parts]))
    sound = found.mean.isfinite().all() and found.square.isfinite().all()
    return found if sound and len(found.mean) >= _FEWEST else None


def _made_like(inputs: Any, made: Made, draw: torch.Generator, smaller: int) -> Any:
    """A batch of the form of ``inputs``: one tensor, or a list of images; None for any other.

    Sides of ``_WIDE`` or more are ``smaller`` times shorter.
    """
    one = isinstance(inputs, (tuple, list)) and len(inputs) == 1
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], Tensor):
        like = inputs[0][None]
    elif isinstance(inputs, Tensor) or (one and isinstance(inputs[0], Tensor)):
        like = inputs if isinstance(inputs, Tensor) else inputs[0]
    else:
        return None
    if not like.is_floating_point() or like.dim() < 3:
        return None
    sides = [side // smaller if side >= _WIDE else side for side in like.shape[2:]]
    numbers = like.shape[1] * math.prod(sides)
    count = max(_FEWEST, min(_SAMPLES, _NUMBERS // max(1, numbers)))
    batch = made([count, like.shape[1], *sides], draw).to(like)
    if isinstance(inputs, list):
        return list(batch.sigmoid())
    return (batch,) if isinstance(inputs, tuple) else batch


def _white(shape: list[int], draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw)


def _patches(shape: list[int], draw: torch.Generator) -> Tensor:
    """Boxes over boxes, each of a colour and a roughness of its own."""
    batch = torch.empty(shape)
    for sample in batch:
        size = sample.shape[1:]
        column = [shape[1], *[1] * len(size)]
        sample[:] = torch.randn(column, generator=draw)
        rough = torch.randn(sample.shape, generator=draw)
        count = 3 + int(torch.randint(_PATCHES - 3, (), generator=draw))
        reach = torch.rand(count, generator=draw).pow(3).sort(descending=True).values
        for share in (0.05 + 0.9 * reach).tolist():
            place = _box(list(size), share, draw)
            colour = torch.randn(column, generator=draw)
            roughness = 0.7 * torch.rand((), generator=draw).square()
            sample[place] = colour + roughness * rough[place]
    return batch


def _box(size: list[int], share: float, draw: torch.Generator) -> tuple[slice, ...]:
    """Around a random place, of about that share of every side."""
    found = [slice(None)]
    for side in size:
        half = share * side * (0.3 + 0.7 * float(torch.rand((), generator=draw))) / 2
        middle = side * float(torch.rand((), generator=draw))
        start = max(0, min(side - 1, round(middle - half)))
        found.append(slice(start, max(start + 1, round(middle + half))))
    return tuple(found)
