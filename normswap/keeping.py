"""Convert as many layers as a share of the original's decisions allows; the others stay frozen.

What every site's error does to the outputs is measured first, to second order, from a few backward
passes for all sites together: by itself, and beside the others'. Then those are converted that cost
least together, each solved in closed form by itself, and judged on images on which they were not
solved; how many there can be is searched from what they cost. What is left becomes ``frozen``,
which needs no batch either and is exactly BatchNorm.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap import pictures, swap
from normswap.calibration import (
    moments_alone,
    scaled,
    solve_alone,
    taken,
)
from normswap.calibration.steady import Moments
from normswap.drift import Agreement, batches
from normswap.errors import RETURNED, PlanError
from normswap.graph import Graph, Movable, walk
from normswap.graph.numbers import check_numbers
from normswap.planning import Patterns, Plan, Target, inputs_for, plan
from normswap.progress import Progress, ProgressCallback
from normswap.provenance import add_history
from normswap.recipes import Recipe
from normswap.reports import write_report
from normswap.running import (
    call,
    copied,
    device_of,
    entries,
    evaluating,
    first,
    leaves,
    moved,
)
from normswap.site_costs import cheapest_first, cost_of, slopes_of
from normswap.swap import Conversion

_log = logging.getLogger("normswap")

_MARGIN = 0.84
"""Standard errors between what is kept on the judging images and what is promised: four in five."""
_BATCH = 16
_LOST, _GUESSES = 0.75, 4
"""Share of the decisions lost over the root of nats, before anything is known; then halves."""
_WEIGHED = 64
"""Images that are enough for the costs."""
_MAKING = 0.2
"""Share of the time in which more kinds of images are made of those given."""


@dataclass(frozen=True)
class Kept(Conversion):
    """What ``convert(..., keep=…)`` did.

    Attributes:
        share: decisions of the original kept on the images that judged, 0 to 1.
        bound: its lower confidence bound, which is at least what was asked for.
        images: how many images judged.
        costs: site → what its conversion alone costs, in nats of the outputs' softmax.
    """

    share: float = 1.0
    bound: float = 1.0
    images: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A table: site, what it became, its cost, the cheapest first."""
        became = {entry.name: entry.becomes for entry in self.plan}
        ordered = sorted(self.costs.items(), key=lambda pair: pair[1])
        return [(name, became.get(name, "keep"), f"{cost:.4f}") for name, cost in ordered]

    def draw(self, path: str | Path) -> Path:
        """Write a picture of the costs along the network."""
        became = {entry.name: entry.becomes for entry in self.plan}
        return pictures.costs(self.costs, became, self.summary, path)

    def to_json(self) -> dict[str, Any]:
        """What was kept and what each site costs, ready for ``json.dumps``."""
        facts = {"share": self.share, "bound": self.bound, "images": self.images}
        return {**facts, "costs": dict(self.costs)}

    def write(self, path: str | Path) -> Path:
        """Write a picture (``.png``, ``.svg``, ``.pdf``), JSON (``.json``) or else the table."""
        text = "\n".join([*map("  ".join, self.rows), self.summary])
        return write_report(path, draw=self.draw, data=self.to_json(), text=text)

    @property
    def summary(self) -> str:
        """One line."""
        done = sum(entry.becomes != "frozen" for entry in self.plan if entry.name in self.costs)
        return (
            f"{done} of {len(self.costs)} layers converted, the others frozen; {self.share:.1%} of "
            f"the original's decisions kept on {self.images} images (at least {self.bound:.1%})"
        )


