"""A run to a checkpoint and back: all that it takes to go on as if nothing had happened."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from normswap.errors import TrainingError
from normswap.training import processes
from normswap.training.checkpoints import BEST, FORMAT, LAST, read_checkpoint, write_checkpoint
from normswap.training.curves import CURVE
from normswap.training.norms import load_norm_state, norm_state
from normswap.training.options import FineTune
from normswap.training.randomness import load_rng_state, rng_state
from normswap.training.records import METRICS, Epoch

if TYPE_CHECKING:
    from normswap.training.loop import Run

log = logging.getLogger("normswap")


@dataclass
class Place:
    """Where a run is: epochs done, batches of this epoch done, updates done."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Meter:
    """Sums over the present epoch, of this process."""

    loss: float = 0.0
    hits: int = 0
    images: int = 0
    seconds: float = 0.0


def earlier_run(folder: Path | None, resume: bool, options: FineTune) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a fresh start.

    Raises:
        TrainingError: it belongs to a run with other options, or nobody asked to continue it.
    """
    if folder is None:
        if resume:
            raise TrainingError(
                "resume", got="no output folder", need="the one of the run", hint="out=…"
            )
        return None
    last = folder / LAST
    if not last.exists():
        return None
    if not resume:
        raise TrainingError(
            str(folder),
            got="the checkpoint of an earlier run",
            need="a folder without one",
            hint="resume=True, another folder, or removing this one",
        )
    found = read_checkpoint(last)
    _check_same(folder, options.differences(found["options"]))
    return found


def discard(folder: Path) -> None:
    """Remove what an earlier run left in its folder, so that another one can start there."""
    for name in (LAST, BEST, METRICS, CURVE):
        (folder / name).unlink(missing_ok=True)


def _check_same(folder: Path, changes: list[str]) -> None:
    if changes:
        raise TrainingError(
            f"resume from {folder}",
            got=", ".join(changes),
            need="the options and data of the earlier run",
            hint="them, or another folder for a new run",
        )


def save_best(run: Run, weights: dict[str, Tensor]) -> None:
    """Write the weights of the best epoch so far."""
    if run.folder is not None and run.best is not None:
        state = {"format": FORMAT, "model": weights, "epoch": asdict(run.best)}
        write_checkpoint(run.folder / BEST, state)


def save_run(run: Run) -> None:
    """Write all of a run, from every process, into one file."""
    own = {
        "rng": rng_state(),
        "norms": norm_state(run.model),
        "data": run.batches.state(),
        "meter": asdict(run.meter),
    }
    everyone = processes.gathered(run.accelerator, own)
    if run.accelerator.is_main_process and run.folder is not None:
        write_checkpoint(run.folder / LAST, _state(run, everyone))
    processes.wait_for_all(run.accelerator)  # who starts again must find this one


def _state(run: Run, everyone: list[Any]) -> dict[str, Any]:
    scaler = run.accelerator.scaler
    return {
        "format": FORMAT,
        "options": run.options.to_json(),
        "data": _data(run),
        "finished": run.place.epoch == run.options.epochs,
        "place": asdict(run.place),
        "epochs": [asdict(row) for row in run.epochs],
        "best": None if run.best is None else asdict(run.best),
        "broken": sorted(run.broken),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "average": None if run.average is None else run.average.module.state_dict(),
        "processes": everyone,
    }


def _data(run: Run) -> dict[str, int]:
    return {
        "samples": run.batches.samples,
        "batches": run.batches.count,
        "batch_size": run.batches.batch_size,
        "processes": run.share.world,
    }


def check_agreement(run: Run, found: dict[str, Any] | None) -> None:
    """Every process must have found the same checkpoint.

    Raises:
        TrainingError: they see different files, as on machines without a common file system.
    """
    own = None if found is None else found["place"]["step"]
    steps = processes.gathered(run.accelerator, own)
    if any(step != own for step in steps):
        raise TrainingError(
            str(run.folder),
            got="checkpoints of the steps " + ", ".join(map(str, steps)) + " in the processes",
            need="the same one in all of them",
            hint="a folder that all machines see",
        )


def load_run(run: Run, found: dict[str, Any]) -> None:
    """Take a run to where a checkpoint was written.

    Raises:
        TrainingError: other data or another model than the checkpoint's.
    """
    folder = run.folder or Path()
    now, then = _data(run), found["data"]
    _check_same(folder, [f"{k}={now[k]} (was {then[k]})" for k in now if now[k] != then[k]])
    _load_weights(run, found, folder)
    if run.scheduler is not None:
        run.scheduler.load_state_dict(found["scheduler"])
    if run.accelerator.scaler is not None and found["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(found["scaler"])
    own = found["processes"][run.share.rank]
    run.place, run.meter = Place(**found["place"]), Meter(**own["meter"])
    run.epochs = [Epoch(**row) for row in found["epochs"]]
    run.best = None if found["best"] is None else Epoch(**found["best"])
    run.broken = set(found["broken"])
    run.resumed_from = run.place.step
    if run.options.keep == "best" and run.best is not None:
        run.best_weights = read_checkpoint(folder / BEST)["model"]
    run.batches.load_state(own["data"])
    load_norm_state(run.model, own["norms"])
    load_rng_state(own["rng"])
    log.info("resumed at step %d of %d", run.place.step, run.steps)


def _check_fit(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise before anything is loaded; ``load_state_dict`` loads what fits and raises then."""
    other = sorted(mine.keys() ^ theirs.keys())
    other += [k for k in mine if k in theirs and _shape(mine[k]) != _shape(theirs[k])]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(f"{other[0]}{more}")


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _load_weights(run: Run, found: dict[str, Any], folder: Path) -> None:
    try:
        _check_fit(run.model.state_dict(), found["model"])
        run.model.load_state_dict(found["model"])
        run.optimizer.load_state_dict(found["optimizer"])
        if run.average is not None:
            run.average.module.load_state_dict(found["average"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"resume from {folder}",
            got=f"a model that differs from the run's: {reason}",
            need="the model the run was started with",
            hint="it, or another folder for a new run",
        ) from error
