"""Which target, on this model, these images, this machine: measured first, then decided by a rule.

What is measured is what other rooms measure (drift, calibration, cost, BatchNorm's own statistics
at the batch size), in one budget of time. Nothing is trained, and the model is not changed. The
rule is in ``verdict``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap import pictures, running
from normswap.batch_effect import BatchEffect, measure_batch_effect
from normswap.benchmark import BASE, Comparison, Ratio, Row, compare, step_seconds
from normswap.calibration import Calibration, calibrate
from normswap.calibration.images import joined
from normswap.copying import copied
from normswap.drift import Agreement, Drift, batches, measure_drift, predict_drift
from normswap.errors import CalibrationError, NormSwapError, PlanError
from normswap.graph import batchnorms, walk
from normswap.pacing import Budget, OutOfTimeError, Threads
from normswap.planning import Plan, Target, inputs_for, plan
from normswap.progress import Progress, ProgressCallback
from normswap.recipes import recipe_for
from normswap.reports import aligned, write_report
from normswap.running import call, device_of, entries, evaluating, leaves, moved
from normswap.swap import apply_plan
from normswap.verdict import FEW, Option, decide

TARGETS = ("gn", "frn", "brn", "cbn", "frozen")
"""What is compared unless others are asked for."""
SECONDS = 90.0

_EFFECT, _COST = 0.15, 0.35
"""Shares of the time."""
_ROUNDS, _WARMUP = 9, 9
_RUNS = 1.4 * (_ROUNDS / 2 + _WARMUP)
"""Training steps of each variant that the time for the costs should hold, its inference with it."""
_FEWEST_RUNS = 7
"""The same of the fewest rounds that there are."""
_CONVERSION, _CALIBRATION = 32, 104
"""Single images that run in the time of one conversion, and of the shortest calibration."""


@dataclass(frozen=True)
class Recommendation:
    """What was measured, and what follows from it.

    Attributes:
        target: what to convert to; ``bn`` says: leave the model as it is.
        reason: why, in one sentence.
        options: one per target, BatchNorm first.
        batch_size: images in a training step.
        image: shape of one input.
        effect: what BatchNorm would do at this batch size; None without images.
        images: how many were given.
        unknown: what could not be known, a sentence each.
        training_seconds: BatchNorm's own training step at the batch ``costs_at``.
        costs_at: batch size at which the costs were measured; smaller than ``batch_size`` where
            that would have taken longer than the time allows.
        seconds: spent.
        firm: whether more images would hardly change the answer.
        over: a sentence where it took longer than was asked for; else empty.
    """

    target: str
    reason: str
    options: tuple[Option, ...]
    batch_size: int
    image: tuple[int, ...]
    effect: BatchEffect | None
    images: int
    unknown: tuple[str, ...]
    training_seconds: float | None
    costs_at: int
    seconds: float
    firm: bool = True
    over: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A table: predicted error, decisions kept (two), cost beside BatchNorm's, bytes."""
        return [
            (
                option.target,
                _percent(option.predicted),
                _percent(option.matched, option.images),
                _percent(option.kept, option.images),
                _ratio(option.training),
                _ratio(option.inference),
                f"{option.memory / 1e6:.0f} MB" if option.memory else "",
                f"{option.state / 1e6:.0f} MB" if option.state else "",
                option.note,
            )
            for option in self.options
        ]

    def __str__(self) -> str:
        lines = aligned([COLUMNS, *self.rows()])
        last = [self.over] if self.over else []
        return "\n".join([*lines, *self.unknown, f"{self.target}: {self.reason}", *last])

    def write(self, path: str | Path) -> Path:
        """Write a picture (``.png``, ``.svg``, ``.pdf``), JSON (``.json``) or else the table."""
        return write_report(path, draw=self.draw, data=self.to_json(), text=str(self))

    def draw(self, path: str | Path) -> Path:
        """Draw what each target keeps, and BatchNorm's statistics along the network."""
        kept = {o.target: (o.matched, o.kept) for o in self.options if o.kept is not None}
        sites = self.effect.sites if self.effect else ()
        noise = {site.name: (site.shift, site.noise) for site in sites}
        title = f"recommended at batch {self.batch_size}: {self.target}"
        return pictures.recommendation(kept, noise, title, path)


COLUMNS = (
    "target", "error", "matched", "calibrated", "training", "inference", "memory", "state",
    "remark",
)  # fmt: skip