def convert(
    model: nn.Module,
    target: Target | Plan,
    *,
    example_inputs: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    fallback: str | Recipe | None = None,
    init: str = "match",
    optimizer: Any = None,
    allow_nonfinite: bool = False,
    keep: float | None = None,
    images: Tensor | Iterable[Any] | None = None,
    seconds: float = 180,
    seed: int = 0,
    progress: ProgressCallback | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Conversion:
    """Replace the BatchNorm layers of a model, in place, all or nothing.

    Args:
        model: any eager module, also on the meta device.
        target: a target, as in ``gn`` or ``gn(groups=16)``, a recipe, a mapping from
            name patterns to either, or a :class:`Plan` that was made before.
        example_inputs: what the model is called with; see :func:`normswap.plan`.
        include: patterns of the names to convert.
        exclude: patterns of the names to leave alone.
        fallback: what a site becomes that the target cannot take.
        init: ``match``, ``steady``, ``copy`` or ``reset``; see :func:`normswap.plan`.
        optimizer: an optimizer whose parameter groups move to the new parameters.
        allow_nonfinite: convert weights and running statistics that are not finite, and negative
            variances, all the same.
        keep: share of the original's decisions that has to stay, above 0 and at most 1. As many
            layers are converted as that allows, by ``images``; the others become ``frozen``.
        images: for ``keep``: preprocessed images without labels, a tensor or an iterable of
            batches. Each half is judged by a model that was calibrated on the other one; the model
            that stays is calibrated on both. What cannot be parted (one image, one batch of an
            iterable) judges what was calibrated on it.
        seconds: for ``keep``: about how long it may take; where it is short the search ends early,
            though not before four tries if none has succeeded.
        seed: of the random choices that ``keep`` makes.
        progress: called with the share of ``keep``'s work that is done, and what comes next.
        clock: what ``seconds`` are read from.

    Returns:
        Conversion: the model, the plan, the new modules by name, and the kept ones with reasons. A
            plan that converts nothing leaves the model as it was, and is logged as a warning. With
            ``keep`` a :class:`normswap.keeping.Kept`, which has the costs too.

    Raises:
        PlanError: a request that cannot be satisfied; see :func:`normswap.plan`.
        WalkError: the model cannot be run or understood, or not any more with its new layers.
        SwapError: the plan does not fit the model, or ``optimizer`` is none.
        ImpossibleNumbersError: weights or running statistics that are not finite, or negative
            variances.
        CalibrationError: there are no images, or none that the model takes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert(net, "frn", example_inputs=torch.zeros(1, 3, 8, 8)).model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): FilterResponseNorm2d(8, eps=1e-06, affine=True, learnable_eps=False, tlu=True)
          (2): Identity()
        )
    """
    options: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "fallback": fallback,
        "init": init,
    }
    if keep is None:
        if images is not None:
            raise PlanError(
                "images",
                got="images without keep",
                need="the share of decisions to keep",
                hint="--keep 95 (keep=0.95), or normswap.calibrate() for a converted model",
            )
        return _matched(model, target, example_inputs, options, optimizer, allow_nonfinite)
    _check(target, keep, images, seconds)
    if not allow_nonfinite:
        check_numbers(model)
    inputs = inputs_for(model, example_inputs)
    graph = walk(model, inputs, exclude=exclude)
    begun = clock()
    budget = _Budget(clock, begun, seconds, progress)
    chooser = _Chooser(model, target, graph, {**options, "example_inputs": inputs}, seed)
    with torch.inference_mode(mode=False), taken():
        found, ready = chooser.choose(keep, images, budget)
    result = swap.convert(
        model,
        ready.plan,
        example_inputs=inputs,
        optimizer=optimizer,
        allow_nonfinite=allow_nonfinite,
    )
    if ready.state is not None:
        result.model.load_state_dict(ready.state)
    kept = Kept(
        result.model,
        result.plan,
        result.replaced,
        result.kept,
        share=found.share,
        bound=found.bound,
        images=found.images,
        costs=chooser.costs,
    )
    _log.info("%s", kept.summary, extra=RETURNED)
    add_history(
        result.model, "calibrated", images=found.images, parameters="producers", keep=keep,
        agreement=found.share, seconds=clock() - begun, steps=0, stopped="closed form",
    )  # fmt: skip
    return kept


def _matched(
    model: nn.Module,
    target: Target | Plan,
    inputs: Any,
    options: dict[str, Any],
    optimizer: Any,
    allow_nonfinite: bool,
) -> Conversion:
    """Convert all that a target takes, by what the running statistics say."""
    found = target
    if not isinstance(found, Plan):
        found, options = plan(model, found, example_inputs=inputs, **options), {}
    with scaled(model, found, inputs):
        return swap.convert(
            model,
            found,
            example_inputs=inputs,
            optimizer=optimizer,
            allow_nonfinite=allow_nonfinite,
            **options,
        )


def apply_plan(
    model: nn.Module, plan: Plan, *, example_inputs: Any = None, optimizer: Any = None
) -> Conversion:
    """Apply a plan to the model it was made for, or to a fresh copy of it.

    Args:
        model: the model; it is changed in place, or not at all if anything raises.
        plan: what becomes what.
        example_inputs: what the model is called with, for a plan with steady scales; None: what it
            remembers.
        optimizer: an optimizer whose parameter groups move to the new parameters.

    Raises:
        PlanError: the plan has steady scales, and nothing says what the model is called with.
        SwapError: the plan names modules that are not there or are something else.
    """
    with scaled(model, plan, example_inputs):
        return swap.apply_plan(model, plan, optimizer=optimizer)


