"""Accuracy against batch size, one line per target: the papers' figure, on the caller's data.

Each cell of the sweep (target, batch size, seed) starts from the same weights, sees the same
number of samples (but for a lone last one of an epoch, which a batch of several leaves out) and
takes its learning rate by the same rule. It is one JSON file when it is
done, so a sweep that was broken off goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normswap import pictures
from normswap.copying import copied
from normswap.errors import NormSwapError, TrainingError
from normswap.files import json_digest, remove, sole_writer, write_whole
from normswap.passage import needs_passage
from normswap.plain import or_none
from normswap.progress import Progress, ProgressCallback
from normswap.provenance import provenance_of
from normswap.reading import Malformed, check_no_link, reading
from normswap.regular import read_text
from normswap.training import FineTune, TrainingInterrupted, evaluate, finetune
from normswap.training.batches import samples_of, samples_per_epoch
from normswap.training.identity import (
    data_changes,
    data_identity,
    machine_changes,
    machine_identity,
    say_what_is_not_known,
)
from normswap.training.likeness import check_like
from normswap.training.options import fingerprint, with_usual
from normswap.training.samples import rng_kept, seed_everything
from normswap.training.tasks import TASKS, task_for

log = logging.getLogger("normswap")

TABLE = "sweep.json"
PICTURE = "sweep.png"
TARGETS = ("bn", "gn", "frn", "brn", "cbn")
BATCH_SIZES = (1, 2, 4, 8, 16, 32)

_OF_ONE_CALL = (
    "seed", "device", "workers", "checkpoint_every", "check_data", "log_every", "tensorboard",
    "track",
)  # fmt: skip
"""Options that a sweep may be gone on with otherwise."""


@dataclass(frozen=True)
class Cell:
    """One fine-tune of a sweep.

    Attributes:
        target: name of the normaliser.
        batch_size: samples per forward.
        seed: of initialisation, order and augmentation.
        learning_rate: at the top of the schedule.
        samples: seen in training, over all epochs.
        start_top1: on the validation data after the conversion; None from scratch.
        top1: on the validation data after the last epoch; None if the cell failed.
        top5: likewise.
        loss: likewise; NaN for detectors.
        seconds: of training.
        failure: why it could not be trained, or None.
        metric: mean IoU or mAP, after the last epoch; None for classification.
        start_metric: the same after the conversion.
    """

    target: str
    batch_size: int
    seed: int
    learning_rate: float
    samples: int = 0
    start_top1: float | None = None
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    failure: str | None = None
    metric: float | None = None
    start_metric: float | None = None

    @property
    def score(self) -> float | None:
        """What cells are compared by: the metric, else top-1; None if the cell failed."""
        return self.top1 if self.metric is None else self.metric

    @classmethod
    def from_json(cls, data: Any, wanted: Cell) -> Cell:
        """The inverse of ``dataclasses.asdict``, for the file of a cell that is wanted.

        Raises:
            Malformed, TypeError: a field of another type, or another cell.
        """
        found = cls(**data)
        if not isinstance(found.failure, str | None):
            raise Malformed(f"failure is {found.failure!r:.40}")
        check_like(asdict(_FINISHED), asdict(replace(found, failure=None)), "cell")
        if (found.target, found.batch_size, found.seed) != (
            wanted.target,
            wanted.batch_size,
            wanted.seed,
        ):
            raise Malformed(f"the cell {found.name}")
        if found.failure is None and found.score is None:
            raise Malformed("no top1")
        return found

    @property
    def name(self) -> str:
        """Fit for a file; unique within a sweep, which refuses labels that would share one."""
        label = re.sub(r"[^\w.+-]", "_", self.target)
        return f"{label}-b{self.batch_size}-s{self.seed}"


@dataclass(frozen=True)
class Point:
    """The seeds of one target at one batch size, together.

    Attributes:
        target: name of the normaliser.
        batch_size: samples per forward.
        mean: of top-1, mean IoU or mAP over the seeds that could be trained; None if none could.
        low: the worst of them.
        high: the best of them.
        deviation: sample standard deviation; 0 for a single seed.
        seeds: how many could be trained.
        failures: why the others could not.
    """

    target: str
    batch_size: int
    mean: float | None
    low: float | None
    high: float | None
    deviation: float
    seeds: int
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep.

    Attributes:
        cells: in the order in which they were asked for.
        settings: what all cells have in common, as plain data.
    """

    cells: tuple[Cell, ...]
    settings: dict[str, Any]

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets, in order."""
        return tuple(dict.fromkeys(cell.target for cell in self.cells))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes, ascending."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    def point(self, target: str, batch_size: int) -> Point:
        """One point of the picture."""
        chosen = [c for c in self.cells if (c.target, c.batch_size) == (target, batch_size)]
        found = [cell.score for cell in chosen if cell.score is not None]
        return Point(
            target,
            batch_size,
            mean=statistics.fmean(found) if found else None,
            low=min(found, default=None),
            high=max(found, default=None),
            deviation=statistics.stdev(found) if len(found) > 1 else 0.0,
            seeds=len(found),
            failures=tuple(cell.failure for cell in chosen if cell.failure is not None),
        )

    @property
    def recommendation(self) -> str | None:
        """Which target to take at the smallest batch size, and why; None if none could be trained.

        The most accurate one. Those that are within half a point of it, or within its deviation
        over the seeds, are as good; of them the one that costs least where it runs is taken.
        """
        size = self.batch_sizes[0]
        points = [self.point(target, size) for target in self.targets]
        scores = {p.target: p.mean for p in points if p.mean is not None}
        if not scores:
            return None
        best = max(scores, key=lambda target: scores[target])
        room = max(_AS_GOOD, self.point(best, size).deviation)
        good = [name for name, score in scores.items() if score >= scores[best] - room]
        chosen = min(good, key=_cost)
        text = f"at batch {size}: {chosen}, {100 * scores[chosen]:.1f} %"
        if len(scores) == 1:
            return text
        if chosen == best:
            return f"{text}, the most accurate of {len(scores)}"
        reason = _WHY[_cost(chosen)]
        return f"{text}, as good as {best} ({100 * scores[best]:.1f} %), and {reason}"

    def rows(self) -> list[list[str]]:
        """The table: a heading, then one row per target with mean ± deviation in percent."""
        heading = ["target", *(str(size) for size in self.batch_sizes)]
        body = [
            [target, *(_entry(self.point(target, size)) for size in self.batch_sizes)]
            for target in self.targets
        ]
        return [heading, *body]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
            for row in rows
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        points = [asdict(self.point(t, b)) for t in self.targets for b in self.batch_sizes]
        return {
            "settings": self.settings,
            "points": points,
            "recommendation": self.recommendation,
            "cells": [asdict(cell) for cell in self.cells],
        }


_AS_GOOD = 0.005
_WHY = (
    "nothing has to be converted",
    "nothing depends on the batch, and it runs as fast as BatchNorm",
    "it runs as fast as BatchNorm",
    "nothing depends on the batch",
    "it does as well",
)
_COSTS = {"bn": 0, "frozen": 1, "brn": 2, "cbn": 2, "gn": 3, "ln": 3, "frn": 3}


def _cost(target: str) -> int:
    return _COSTS.get(target.partition("(")[0], len(_WHY) - 1)


def _entry(point: Point) -> str:
    if point.mean is None:
        return "failed"
    text = f"{100 * point.mean:.1f}"
    return text if point.seeds == 1 else f"{text} ± {100 * point.deviation:.1f}"


def sweep(
    model: nn.Module | Callable[[], nn.Module],
    train_data: Any,
    val_data: Any,
    *,
    targets: Sequence[str] | Mapping[str, Any] = TARGETS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seeds: int | Sequence[int] = 3,
    options: FineTune | None = None,
    from_scratch: bool = False,
    example_inputs: Any = None,
    convert_options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: ProgressCallback | None = None,
    task: str = "classification",
) -> Sweep:
    """Fine-tune every target at every batch size, from the same start.

    Args:
        model: the BN original, left untouched; or a function that makes it anew.
        train_data: a ``Dataset`` of (tensor, class), or an (images, labels) pair of tensors.
        val_data: what accuracy is measured on.
        targets: names; or a mapping from a label to anything ``normswap.convert`` takes. ``"bn"``
            is the control: the original, not converted.
        batch_sizes: samples per forward.
        seeds: how many, or which.
        options: the recipe; its learning rate holds at its ``batch_size`` and is scaled
            linearly, for Adam's relatives by the root.
            None takes the defaults of ``FineTune``.
        from_scratch: start from random weights, drawn anew per seed and the same for all targets
            and batch sizes: the function's own initialisation, or for a module every layer's
            ``reset_parameters()``.
        example_inputs: for ``convert``; None takes the first training sample.
        convert_options: further arguments of ``convert``.
        out: folder for the cells, ``sweep.json`` and ``sweep.png``. A cell that is there is not
            run again; one that was broken off goes on from its last checkpoint.
        progress: called after every update: cells done, the one under way by its share.
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``.

    Returns:
        All cells. A cell that could not be trained says why and does not end the sweep.

    Raises:
        TrainingError: ``out`` holds a sweep of another model, with other settings or with other
            recipes under the same labels; two labels that would share a file; options that no cell
            can take.
        TrainingInterrupted: Ctrl-C or SIGTERM; the same call goes on from there.
        BusyError: another run is writing ``out``.
    """
    options = FineTune() if options is None else options
    if isinstance(train_data, DataLoader):
        raise TrainingError(
            "train_data",
            got="a DataLoader, whose batch size is fixed",
            need="data that can be batched in several sizes",
            hint="loader.dataset",
        )
    if options.keep == "best":
        raise TrainingError(
            "FineTune.keep",
            got="'best' in a sweep",
            need="'last': a cell is scored on the validation data, which must not choose it",
            hint="keep='last'",
        )
    named = dict(targets) if isinstance(targets, Mapping) else {item: item for item in targets}
    _check_labels(named)
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    bench = _Bench(
        model,
        train_data,
        val_data,
        named,
        options,
        from_scratch,
        _first_sample(train_data) if example_inputs is None else example_inputs,
        dict(convert_options or {}),
        None if out is None else Path(out),
        task,
    )
    task_for(options, task)  # refuses what no cell could take
    wanted = [
        Cell(target, size, seed, _scaled_rate(options, size))
        for seed in numbers  # seed by seed, so that a first picture is there early
        for size in batch_sizes
        for target in named
    ]
    with contextlib.nullcontext() if bench.out is None else sole_writer(bench.out):
        return bench.sweep(wanted, progress)


@dataclass(frozen=True)
class _Bench:
    """What all cells of a sweep share."""

    model: nn.Module | Callable[[], nn.Module]
    train_data: Any
    val_data: Any
    targets: dict[str, Any]
    options: FineTune
    from_scratch: bool
    example_inputs: Any
    convert_options: dict[str, Any]
    out: Path | None
    task: str

    def sweep(self, wanted: list[Cell], progress: ProgressCallback | None) -> Sweep:
        """All cells, table and picture."""
        settings = json.loads(json.dumps(self.settings()))
        self.check_settings(settings)
        done = [self.run(cell, at, len(wanted), progress) for at, cell in enumerate(wanted)]
        order = {name: at for at, name in enumerate(self.targets)}
        done.sort(key=lambda cell: (order[cell.target], cell.batch_size, cell.seed))
        found = Sweep(tuple(done), settings)
        if self.out is not None:
            _write(self.out / TABLE, found.to_json())
            draw_sweep(found, self.out / PICTURE)
        return found

    def settings(self) -> dict[str, Any]:
        options = self.options.to_json()
        for name in _OF_ONE_CALL:
            del options[name]
        contents = self.options.check_data
        return {
            "model": _identity(self.model, self.from_scratch),
            "options": options,
            "from_scratch": self.from_scratch,
            "training data": data_identity(self.train_data, contents=contents),
            "validation data": data_identity(self.val_data, contents=contents),
            "machine": machine_identity(self.options.device),
            "convert_options": {k: repr(v) for k, v in self.convert_options.items()},
            **({} if self.task == "classification" else {"task": self.task}),
        }

    def check_settings(self, now: dict[str, Any]) -> None:
        """A folder belongs to one sweep; more targets, sizes and seeds may join it later."""
        if self.out is None:
            return
        check_no_link(self.out / "cells", TrainingError)
        with sole_writer(self.out / "cells"):  # puts right what a killed sweep left there
            (self.out / "cells").mkdir(parents=True, exist_ok=True)
        path = self.out / "settings.json"
        if not path.exists():
            _write(path, now)
            return
        with _reading(path, "the settings of a sweep"):
            then = json.loads(read_text(path))
            changed = list(_changes(now, then))
            other = machine_changes(now["machine"], then.get("machine"))
        if changed:
            raise TrainingError(
                str(self.out),
                got="; ".join(changed),
                need="the settings of the sweep that is there",
                hint="them, or another folder",
            )
        say_what_is_not_known(now)
        if other:
            log.warning("gone on with %s: cells may differ in their last bits", ", ".join(other))

    def run(self, cell: Cell, done: int, total: int, progress: ProgressCallback | None) -> Cell:
        """The finished cell, from its file or by training."""
        path = None if self.out is None else self.out / "cells" / f"{cell.name}.json"
        if path is not None and path.exists():
            with _reading(path, "a cell of a sweep"):
                stored = _read_cell(path)
                made_with = stored.pop("recipe", None)
                found = Cell.from_json(stored, cell)
            if made_with != _recipe(self.targets[cell.target]):
                raise TrainingError(
                    str(path),
                    got=f"a cell of {made_with}",
                    need=f"one of {_recipe(self.targets[cell.target])}",
                    hint="another label for this target, or another folder",
                )
            if found.failure is None:
                remove(path.with_suffix(""))  # a sweep that was killed had no time for it
                return found
        log.info("cell %d of %d: %s", done + 1, total, cell.name)

        def inner(now: Progress) -> None:
            if progress is not None:
                progress(Progress(done + now.share, total, f"{cell.name}, {now.message}"))

        finished = self._train(cell, inner)
        if path is not None:
            data = asdict(finished) | {"recipe": _recipe(self.targets[cell.target])}
            _write(path, data | {"sha256": json_digest(json.loads(json.dumps(data)))})
            remove(path.with_suffix(""))
        return finished

    def _train(self, cell: Cell, progress: Callable[[Progress], None]) -> Cell:
        folder = None if self.out is None else self.out / "cells" / cell.name
        try:
            options = replace(
                self.options,
                batch_size=cell.batch_size,
                seed=cell.seed,
                learning_rate=cell.learning_rate,
                tensorboard=False,
                check_data=False,  # the sweep has looked
            )
            model = self._start(cell)
            if not needs_passage(model):
                options = replace(options, passage=None)
            start = None
            if not self.from_scratch:
                start = self._score(model)
            history = finetune(
                model,
                self.train_data,
                None,
                options,
                out=folder,
                resume=folder is not None,
                progress=progress,
                task=self.task,
            )
            score = self._score(model)
        except TrainingInterrupted:
            raise
        except NormSwapError as error:
            log.warning("%s failed: %s", cell.name, error)
            return replace(cell, failure=str(error))
        size = samples_of(self.train_data)
        return replace(
            cell,
            learning_rate=history.learning_rate,
            samples=options.epochs * samples_per_epoch(size, cell.batch_size) if size else 0,
            start_top1=None if start is None else or_none(start.top1),
            top1=or_none(score.top1),
            top5=or_none(score.top5),
            loss=or_none(score.loss) if self.task != "classification" else score.loss,
            metric=score.metric,
            start_metric=None if start is None else start.metric,
            seconds=sum(epoch.seconds for epoch in history.epochs),
        )

    def _score(self, model: nn.Module) -> Any:
        return evaluate(
            model,
            self.val_data,
            batch_size=self.options.eval_batch_size,
            device=self.options.device,
            workers=self.options.workers,
            on_broken=self.options.on_broken,
            task=self.task,
        )

    def _start(self, cell: Cell) -> nn.Module:
        """The converted network, with the weights that all targets of this seed share."""
        with rng_kept():
            seed_everything(cell.seed)
            if isinstance(self.model, nn.Module):
                model = copied(self.model)
                if self.from_scratch:
                    _reset(model)
            else:
                model = self.model()
            target = self.targets[cell.target]
            if target == "bn" and not provenance_of(model).plans:
                return model
            return self._converted(model, target)

    def _converted(self, model: nn.Module, target: Any) -> nn.Module:
        from normswap.swap import convert

        options = dict(self.convert_options)
        if self.from_scratch:
            options.setdefault("init", "reset")
        options.setdefault("example_inputs", self.example_inputs)
        converted: nn.Module = convert(model, target, **options).model
        return converted


def draw_sweep(found: Sweep, path: str | Path) -> Path:
    """Draw accuracy against batch size: one line per target, from worst to best seed shaded.

    Args:
        found: what ``sweep`` returned.
        path: of the PNG; it is replaced whole.
    """
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for target in found.targets:
        points = [found.point(target, size) for size in found.batch_sizes]
        lines[target] = [
            (point.batch_size, point.mean, point.low, point.high)
            for point in points
            if point.mean is not None and point.low is not None and point.high is not None
        ]
    named = TASKS[found.settings.get("task", "classification")].metric_name
    axis = named if "task" in found.settings else "top-1"
    return pictures.accuracy_by_batch(lines, found.batch_sizes, "bn", path, axis)


_FINISHED = Cell("bn", 1, 0, 0.1, samples=1, seconds=1.0)
"""Fields of the types that a file may hold; what is None here may be a number."""


def _reading(path: Path, what: str) -> contextlib.AbstractContextManager[None]:
    return reading(
        path,
        TrainingError,
        need=f"{what}, as normswap wrote it",
        hint="removing the file, or another folder",
    )


def _scaled_rate(options: FineTune, batch_size: int) -> float:
    if options.learning_rate is None:
        return options.learning_rate_for(batch_size * options.gradient_accumulation)
    share = batch_size / options.batch_size
    return options.learning_rate * (math.sqrt(share) if options.adaptive else share)


def _first_sample(data: Any) -> Any:
    if isinstance(data, (tuple, list)) and isinstance(data[0], Tensor):
        return data[0][:1]
    with rng_kept():
        first, label = data[0] if hasattr(data, "__getitem__") else next(iter(data))
    return [first] if isinstance(label, Mapping) else first[None]


def _check_labels(targets: Mapping[str, Any]) -> None:
    names: dict[str, str] = {}
    for label in targets:
        other = names.setdefault(Cell(label, 1, 0, 0.0).name, label)
        if other != label:
            raise TrainingError(
                "targets",
                got=f"{other!r} and {label!r}, which share one file name",
                need="labels that differ in letters, digits, '.', '+' or '-'",
                hint="another label",
            )


def _recipe(target: Any) -> Any:
    """A target as plain data, to tell whether a finished cell belongs to it."""
    found = target.to_json() if hasattr(target, "to_json") else repr(target)
    return json.loads(json.dumps(found, default=repr))


def _identity(model: nn.Module | Callable[[], nn.Module], from_scratch: bool) -> str:
    if isinstance(model, nn.Module):
        if not from_scratch:
            return fingerprint(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        return f"{type(model).__qualname__} of {count:,} parameters"  # their values are drawn anew
    return str(getattr(model, "__qualname__", type(model).__qualname__))


def _reset(model: nn.Module) -> None:
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    initialise: Any = getattr(model, "init_weights", None)  # timm's own, after the plain one
    if callable(initialise):
        with torch.no_grad():
            initialise()


def _changes(now: dict[str, Any], then: dict[str, Any]) -> Iterator[str]:
    """What makes another sweep of it."""
    before = with_usual(then["options"])
    then = {**then, "options": {name: before[name] for name in now["options"]}}
    for key in now:
        if key.endswith("data"):
            yield from data_changes(key, now[key], then.get(key))
        elif key != "machine" and now[key] != then.get(key):
            yield f"{key}: {now[key]} (was {then.get(key)})"


def _read_cell(path: Path) -> dict[str, Any]:
    """A finished cell, as it was written."""
    stored: dict[str, Any] = json.loads(read_text(path))
    if stored.pop("sha256", None) != json_digest(stored):
        raise TrainingError(
            str(path),
            got="content that does not agree with its own SHA-256",
            need="the cell as a sweep wrote it",
            hint="removing the file, which trains this cell again",
        )
    return stored


def _write(path: Path, data: Any) -> None:
    write_whole(path, json.dumps(data, indent=1))