def recommend(
    model: nn.Module,
    images: Tensor | Iterable[Any] | None = None,
    *,
    batch_size: int = 2,
    targets: Sequence[str] | Mapping[str, Target] = TARGETS,
    example_inputs: Any = None,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: ProgressCallback | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Recommendation:
    """Say which target suits a model, its images and a batch size on this machine.

    BatchNorm's statistics at the batch size, the share of the model's decisions that each target
    keeps before and after a short calibration, and the cost of each are measured; ``decide`` holds
    the rule. Nothing is trained: how accurate a fine-tune would become is what ``sweep`` measures.

    Args:
        model: the BatchNorm original; it is not changed.
        images: preprocessed, a tensor or an iterable of batches, unlabelled; some hundreds. None:
            what can be known without any.
        batch_size: images in a training step.
        targets: names; or a mapping from a label to anything ``convert`` takes.
        example_inputs: what the model is called with; may be left out with a tensor of images and
            for models from ``load_model``.
        seconds: time for all of it. Where single pieces are slow fewer are looked at, and some not
            at all; it ends within half of it more, and a few seconds for what has to be done once.
        seed: of the calibration.
        progress: called with the share of the time that is over; its message is what is being
            measured.
        clock: what ``seconds`` are read from.

    Returns:
        Recommendation: ``.target``, ``.reason``, a row per target, ``.write(path)`` for a picture.

    Raises:
        PlanError: no BatchNorm in the model, or a target that is none.
        CalibrationError: an iterable without images, a batch size or time below what makes sense.

    Example:
        >>> import normswap
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        >>> found = normswap.recommend(net, torch.randn(16, 3, 8, 8), batch_size=2, seconds=2)
        >>> [option.target for option in found.options]
        ['bn', 'gn', 'frn', 'brn', 'cbn', 'frozen']
    """
    _check(batch_size, seconds)
    budget = Budget(seconds, clock)
    pictured = None if images is None else joined(batches(images, max(batch_size, 8)))
    named: dict[str, Target] = (
        dict(targets) if isinstance(targets, Mapping) else {name: name for name in targets}
    )
    survey = _Survey(model, pictured, batch_size, named, example_inputs, budget, progress)
    with survey.threads:
        effect = survey.effect(_EFFECT * seconds)
        plans = survey.plans()
        alone = survey.threads.slower is not None
        costs, at = survey.costs(plans, _COST * seconds)
        if effect is not None and effect.judged < FEW and not alone and survey.threads.slower:
            effect = survey.effect(_EFFECT * seconds)  # the first look had threads that hindered
        options = survey.options(plans, costs, at, seed)
    verdict = decide(options, effect, batch_size)
    return Recommendation(
        verdict.target,
        verdict.reason,
        options,
        batch_size,
        survey.shape,
        effect,
        survey.count,
        tuple(survey.unknown(effect, costs, at)),
        None if math.isnan(costs.training_seconds) else costs.training_seconds,
        at,
        budget.spent,
        verdict.firm,
        budget.over,
    )


# --- the rule -------------------------------------------------------------------------------------


# --- what is measured -----------------------------------------------------------------------------


class _Survey:
    """One model, its images and the targets."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | list[Any] | None,
        batch_size: int,
        targets: dict[str, Target],
        example_inputs: Any,
        budget: Budget,
        progress: ProgressCallback | None,
    ) -> None:
        self.budget, self.threads = budget, Threads(budget.clock)
        self.slow = ""  # why there are no costs
        self.pace = 0.0  # seconds of one image's forward
        self._aside: _Aside | None = None
        self._rest = torch.arange(0)
        self.model, self.batch_size, self.targets = model, batch_size, targets
        self.images = None if images is None else moved(images, device_of(model))
        if example_inputs is None and self.images is not None:
            example_inputs = self.images[:2] if isinstance(self.images, Tensor) else self.images[0]
        self.inputs = inputs_for(model, example_inputs)
        self._progress = progress
        for target in targets.values():
            if isinstance(target, str):
                recipe_for(target)  # a word that is no target is said before long work

    def tell(self, stage: str = "") -> None:
        """Say how much of the time is over, and what comes next where that is something else."""
        budget = self.budget
        if stage:
            budget.enter(stage)
        if self._progress is not None:
            beyond = f", beyond the {budget.seconds:g} s asked for" if budget.left < 0 else ""
            total = max(budget.seconds, budget.spent / _NEARLY)
            self._progress(Progress(budget.spent, total, budget.stage + beyond))

    def look(self) -> None:
        """How long a forward takes now, and whether one thread is faster."""
        inputs = _of_size(self.inputs, 2)

        def run() -> None:
            with evaluating(self.model), torch.no_grad():
                call(self.model, running.copied(inputs))

        try:
            seconds = self.threads.look(run, 0.02 * self.budget.seconds)
        except (RuntimeError, TypeError, ValueError, AssertionError, LookupError):
            return  # what comes next says it better
        self.pace = seconds / max(1, entries(inputs))

    @property
    def count(self) -> int:
        """Number of images."""
        return 0 if self.images is None else sum(entries(batch) for batch in self._batches())

    def _batches(self) -> list[Any]:
        return batches(self.images, 32) if isinstance(self.images, Tensor) else self.images or []

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        found = [leaf for leaf in leaves(self.inputs) if leaf.dim()]
        return tuple(found[0].shape[1 if isinstance(self.inputs, Tensor) else 0 :]) if found else ()

    def effect(self, seconds: float) -> BatchEffect | None:
        """BatchNorm at the batch size; None where images cannot be batched anew."""
        if not isinstance(self.images, Tensor):
            return None
        self.tell("BatchNorm's own statistics")
        self.look()
        return measure_batch_effect(
            self.model,
            self.images,
            self.batch_size,
            seconds=min(seconds, max(0.0, self.budget.left)),
            clock=self.budget.clock,
        )

    def plans(self) -> dict[str, Plan | PlanError]:
        """What each target would do here, or why it cannot."""
        self.tell("planning")
        graph = walk(self.model, self.inputs)
        found: dict[str, Plan | PlanError] = {}
        for label, target in self.targets.items():
            try:
                made = plan(self.model, target, example_inputs=self.inputs, graph=graph)
            except PlanError as error:
                if not graph.sites:
                    raise
                found[label] = error
            else:
                found[label] = made.idle or made
        return found

    def costs(
        self, plans: Mapping[str, Plan | PlanError], seconds: float
    ) -> tuple[Comparison, int]:
        """Every target's cost, and the batch size that there was time for."""
        self.tell("the cost of each target")
        self.look()
        usable = {label: found for label, found in plans.items() if isinstance(found, Plan)}
        number, clock = 1 + len(usable), self.budget.clock
        seconds = min(seconds, max(0.0, self.budget.left))
        longest = max(_COST_MORE * seconds, _COST_ONCE)
        small = _of_size(self.inputs, min(2, self.batch_size))
        one = step_seconds(self.model, small, longest / (_FEWEST_RUNS * number), clock)
        at = self.batch_size
        if one:  # a coarse clock says 0
            at = _affordable(at, entries(small), seconds / (_RUNS * number * one))
        inputs = _of_size(self.inputs, at)
        conversions = number * _CONVERSION * self.pace
        steps = _FEWEST_RUNS * number * (one or 0.0) * entries(inputs) / max(1, entries(small))
        if conversions + steps > longest:
            self.slow = (
                f"what each target costs was not measured: {_FEWEST_RUNS} training steps of each, "
                f"and its conversion, would take about {conversions + steps:.0f} s here"
            )
            return Comparison((), math.nan, math.nan, 0, str(device_of(self.model))), at
        until = clock() + longest

        def expired() -> bool:
            self.tell()
            return clock() > until

        found = compare(
            self.model,
            usable,
            inputs,
            rounds=_ROUNDS,
            warmup=_WARMUP,
            onnx=False,
            seconds=seconds,
            expired=expired,
            clock=clock,
        )
        return found, entries(inputs)

    def options(
        self,
        plans: Mapping[str, Plan | PlanError],
        costs: Comparison,
        at: int,
        seed: int,
    ) -> tuple[Option, ...]:
        """One row per target, BatchNorm first."""
        rows = {row.target: row for row in costs.rows}
        base = Option(BASE, per_sample=False)
        found = [_with_costs(base, rows.get(BASE), self.batch_size / at)]
        waiting = sum(isinstance(p, Plan) and _per_sample(p) for p in plans.values())
        for label, made in plans.items():
            if isinstance(made, PlanError):
                found.append(Option(label, per_sample=False, note=made.got))
                continue
            if _per_sample(made):
                self.tell(f"calibrating {label}")
                option = self._per_sample(label, made, waiting, seed)
                waiting -= 1
            else:
                option = Option(label, per_sample=False, predicted=0.0, matched=1.0, kept=1.0)
            found.append(_with_costs(option, rows.get(label), self.batch_size / at))
        if self._progress is not None:
            self._progress(Progress(1.0, 1.0, "done"))
        return tuple(found)

    def _per_sample(self, label: str, made: Plan, waiting: int, seed: int) -> Option:
        """What a target without running statistics keeps, in its share of the time."""
        self.look()
        option = Option(label, per_sample=True)
        if _CONVERSION * self.pace > self.budget.at_most:
            return replace(option, note=_NO_TIME, hurried=self.images is not None)
        originals = {names[0]: bn for bn, names in batchnorms(self.model).items()}
        model = apply_plan(copied(self.model).eval(), made).model
        known = [s.predicted for s in predict_drift(model, originals, made).sites]
        errors = [error for error in known if error is not None]
        option = replace(option, predicted=statistics.median(errors) if errors else None)
        if self.images is None:
            return option
        seconds = self.budget.left / waiting
        if _CALIBRATION * self.pace > self.budget.at_most / waiting:
            return self._uncalibrated(option, model, seconds)
        aside, images = self._set_aside(self.images, seconds)
        came = aside.agreement(model)
        try:
            left = self.budget.left / waiting - aside.seconds
            report = self._calibrated(model, images, max(left, _LEAST), seed)
        except OutOfTimeError:
            hurried = replace(option, matched=came, images=aside.count, note=_NO_TIME, hurried=True)
            return hurried if came is not None else self._uncalibrated(option, model, 0.0)
        except NormSwapError as error:
            return replace(option, note=f"not calibrated: {error.got}")
        if came is not None:
            kept = aside.agreement(model)
            return replace(option, matched=came, kept=kept, images=aside.count)
        before, after = report.before, report.after
        return replace(option, matched=_kept(before), kept=_kept(after), images=after.images)

    def _set_aside(self, images: Any, seconds: float) -> tuple[_Aside, Any]:
        """Images that no calibration sees, as many for every target, and the others.

        The calibration's own are few in a short time: a look at them costs more, and is not the
        last.
        """
        if self._aside is None:
            most = int(_JUDGING * seconds / (3 * max(self.pace, 1e-9)))
            known = isinstance(images, Tensor) and len(images) >= _SPLIT and most >= FEW
            count = min(len(images) // 4, most) if known else 0
            # at random: images often come in an order
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
            self._rest = order[count:].sort().values
            chosen = images[order[:count].to(images.device)].split(32) if count else ()
            self._aside = _Aside(self.model, chosen, self.budget.clock)
        if not self._aside.count:
            return self._aside, images
        return self._aside, images[self._rest.to(images.device)]

    def _uncalibrated(self, option: Option, model: nn.Module, seconds: float) -> Option:
        """What it keeps by itself, on as many images as there is time for."""
        option = replace(option, note=_NO_TIME, hurried=True)
        if not isinstance(self.images, Tensor) or _FEWEST * 3 * self.pace > self.budget.at_most:
            return option
        count = max(_FEWEST, int(seconds / (3 * max(self.pace, 1e-9))))
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(1))
        chosen = self.images[order[:count].to(self.images.device)]
        found = measure_drift(model, self.model, chosen, batch_size=_FEWEST)
        return replace(option, matched=_kept(found), images=found.images)

    def _calibrated(self, model: nn.Module, images: Any, seconds: float, seed: int) -> Calibration:
        """Calibrate in that time; where that is too short, in the shortest that is not."""
        while True:
            clock = self.budget.ending(_COST_MORE * seconds + _COST_ONCE)
            try:
                return calibrate(
                    model,
                    self.model,
                    images,
                    seconds=seconds,
                    seed=seed,
                    progress=lambda _: self.tell(),
                    clock=clock,
                )
            except CalibrationError as error:
                if error.where != "seconds" or 2 * seconds > self.budget.at_most:
                    raise
            seconds *= 2

    def unknown(self, effect: BatchEffect | None, costs: Comparison, at: int) -> Iterator[str]:
        """What could not be known."""
        if self.images is None:
            yield (
                "Without images it is not known what a calibration keeps, nor what BatchNorm would "
                "do with yours at this batch size."
            )
        elif self.count < _ENOUGH:
            yield (
                f"{self.count} images are few: the shares are rough, and calibrated ones were "
                "measured on images that the calibration saw."
            )
        if effect is not None and effect.kept is None and effect.refused is None:
            yield (
                f"{self.count} images are fewer than a batch of {self.batch_size}: what BatchNorm "
                "would do there is not known."
            )
        if self.images is not None and effect is None:
            yield (
                "The images are of several sizes or come in batches of several parts: BatchNorm at "
                "other batch sizes was not looked at."
            )
        if at < self.batch_size:
            yield (
                f"Costs were measured at a batch of {at}, for want of time; memory is scaled to "
                f"{self.batch_size}."
            )
        yield from self._about_time(costs)

    def _about_time(self, costs: Comparison) -> Iterator[str]:
        """What time did to the costs."""
        if self.slow:
            yield f"For want of time {self.slow}."
        elif not any(row.training for row in costs.rows):
            why = costs.rows[0].note or "there was no time for it"
            yield f"The cost of a training step is not known: {why}."
        ratios = [r for row in costs.rows for r in (row.training, row.inference) if r is not None]
        if not all(ratio.steady for ratio in ratios):
            yield (
                "Costs with a question mark varied by more than a quarter from round to round, or "
                "there was time for two rounds at most: they say nothing."
            )
        if self.threads.note:
            yield self.threads.note


_ENOUGH, _LEAST, _FEWEST = 16, 0.5, 8
_JUDGING, _SPLIT = 0.2, 64
"""Share of a target's time for images of which a quarter is set aside, where there are so many."""
_COST_MORE, _COST_ONCE = 1.5, 2.0
"""What a part of the time may be exceeded by: a factor, and seconds."""
_NEARLY = 0.98
"""The share that a bar shows once the time is over."""
_NO_TIME = "no time to calibrate"


class _Aside:
    """Images that are set aside, and what the original says of them.

    Args:
        model: the original.
        batches: of the images.
        clock: how long it takes to run them.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Tensor], clock: Callable[[], float]
    ) -> None:
        begun = clock()
        self._batches = batches
        self._said = [self._answers(model, batch) for batch in batches]
        self.count, self.seconds = sum(len(batch) for batch in batches), clock() - begun

    @staticmethod
    @torch.no_grad()
    def _answers(model: nn.Module, batch: Tensor) -> list[Tensor]:
        with evaluating(model):
            return [leaf.clone() for leaf in leaves(call(model, batch.clone()))]

    def agreement(self, model: nn.Module) -> float | None:
        """The share of decisions that a converted model keeps; None where nothing is decided."""
        found = Agreement()
        for batch, said in zip(self._batches, self._said, strict=True):
            found.add(self._answers(model, batch), said)
        return found.value


def _affordable(batch_size: int, small: int, ratio: float) -> int:
    """The largest batch, halved so long, whose steps take no more time than there is.

    Args:
        batch_size: asked for.
        small: the batch that was timed.
        ratio: how many times longer than that a step may take.
    """
    at = batch_size
    while at > small and at / small > ratio:
        at //= 2
    return max(at, min(small, batch_size))


def _of_size(inputs: Any, size: int) -> Any:
    """Inputs as a batch of so many images, where they can be cut and repeated."""
    if isinstance(inputs, Tensor):
        return inputs[torch.arange(size, device=inputs.device) % len(inputs)]
    if isinstance(inputs, list) and all(isinstance(i, Tensor) and i.dim() == 3 for i in inputs):
        return [inputs[i % len(inputs)] for i in range(size)]
    return inputs


def _per_sample(made: Plan) -> bool:
    return any(e.recipe is not None and e.recipe.per_sample for e in made.swapped)


def _kept(drift: Drift) -> float | None:
    """The share of decisions; one minus the error of the outputs where there are none."""
    if drift.agreement is not None or drift.output_error is None:
        return drift.agreement
    return max(0.0, 1 - drift.output_error)


def _with_costs(option: Option, row: Row | None, scale: float) -> Option:
    if row is None:
        return option
    return replace(
        option,
        training=row.training,
        inference=row.inference,
        memory=round(row.kept * scale),
        state=row.state,
        note=option.note or row.note,
    )


def _check(batch_size: int, seconds: float) -> None:
    if batch_size < 1:
        raise CalibrationError(
            "batch_size", got=str(batch_size), need="at least 1", hint="batch_size=2"
        )
    if not 0 < seconds < math.inf:
        raise CalibrationError(
            "seconds", got=repr(seconds), need="a positive, finite number", hint="seconds=90"
        )


def _percent(value: float | None, images: int = 0) -> str:
    of = f" of {images}" if images else ""
    return "" if value is None else f"{value:.0%}{of}"


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}{'' if ratio.steady else '?'}"