def _check(target: Any, keep: Any, images: Any, seconds: float) -> None:
    wrong = None
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or not 0 < keep <= 1:
        wrong = ("keep", repr(keep), "a share above 0 and at most 1", "keep=0.95")
    elif isinstance(target, Plan):
        wrong = ("keep", "a finished plan", "a target", "convert(model, 'gn', keep=0.95, …)")
    elif images is None:
        wrong = ("images", "None", "images that show what is kept", "images=a preprocessed tensor")
    elif not 0 < seconds < math.inf:
        wrong = ("seconds", repr(seconds), "a positive, finite number", "seconds=180")
    if wrong is not None:
        where, got, need, hint = wrong
        raise PlanError(where, got=got, need=need, hint=hint)


@dataclass(frozen=True)
class _Budget:
    clock: Callable[[], float]
    begun: float
    seconds: float
    progress: ProgressCallback | None

    @property
    def left(self) -> float:
        return self.begun + self.seconds - self.clock()

    def over(self, share: float) -> Callable[[int], bool]:
        """Whether one more, as long as each of those that are done, would pass this share."""
        opened, room = self.clock(), share * self.seconds
        return lambda done: (self.clock() - opened) * (done + 1) / done > room

    def tell(self, share: float, what: str) -> None:
        if self.progress is not None:
            self.progress(Progress(share, 1.0, what))


@dataclass(frozen=True)
class _Fold:
    """A network whose every site is solved by itself, and images that it has not seen.

    Attributes:
        donor: the converted model that has them all.
        producers: what was scaled with a site, by the site's name.
        judges: batches, and what the original gives for each.
    """

    donor: nn.Module
    producers: Mapping[str, Movable]
    judges: list[tuple[Any, list[Tensor]]]

    def lend(self, model: nn.Module, sites: Iterable[str]) -> None:
        """Give ``model`` these sites and what was scaled with them."""
        scaled = {site: producer.name for site, producer in self.producers.items()}
        for name in (n for site in sites for n in (site, scaled.get(site)) if n is not None):
            # a site that took an activation's place here may not take it there
            own = self.donor.get_submodule(name).state_dict()
            model.get_submodule(name).load_state_dict(own, strict=False)


@dataclass(frozen=True)
class _Found:
    """One number of converted sites, and how it did."""

    sites: list[str]
    share: float
    bound: float
    images: int


@dataclass(frozen=True)
class _Ready:
    """The plan that is carried out, and the weights after it; None: as they come."""

    plan: Plan
    state: dict[str, Tensor] | None


class _Guess:
    """How many sites there can be: what is lost grows with the root of what they cost together."""

    def __init__(self, costs: list[float], keep: float) -> None:
        self.costs, self.keep = costs, keep
        self._slope = _LOST

    def between(self, low: int, high: int, images: int) -> int:
        """The most sites, of so few or so many, with which ``keep`` should be reached."""
        room = 1 - self.keep - _MARGIN * math.sqrt(self.keep * (1 - self.keep) / max(images, 1))
        fit = [self._slope * math.sqrt(cost) <= room for cost in self.costs]
        return min(max(sum(fit), low), high)

    def learn(self, count: int, lost: float) -> None:
        """So much was lost with so many."""
        cost = self.costs[count - 1]
        if 0 < cost < math.inf:
            self._slope = lost / math.sqrt(cost)


