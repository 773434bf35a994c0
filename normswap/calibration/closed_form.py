"""What is solved rather than searched: scales and weights of the producers, γ and β.

First the original is run once, and every producer's channels get the scales with which the group
statistics behind them are steady. Then original and copy go through the network in lockstep, and
each γ and β is set from what really arrives, upstream first; on the way the producers' weights may
be corrected by ridge regression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.calibration.flow import Scale, linear_output, own_parameters
from normswap.calibration.lockstep import Ahead, Stop, lanes, stop_after, stop_before, stops
from normswap.calibration.regression import ROWS, Regression
from normswap.calibration.steady import Moments, steady_scales
from normswap.calibration.variety import varied
from normswap.drift import Pair, paired_sites
from normswap.graph import Movable, call, movable_producers
from normswap.graph.norms import state_of
from normswap.recipes import recipe_of
from normswap.running import copied, evaluating, first, hooked, input_of

Batches = Sequence[Any]
_LEAST = 0.5
"""A channel keeps this share of its spread, however little of it is the original's."""
_ENOUGH, _MADE = 256, 192
"""Samples beyond which more say little about the scales; of every kind that is made of them."""


# --- scales ---------------------------------------------------------------------------------------


@torch.no_grad()
def steady(
    pairs: tuple[Pair, ...],
    producers: dict[str, Movable],
    moments: Mapping[str, Moments],
    expired: Callable[[], bool] = lambda: False,
) -> None:
    """Scale the producers in front of norms that share statistics.

    γ changes its sign with its channel's and is otherwise left to whoever sets it next.

    Args:
        pairs: the replaced sites.
        producers: what may be scaled, by the site behind it.
        moments: what :func:`moments_before` found.
        expired: whether to leave the others as they are; asked at every one.
    """
    for pair, groups in _sharing(pairs, producers):
        if expired():
            return
        if pair.name not in moments:
            continue
        gain = state_of(pair.original).weight
        found = moments[pair.name]
        gain = torch.ones_like(found.spread) if gain is None else gain.detach().float().abs()
        change = producers[pair.name].scale(steady_scales(found, gain, groups))
        own = own_parameters(pair.module)
        if "weight" in own:
            own["weight"].mul_(change.sign().to(own["weight"]))


def _sharing(pairs: tuple[Pair, ...], producers: Mapping[str, Movable]) -> list[tuple[Pair, int]]:
    """Sites whose channels share statistics behind a producer, and in how many groups."""
    recipes = [(pair, recipe_of(pair.module)) for pair in pairs if pair.name in producers]
    groups = [(pair, None if r is None else r.sharing(pair.module)) for pair, r in recipes]
    return [(pair, number) for pair, number in groups if number]


@torch.no_grad()
def moments_before(
    pairs: tuple[Pair, ...],
    producers: Mapping[str, Movable],
    teacher: nn.Module,
    batches: Batches,
    draw: torch.Generator,
    expired: Callable[[int], bool] = lambda _: False,
) -> dict[str, Moments]:
    """Every sample's moments before the original's norms, of images and of more kinds of them.

    Args:
        pairs: the replaced sites; those that can be scaled count.
        producers: what may be scaled, by the site behind it.
        teacher: the original.
        batches: what it is called with; beyond ``_ENOUGH`` samples they are left out.
        draw: of the images that are made from them.
        expired: whether there is no time for one more of these, after so many batches.
    """
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    wanted = [pair for pair, _ in _sharing(pairs, producers)]
    if not wanted:
        return {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs).detach().float().flatten(2)
            rows.setdefault(name, []).append((x.mean(2), x.square().mean(2)))

        return hook

    hooks = [
        p.original.register_forward_pre_hook(hook_for(p.name), with_kwargs=True) for p in wanted
    ]
    with hooked(*hooks):
        given = first(batches, _ENOUGH)
        for number, batch in enumerate(varied(given, _MADE, draw)):
            if number >= len(given) and expired(number):
                break
            call(teacher, copied(batch))
    joined = {n: [torch.cat(part) for part in zip(*r, strict=True)] for n, r in rows.items()}
    return {name: Moments(*parts) for name, parts in joined.items() if len(parts[0]) > 1}


# --- in lockstep ----------------------------------------------------------------------------------


