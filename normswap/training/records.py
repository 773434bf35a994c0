"""What a run leaves on record: history, ``metrics.jsonl``, TensorBoard's events, the curve."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from normswap import pictures
from normswap.errors import TrainingError
from normswap.files import write_whole
from normswap.progress import Progress
from normswap.reading import Malformed, check_no_link, reading
from normswap.regular import read_text
from normswap.room import room_for
from normswap.training.tasks.base import Metrics

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


@dataclass(frozen=True)
class TrainingProgress(Progress):
    """Where a run is; handed to the ``progress`` callable after every update.

    Attributes:
        done: updates done; also ``step``.
        total: updates of the whole run; also ``steps``.
        message: the rest in one line.
        epoch: number of the epoch, from 1.
        epochs: how many there are.
        loss: mean training loss of this epoch so far.
        accuracy: training top-1 of this epoch so far; None where labels are no classes.
        learning_rate: of the next update.
        images_per_second: over this call of ``finetune``, all processes together.
        eta_seconds: time left at this speed, validation included.
    """

    epoch: int = field(kw_only=True)
    epochs: int = field(kw_only=True)
    loss: float = field(kw_only=True)
    accuracy: float | None = field(kw_only=True)
    learning_rate: float = field(kw_only=True)
    images_per_second: float = field(kw_only=True)
    eta_seconds: float = field(kw_only=True)

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.done)

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return int(self.total or 0)


TrainingCallback = Callable[[TrainingProgress], None]


@dataclass(frozen=True)
class Epoch:
    """One line of a history.

    Attributes:
        epoch: its number, from 1.
        step: updates done at its end.
        learning_rate: at its end.
        train_loss: mean over the epoch, as optimised (smoothing and teacher included); None for
            epoch 0, the start.
        train_top1: over the epoch, in training mode; None where labels are no classes.
        val_loss: after the epoch; None without validation data, and for detectors.
        val_top1: likewise.
        val_top5: likewise.
        seconds: of training, without validation.
        images_per_second: of training, all processes together.
        val_metric: mean IoU, mAP, or the mean of the caller's own metric; None without one.
        passage: how much of the passage was behind the model; None without one.
    """

    epoch: int
    step: int
    learning_rate: float
    train_loss: float | None
    train_top1: float | None
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    seconds: float
    images_per_second: float | None
    val_metric: float | None = None
    passage: float | None = None

    @classmethod
    def from_json(cls, data: Any) -> Epoch:
        """The inverse of ``dataclasses.asdict``.

        Raises:
            Malformed, TypeError: a field is missing, or is no number.
        """
        found = cls(**data)
        for item in fields(found):
            value = getattr(found, item.name)
            kinds = (int,) if item.type == "int" else (int, float)
            absent = value is None and "None" in str(item.type)
            if isinstance(value, bool) or not (absent or isinstance(value, kinds)):
                raise Malformed(f"{item.name} of an epoch is {value!r:.40}")
        return found

    @property
    def score(self) -> float | None:
        """What epochs are compared by, higher is better: the metric, else top-1, else -loss."""
        if self.val_metric is not None:
            return self.val_metric
        if self.val_top1 is not None:
            return self.val_top1
        return None if self.val_loss is None else -self.val_loss


@dataclass(frozen=True)
class History:
    """What a fine-tune did.

    Attributes:
        epochs: one entry per finished epoch, those before a resume included.
        steps: updates done.
        learning_rate: at the top of the schedule.
        best: the epoch with the highest score on the validation data, or None without any. Epoch 0
            is the start, if none of the epochs came up to it. One in the middle of a passage does
            not count: it is no pure network.
        kept: ``"last"`` or ``"best"``: which weights the model holds.
        broken: indices of samples that could not be read and were replaced.
        resumed_from: the step at which this call took over, or None.
        interrupted: the signal that ended it early, or None.
        original: the BatchNorm original on the validation data, where it could be had; None
            otherwise.
        start: the model on the validation data before the first step; None without such data.
    """

    epochs: tuple[Epoch, ...]
    steps: int
    learning_rate: float
    best: Epoch | None
    kept: str
    broken: tuple[int, ...] = ()
    resumed_from: int | None = None
    interrupted: str | None = None
    original: Metrics | None = None
    start: Metrics | None = None

    @property
    def gain(self) -> float | None:
        """Score of the kept weights less that of the start; None where one is not known."""
        kept = self.best if self.kept == "best" else self.epochs[-1] if self.epochs else None
        if kept is None or kept.score is None or self.start is None:
            return None
        return kept.score - self.start.score

    @property
    def verdict(self) -> str:
        """Original, start, best and last side by side, and what to try where training did harm."""
        last = self.epochs[-1] if self.epochs else None
        found: list[tuple[str, Metrics | Epoch | None]] = [
            ("BatchNorm original", self.original),
            ("start", self.start),
            (f"best {_when(self.best)}", self.best),
            ("last", last),
        ]
        scores = [(name, item.score) for name, item in found if item is not None]
        metric = last is not None and (last.val_metric is not None or last.val_top1 is None)
        parts = [f"{name} {_shown(score, metric)}" for name, score in scores if score is not None]
        if not parts:
            return "nothing was validated"
        text = f"{'score' if metric else 'top-1'}: {', '.join(parts)}; kept: {self.kept}"
        if self.gain is not None:
            text += f", {_points(self.gain, metric)} against the start"
        return text + self._advice(last)

    def _advice(self, last: Epoch | None) -> str:
        if last is None or last.score is None or self.start is None:
            return ""
        if last.score >= self.start.score - HARM:
            return ""
        return (
            ". Training did harm: try a smaller learning rate, more epochs, or training the norms "
            "alone"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)


HARM = 0.005
"""A score that falls by less than this is noise."""


def _when(best: Epoch | None) -> str:
    if best is None:
        return ""
    return f"(epoch {best.epoch})" if best.epoch else "(the start)"


def _shown(score: float, metric: bool) -> str:
    return f"{score:.4g}" if metric else f"{100 * score:.2f} %"


def _points(difference: float, metric: bool) -> str:
    return f"{difference:+.4g}" if metric else f"{100 * difference:+.2f} points"


class MetricsLog:
    """Writes ``metrics.jsonl`` and TensorBoard's events below a folder.

    Args:
        folder: where; None writes no files.
        step: lines beyond it come from a run that was killed after its last checkpoint, and go.
        tensorboard: write events too, where TensorBoard is installed.
        also: gets the numbers of each line too, and its step.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        step: int,
        tensorboard: bool,
        also: Callable[..., Any] | None = None,
    ) -> None:
        self._file, self._also = None, also
        self._board: Any = None
        if folder is None:
            return
        check_no_link(folder / EVENTS, TrainingError)
        path = folder / METRICS
        _truncate(path, step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = _board(folder, step)

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line; ``values`` holds the ``step`` it belongs to."""
        if self._file is not None:
            with room_for(self._file.name, TrainingError):
                self._file.write(json.dumps({"kind": kind, **values}) + "\n")
                self._file.flush()
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if name != "step" and isinstance(value, (int, float))
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, values["step"])
        if self._also is not None:
            self._also(numbers, step=values["step"])

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without one that a killed process left half written.

    Raises:
        TrainingError: the file holds something else.
    """
    path = Path(folder) / METRICS
    return [row for row, _ in _rows(path)] if path.exists() else []


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    found = []
    with _reading_metrics(path):
        for line in read_text(path).splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise Malformed(f"the line {line:.40}")
            found.append((row, line))
    return found


def _reading_metrics(path: Path) -> contextlib.AbstractContextManager[None]:
    return reading(
        path,
        TrainingError,
        need="one JSON object with its step on each line, as a run wrote them",
        hint="removing the file: the run goes on without its earlier lines",
    )


def _truncate(path: Path, step: int) -> None:
    if not os.path.lexists(path):
        return
    # written anew whatever it was: a link, also a broken one, would lead to somebody else's file
    rows = _rows(path) if step and path.exists() else []
    kept = [line for row, line in rows if row["step"] <= step]
    write_whole(path, "".join(line + "\n" for line in kept))


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / EVENTS), purge_step=step + 1)