class _Chooser:
    """Which sites are converted.

    The images are two halves. Each is judged by a model that was calibrated on the other one; the
    model that is handed out is calibrated on both.
    """

    def __init__(
        self, model: nn.Module, target: Any, graph: Graph, options: dict[str, Any], seed: int
    ) -> None:
        self.teacher = copy.deepcopy(model).eval()
        self.target, self.graph, self.options = target, graph, options
        self.draw = torch.Generator().manual_seed(seed)
        self.costs: dict[str, float] = {}

    def choose(self, keep: float, images: Any, budget: _Budget) -> tuple[_Found, _Ready]:
        """The most sites with which at least ``keep`` of the decisions stay."""
        device = device_of(self.teacher)
        whole = self._plan(())
        sites = [e.name for e in whole.swapped if e.recipe is not None and e.recipe.per_sample]
        if not sites:  # all others are exact
            return _Found([], 1.0, 1.0, 0), _Ready(whole, None)
        halves = self._halves(images, device)
        budget.tell(0.0, "every layer by itself")
        with evaluating(self.teacher):
            donors = [self._converted(whole) for _ in halves]
            seen = []
            for donor, half in zip(donors, halves, strict=True):
                over = budget.over(_MAKING / len(halves))
                seen.append(moments_alone(donor, self.teacher, half, self.draw, over))
            opened = budget.clock()
            folds = [
                self._fold(*parts)
                for parts in zip(donors, halves, seen, reversed(halves), strict=True)
            ]
            solving = budget.clock() - opened  # what it costs to do that once more, on all images
            budget.tell(0.2, "what each layer costs")
            slopes = self._slopes(folds, halves, sites)
        self.costs = {name: cost_of(slopes[name]) for name in sites}
        order, together = cheapest_first(slopes)
        best = self._search(order, _Guess(together, keep), folds, budget, solving)
        every = [batch for half in halves for batch in half]
        known: dict[str, Moments] = {}
        for found in seen:
            known |= {name: known[name] + m if name in known else m for name, m in found.items()}
        budget.tell(0.95, f"{len(best.sites)} layers, on all images")
        with evaluating(self.teacher):
            ready = self._ready(whole, order, best, (every, known))
        budget.tell(1.0, "done")
        return best, ready

    def _search(
        self,
        order: list[str],
        guess: _Guess,
        folds: list[_Fold],
        budget: _Budget,
        solving: float,
    ) -> _Found:
        low, high, number = 0, len(order), 0
        images = sum(_count([batch for batch, _ in fold.judges]) for fold in folds)
        best = _Found([], 1.0, 1.0, images)
        while low < high:
            number += 1
            at = (
                guess.between(low + 1, high, images)
                if number <= _GUESSES
                else (low + high + 1) // 2
            )
            budget.tell(0.3 + 0.65 * min(number / 8, 0.99), f"{at} of {len(order)} layers")
            found = self._tried(order, at, folds)
            guess.learn(at, 1 - found.share)
            if found.bound >= guess.keep:
                low, best = at, found
            else:
                high = at - 1
            if budget.left <= solving and (best.sites or number >= _GUESSES):
                break  # late, but not with nothing in hand
        return best

    def _slopes(
        self, folds: list[_Fold], halves: list[list[Any]], sites: list[str]
    ) -> dict[str, Tensor]:
        """Of every site as each half has solved it, on images of the other one."""
        each = []
        for fold, unseen in zip(folds, reversed(halves), strict=True):
            few = first(unseen, _WEIGHED // 2)
            found = slopes_of(sites, fold.donor, fold.producers, self.teacher, few, self.draw)
            each.append(found)
        return {name: torch.cat([found[name] for found in each]) for name in sites}

    def _fold(
        self, donor: nn.Module, used: list[Any], seen: dict[str, Moments], judges: list[Any]
    ) -> _Fold:
        producers = solve_alone(donor, self.teacher, used, seen)
        return _Fold(donor, producers, list(_answered(self.teacher, judges)))

    def _tried(self, order: list[str], count: int, folds: list[_Fold]) -> _Found:
        """So many of the cheapest sites converted, and what that keeps of both halves."""
        found, kept = self._plan(order[count:]), _KeptShare()
        for fold in folds:
            model = self._converted(found)
            fold.lend(model, order[:count])
            kept.add(model, fold.judges)
        return _Found(order[:count], kept.share, kept.bound, kept.count)

    def _ready(
        self,
        whole: Plan,
        order: list[str],
        best: _Found,
        every: tuple[list[Any], dict[str, Moments]],
    ) -> _Ready:
        found = self._plan(order[len(best.sites) :])
        if not best.sites:
            return _Ready(found, None)
        model = self._converted(found)
        self._fold(self._converted(whole), *every, []).lend(model, best.sites)
        return _Ready(found, model.state_dict())

    def _halves(self, images: Any, device: torch.device) -> list[list[Any]]:
        """Two halves of the images, or all of them where they cannot be parted.

        Other photographs of the same things are no strangers: so the halves share no class of the
        original's decisions, where single images and classes can be told.
        """
        every = [moved(batch, device) for batch in _shuffled(images, self.draw)]
        if isinstance(images, Tensor):
            with evaluating(self.teacher), torch.no_grad():
                outputs = [leaves(call(self.teacher, copied(batch))) for batch in every]
            joined = torch.cat(every)
            chosen = torch.arange(len(joined), device=device) % 2 == 0
            if all(found and found[0].dim() == 2 for found in outputs):
                classes = torch.cat([found[0].argmax(1) for found in outputs])
                apart = _first_half(classes.tolist()).to(device)
                chosen = chosen if apart.all() else apart
            parts = [joined[chosen], joined[~chosen]]
            return [list(torch.split(part, _BATCH)) for part in parts if len(part)]
        return [every[::2], every[1::2]] if len(every) > 1 else [every]

    def _plan(self, frozen: Iterable[str]) -> Plan:
        reasons = dict.fromkeys(frozen, "frozen, to keep the decisions asked for")
        return plan(
            self.teacher,
            self.target,
            graph=self.graph,
            frozen=reasons,
            costs=self.costs,
            **self.options,
        )

    def _converted(self, found: Plan) -> nn.Module:
        """A copy; that its numbers are sound was looked at before."""
        return swap.convert(copy.deepcopy(self.teacher), found, allow_nonfinite=True).model


@torch.no_grad()
def _answered(teacher: nn.Module, found: list[Any]) -> Iterator[tuple[Any, list[Tensor]]]:
    for batch in found:
        yield batch, [leaf.clone() for leaf in leaves(call(teacher, copied(batch)))]


class _KeptShare:
    """The share of the original's decisions that models keep, and its lower confidence bound.

    Where there are no classes to choose between it is one minus the outputs' relative error.
    """

    def __init__(self) -> None:
        self.count = 0
        self._agreement = Agreement()
        self._difference = self._whole = 0.0

    @torch.no_grad()
    def add(self, model: nn.Module, judges: Iterable[tuple[Any, list[Tensor]]]) -> None:
        """Take in what a model makes of batches, for which the original's answers are there."""
        with evaluating(model):
            for batch, reference in judges:
                found = leaves(call(model, copied(batch)))
                self._agreement.add(found, reference)
                self.count += entries(batch)
                for ours, theirs in zip(found, reference, strict=False):
                    self._difference += float((ours - theirs).square().sum())
                    self._whole += float((theirs - theirs.mean(0)).square().sum())

    @property
    def share(self) -> float:
        """Of the decisions, 0 to 1."""
        found = self._agreement.value
        return 1 - (self._difference / max(self._whole, 1e-12)) ** 0.5 if found is None else found

    @property
    def bound(self) -> float:
        """At least so much of them, four times in five."""
        decided = self._agreement.value is not None
        return _lower(self.share, self.count) if decided else self.share


def kept_share(model: nn.Module, teacher: nn.Module, judges: list[Any]) -> tuple[float, float]:
    """The share of the teacher's decisions that a model keeps, and its lower confidence bound."""
    found = _KeptShare()
    with evaluating(teacher):
        found.add(model, _answered(teacher, judges))
    return found.share, found.bound


def _lower(share: float, count: int) -> float:
    """Wilson's bound: of images, not of pixels, which are no independent witnesses."""
    z2 = _MARGIN**2 / max(count, 1)
    middle = share + z2 / 2
    spread = math.sqrt(max(share * (1 - share) * z2 + z2 * z2 / 4, 0.0))
    # where everything is kept nothing speaks against it
    return share if share == 1 else (middle - spread) / (1 + z2)


def _first_half(classes: list[int]) -> Tensor:
    """Which images are in the first of two halves that share no class; the large classes first."""
    sizes = [0, 0]
    side: dict[int, int] = {}
    for number, count in Counter(classes).most_common():
        side[number] = int(sizes[0] > sizes[1])
        sizes[side[number]] += count
    return torch.tensor([side[number] == 0 for number in classes])


def _count(found: list[Any]) -> int:
    return sum(entries(batch) for batch in found)


def _shuffled(images: Any, draw: torch.Generator) -> list[Any]:
    """Small batches in random order."""
    if isinstance(images, Tensor):
        images = images[torch.randperm(len(images), generator=draw)]
    found = batches(images, _BATCH)
    if isinstance(images, Tensor):
        return found
    return [found[i] for i in torch.randperm(len(found), generator=draw).tolist()]