class Fit:
    """What is done at each stop of a walk in lockstep; it remembers what earlier walks saw.

    Args:
        pairs: the replaced sites that run once in a forward.
        producers: those whose weights are corrected, by site; none sets γ and β alone.
        draw: which positions the regression looks at.
    """

    def __init__(
        self, pairs: tuple[Pair, ...], producers: dict[str, Movable], draw: torch.Generator
    ) -> None:
        self.pairs = {pair.name: pair for pair in pairs}
        found = {name: Regression(producer) for name, producer in producers.items()}
        self.regressions = {producers[n].name: r for n, r in found.items() if r.possible}
        self.producers = {p.name: p for p in producers.values() if p.name in self.regressions}
        self.draw = draw
        self.begin(1)

    def begin(self, count: int) -> None:
        """Of so many lanes the last quarter chooses the strengths of the regressions."""
        self.held = [count > 1 and index >= count - max(1, count // 4) for index in range(count)]
        self.scales: dict[str, Scale] = {}

    def hooks(self) -> list[Any]:
        """On both models, where the lanes are to stop."""
        found = []
        for name, producer in self.producers.items():
            found.append(
                producer.module.register_forward_pre_hook(stop_before(name), with_kwargs=True)
            )
            found.append(producer.original.register_forward_hook(stop_after(name)))
        for name, pair in self.pairs.items():
            stop = stop_before(name)
            found.append(pair.module.register_forward_pre_hook(stop, with_kwargs=True))
            found.append(pair.original.register_forward_pre_hook(stop, with_kwargs=True))
        return found

    def at(self, stop: Stop, values: list[Tensor], ahead: Ahead) -> None:
        """All lanes of the copy stand at ``stop`` with these values."""
        name = stop[1]
        if name in self.regressions:
            wanted = ahead.take(("after", name))
            if wanted is not None:
                self._correct(name, values, wanted)
        elif name not in self.scales:
            wanted = ahead.take(stop)
            if wanted is not None:
                self._set_norm(self.pairs[name], values, wanted)

    def _correct(self, name: str, inputs: list[Tensor], wanted: list[Tensor]) -> None:
        regression = self.regressions[name]
        share = ROWS // max(1, sum(len(x) for x in inputs))
        for x, aim, held in zip(inputs, wanted, self.held, strict=True):
            regression.add(x, aim, max(4, share) * len(x), held=held, draw=self.draw)
        regression.move()

    def _set_norm(self, pair: Pair, inputs: list[Tensor], wanted: list[Tensor]) -> None:
        recipe = recipe_of(pair.module)
        if recipe is None:
            return
        found = _Joint()
        for x, original in zip(inputs, wanted, strict=True):
            standard = recipe.standardise(pair.module, x)
            if standard is None:
                return
            found.add(standard, recipe.aim(pair.module, linear_output(pair.original, original)))
        self.scales[pair.name] = _set_from(pair, found)


def _set_from(pair: Pair, found: _Joint) -> Scale:
    """γ and β by the spread and the correlation of x̂ and the original's output."""
    mean, std = found.mean[0], found.std[0]
    std = std.clamp_min(1e-4 * std.max().clamp_min(1e-6))
    own = own_parameters(pair.module)
    if "weight" in own and "bias" in own:
        slope = own["weight"].sign() * found.std[1] / std * found.kept
        own["weight"].copy_(slope)
        own["bias"].copy_(found.mean[1] - slope * mean)
    return Scale(mean, std, found.std[1])


class _Joint:
    """Means, spreads and correlation by channel of two tensors that come in pieces."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._means: list[Tensor] = []  # (2, C)
        self._products: list[Tensor] = []  # (2, 2, C), about the piece's own means

    def add(self, x: Tensor, y: Tensor) -> None:
        rows = torch.stack([t.detach().float().transpose(0, 1).flatten(1) for t in (x, y)])
        means = rows.mean(2)
        rows -= means[..., None]
        # ten times faster on a CPU than Tensor.var
        own = torch.linalg.vector_norm(rows, dim=2).square()
        both = torch.linalg.vecdot(rows[0], rows[1])
        count = rows.shape[2]
        self._counts.append(count)
        self._means.append(means)
        self._products.append(torch.stack([own[0], both, both, own[1]]).view(2, 2, -1) / count)

    def _weighted(self, parts: list[Tensor]) -> Tensor:
        total = sum(self._counts)
        pieces = [part * (count / total) for part, count in zip(parts, self._counts, strict=True)]
        return torch.stack(pieces).sum(0)

    @property
    def mean(self) -> Tensor:
        return self._weighted(self._means)

    @property
    def _covariance(self) -> Tensor:
        apart = [means - self.mean for means in self._means]
        moved = [p + d[:, None] * d[None] for p, d in zip(self._products, apart, strict=True)]
        return self._weighted(moved)

    @property
    def std(self) -> Tensor:
        return self._covariance.diagonal(dim1=0, dim2=1).T.clamp_min(0).sqrt()

    @property
    def kept(self) -> Tensor:
        """The share of the slope that keeps the spread with which a channel errs least."""
        std = self.std
        correlation = self._covariance[0, 1].abs() / (std[0] * std[1]).clamp_min(1e-12)
        return correlation.clamp(_LEAST, 1)


@torch.no_grad()
def in_lockstep(
    fit: Fit,
    models: tuple[nn.Module, nn.Module],
    batches: Batches,
    expired: Callable[[], bool] = lambda: False,
) -> dict[str, Scale] | None:
    """Correct producers and set γ and β in the order in which the layers run.

    Args:
        fit: what to do.
        models: copy and original.
        batches: one lane each.
        expired: whether to give up; asked at every stop.

    Returns:
        Where every layer works, by site; None if it gave up, with the work half done.
    """
    model, teacher = models
    fit.begin(len(batches))
    with (
        hooked(*fit.hooks()),
        lanes(model, [copied(batch) for batch in batches]) as ours,
        lanes(teacher, [copied(batch) for batch in batches]) as theirs,
    ):
        ahead = Ahead(theirs)
        for stop, values, _ in stops(ours):
            if expired():
                return None
            fit.at(stop, values, ahead)
    return fit.scales


# --- every site by itself -------------------------------------------------------------------------


def solve_alone(
    model: nn.Module, teacher: nn.Module, batches: Batches, moments: Mapping[str, Moments]
) -> dict[str, Movable]:
    """Scales, γ and β of every site from what the original feeds it, in place.

    So each site, with its producer, is what it would be if it were the only one that is converted.

    Args:
        model: the converted model.
        teacher: its original.
        batches: what the original is called with.
        moments: before its norms, of :func:`moments_alone`.

    Returns:
        The producers that may have been scaled, by the name of the site behind them.
    """
    pairs, producers, once = _replaced(model, teacher, batches[0])
    with evaluating(model, teacher):
        steady(pairs, producers, moments)
        _set_alone(once, producers, teacher, batches)
    return producers


def moments_alone(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    draw: torch.Generator,
    expired: Callable[[int], bool] = lambda _: False,
) -> dict[str, Moments]:
    """What :func:`solve_alone` needs to know of the original; see :func:`moments_before`."""
    pairs, producers, _ = _replaced(model, teacher, batches[0])
    with evaluating(teacher):
        return moments_before(pairs, producers, teacher, batches, draw, expired)


@torch.no_grad()
def _set_alone(
    pairs: tuple[Pair, ...], producers: dict[str, Movable], teacher: nn.Module, batches: Batches
) -> None:
    found: dict[str, _Joint] = {}

    def hook_for(pair: Pair) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, recipe = input_of(args, kwargs), recipe_of(pair.module)
            producer = producers.get(pair.name)
            louder = x if producer is None else by_channel(producer.loudness(), x) * x
            standard = None if recipe is None else recipe.standardise(pair.module, louder)
            if recipe is not None and standard is not None:
                aim = recipe.aim(pair.module, linear_output(pair.original, x))
                found.setdefault(pair.name, _Joint()).add(standard, aim)

        return hook

    hooks = [p.original.register_forward_pre_hook(hook_for(p), with_kwargs=True) for p in pairs]
    with hooked(*hooks):
        for batch in batches:
            call(teacher, copied(batch))
    for pair in pairs:
        if pair.name in found:
            _set_from(pair, found[pair.name])


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) against (N, C, …)."""
    return values.view(-1, *[1] * (x.dim() - 2)).to(x)


def _replaced(
    model: nn.Module, teacher: nn.Module, batch: Any
) -> tuple[tuple[Pair, ...], dict[str, Movable], tuple[Pair, ...]]:
    pairs = tuple(pair for pair in paired_sites(model, teacher) if pair.replaced)
    producers, once = movable_producers((p.name for p in pairs), model, teacher, batch)
    return pairs, producers, tuple(pair for pair in pairs if pair.name in once)
