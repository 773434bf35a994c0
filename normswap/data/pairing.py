"""What the readers of dense data share: where a split lies, and how one folder is divided."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from normswap.errors import DataError, NormSwapError

_log = logging.getLogger("normswap")

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test"),
}

WHOLE = "all"
"""All of a folder that has no parts."""

Item = TypeVar("Item")


def folder_of(root: str | Path) -> Path:
    """``root`` as a folder that exists.

    Raises:
        DataError: there is none.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(
            str(folder),
            got="a file" if folder.exists() else "nothing there",
            need="a folder of data",
            hint="giving the folder that holds the images",
        )
    return folder


MOST_CLASSES = 1 << 16
"""More are no classes, but numbers of things."""


def check_classes(file: Path, number: int) -> None:
    """Raise where a number stands for more classes than there are in any data.

    Raises:
        DataError: each of them would be an output of the model.
    """
    if number >= MOST_CLASSES:
        raise DataError(
            str(file),
            got=f"the class number {number}",
            need=f"numbers below {MOST_CLASSES}",
            hint="a file classes.txt with the name of each class, and their numbers from 0 on",
        )


def names_of(split: str) -> tuple[str, ...]:
    """What the folder or file of a split may be called.

    Raises:
        DataError: there is no such split.
    """
    if split not in SPLITS:
        raise DataError("split", got=repr(split), need="train or val", hint="split='val'")
    return SPLITS[split]


def is_divided(root: str | Path, split: str = "val") -> bool:
    """Whether a folder of images with masks or boxes has such a part."""
    folder = Path(root)
    return any(
        (folder / name).is_dir()
        or (folder / "images" / name).is_dir()
        or next((folder / "annotations").glob(f"instances_{name}*.json"), None) is not None
        for name in names_of(split)
    )


def readable(dataset: Any, *, skip: bool) -> list[int]:
    """The samples that can be read, after reading each of them once.

    Args:
        dataset: with ``listed()``.
        skip: go on without the others, and name them.

    Raises:
        DataError: some cannot be read, and none may be skipped, or none can.
    """
    good: list[int] = []
    faults: list[NormSwapError] = []
    for index in range(len(dataset)):
        try:
            dataset[index]
            good.append(index)
        except NormSwapError as error:
            faults.append(error)
    if not faults:
        return good
    if skip and good:
        names = ", ".join(fault.where for fault in faults[:10])
        _log.warning("skipped %d of %d images: broken: %s", len(faults), len(dataset), names)
        return good
    first = faults[0]
    more = f", and {len(faults) - 1} more: " if len(faults) > 1 else ""
    rest = ", ".join(fault.where for fault in faults[1:10])
    raise DataError(first.where, got=first.got + more + rest, need=first.need, hint=first.hint)


def divided(
    items: Sequence[Item],
    keys: Sequence[str],
    split: str,
    *,
    val_split: float,
    seed: int,
    where: str,
) -> list[Item]:
    """One part of a folder that has no split of its own; both parts are never empty.

    Which part an item belongs to depends on its key and the seed alone, so that an added image
    moves no other one.
    """
    if not 0 < val_split < 1:
        raise DataError(
            "val_split", got=str(val_split), need="a share between 0 and 1", hint="val_split=0.2"
        )
    if len(items) < 2:
        raise DataError(
            where, got=f"{len(items)} images", need="two at least, to divide", hint="more images"
        )
    order = sorted(range(len(items)), key=lambda i: _rank(keys[i], seed))
    count = min(max(1, round(val_split * len(items))), len(items) - 1)
    chosen = set(order[:count]) if split == "val" else set(order[count:])
    return [item for index, item in enumerate(items) if index in chosen]


def _rank(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


def no_split(folder: Path, split: str, layout: str) -> DataError:
    """The error for a folder that is neither divided nor to be divided."""
    return DataError(
        str(folder),
        got=f"no {split} part",
        need=layout,
        hint="dividing the folder with --val-split 0.2 (val_split=0.2)",
    )
