"""Checkpoints of a run: plain data and its hash, whole or not there; which a run may go on from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from normswap.artifact.record import OWN_FILES
from normswap.checkpoints import check_archive, save_checkpoint
from normswap.errors import TrainingError, in_short, some
from normswap.files import content_digest, current, write_whole
from normswap.reading import Malformed, reading
from normswap.room import full
from normswap.training.options import FineTune
from normswap.training.records import CURVE, EVENTS, METRICS

FORMAT = 1
LAST = "last.pt"
BEST = "best.pt"
RUN_FILES = (LAST, BEST, METRICS, CURVE, EVENTS, *OWN_FILES)
"""What a run and its artefact leave in their folder."""


def write_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under its name only when all of it is on the disk.

    Args:
        path: final name.
        state: tensors, numbers, strings, lists, tuples and dicts; nothing that needs unpickling.

    Raises:
        TrainingError: it cannot be written, for example because the disk is full. The earlier
            checkpoint under that name is untouched then.
    """
    path = Path(path)
    sealed = {**state, "sha256": content_digest(state)}
    try:
        write_whole(path, lambda part: save_checkpoint(sealed, part))
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of some
        earlier = "; the checkpoint written before is still whole, resume from it"
        raise TrainingError(
            str(path),
            got=full(error) or f"{type(error).__name__}: {in_short(error)}",
            need="room for the checkpoint and the right to write it",
            hint="freeing disk space" + (earlier if path.is_file() else ""),
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling code.

    Raises:
        TrainingError: the file is damaged, has been changed or is no checkpoint of a fine-tune.
    """
    path = Path(path)
    with reading_checkpoint(path):
        place = current(path.parent, path.name)
        check_archive(place)
        state = torch.load(place, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise Malformed(f"a {type(state).__name__}, no dict")
        if state.get("format") != FORMAT:
            raise Malformed(f"format {state.get('format')!r}")
        seal = state.pop("sha256", None)
        if seal is None:
            raise Malformed("no hash of its content, as version 0.1 wrote it")
        if seal != content_digest(state):
            raise Malformed("content that does not agree with its own SHA-256")
    return state


def reading_checkpoint(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn any failure of reading a checkpoint, or of taking it over, into one that names it."""
    return reading(
        path,
        TrainingError,
        need=f"a training checkpoint of format {FORMAT}, as this run wrote it",
        hint="another output directory, or removing the file to start afresh",
    )


def remove_parts(folder: Path) -> None:
    """Remove what version 0.1 left beside its files when it was killed."""
    for path in folder.glob("*.part"):
        if path.stem in RUN_FILES:
            path.unlink()


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
            hint="--resume (resume=True), another folder, or removing this one",
        )
    found = read_checkpoint(last)
    with reading_checkpoint(last):
        check_same(folder, options.differences(found["options"]))
    return found


def check_same(folder: Path, changes: list[str]) -> None:
    """Raise if anything has changed since the earlier run."""
    if changes:
        raise TrainingError(
            f"resume from {folder}",
            got=", ".join(changes),
            need="the options and data of the earlier run",
            hint="them; when that run has ended, a new one goes on from its result: `normswap "
            f"finetune {folder} -o ANOTHER` with the new options (load(…), then finetune)",
        )


def check_fit(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise before anything is loaded; ``load_state_dict`` loads what fits and raises then."""
    other = sorted(mine.keys() ^ theirs.keys())
    other += [k for k in mine if k in theirs and _shape(mine[k]) != _shape(theirs[k])]
    if other:
        raise Malformed(some(other, 1))


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