CURVE = "learning_curve.png"


def draw_learning_curve(
    epochs: Sequence[Epoch],
    path: str | Path,
    *,
    original: Metrics | None = None,
    start: Metrics | None = None,
    metric: str = "metric",
) -> Path:
    """Draw loss and accuracy over the epochs, training and validation.

    Args:
        epochs: ``History.epochs``.
        path: of the PNG; it is replaced whole.
        original: drawn as a horizontal line: the BatchNorm original on the validation data.
        start: likewise: the model before the first step.
        metric: the name of the epochs' ``val_metric``.
    """
    panels: dict[str, tuple[pictures.Values, pictures.Values]] = {
        "loss": ([e.train_loss for e in epochs], [e.val_loss for e in epochs])
    }
    own_metric = any(e.val_metric is not None for e in epochs)
    if own_metric:
        panels[metric] = ([], [e.val_metric for e in epochs])
    else:
        panels["top-1"] = ([e.train_top1 for e in epochs], [e.val_top1 for e in epochs])
    numbers = [item.epoch for item in epochs]
    levels = {
        name: {title: found.loss if title == "loss" else found.score for title in panels}
        for name, found in (("original", original), ("start", start))
        if found is not None
    }
    return pictures.learning_curve(numbers, panels, path, percent=not own_metric, levels=levels)
