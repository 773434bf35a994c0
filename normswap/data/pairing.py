"""What the readers of dense data share: where a split lies, its classes, what cannot be read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from torch.utils.data import Dataset

from normswap.errors import DataError, NormSwapError
from normswap.regular import read_text

_log = logging.getLogger("normswap")

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test"),
}

WHOLE = "all"
"""All of a folder that has no parts."""

CLASSES = "classes.txt"

Item = TypeVar("Item")
Sample = TypeVar("Sample")


class Samples(Dataset[Sample], Generic[Item, Sample]):
    """What is read from files, one sample at a time.

    Args:
        items: where each sample lies.
        class_names: in the order of their numbers.
    """

    def __init__(self, items: Sequence[Item], class_names: Sequence[str]) -> None:
        self.items = list(items)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.items)

    def check(self) -> None:
        """Read every sample once.

        Raises:
            DataError: some cannot be used; the text names them.
        """
        self._readable(skip=False)

    def leave_out_broken(self) -> None:
        """Go on without what cannot be used, and name it.

        Raises:
            DataError: nothing can.
        """
        self.items = [self.items[index] for index in self._readable(skip=True)]

    def _readable(self, *, skip: bool) -> list[int]:
        """The samples that can be read, after reading each of them once."""
        good: list[int] = []
        faults: list[NormSwapError] = []
        for index in range(len(self)):
            try:
                self[index]
                good.append(index)
            except NormSwapError as error:
                faults.append(error)
        if not faults:
            return good
        if skip and good:
            names = ", ".join(fault.where for fault in faults[:10])
            _log.warning("skipped %d of %d images: broken: %s", len(faults), len(self), names)
            return good
        first = faults[0]
        more = f", and {len(faults) - 1} more: " if len(faults) > 1 else ""
        rest = ", ".join(fault.where for fault in faults[1:10])
        raise DataError(first.where, got=first.got + more + rest, need=first.need, hint=first.hint)


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
        raise DataError(
            "split", got=repr(split), need="train or val", hint="--split val (split='val')"
        )
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


def halves(root: Path, split: str, other: str) -> tuple[Path, Path] | None:
    """The folders of a split's images and of what belongs to them; None if there are none."""
    for name in names_of(split):
        for images, others in (
            (root / name / "images", root / name / other),
            (root / "images" / name, root / other / name),
        ):
            if images.is_dir() and others.is_dir():
                return images, others
    return None


def named_classes(root: Path) -> tuple[str, ...] | None:
    """The names in ``classes.txt``, one a line; None where there are none.

    Raises:
        DataError: the file is no text.
    """
    file = root / CLASSES
    if not file.exists():
        return None
    try:
        names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            str(file), got=str(error), need="one class name a line", hint="removing it"
        ) from error
    return tuple(names) or None


def numbers_of(own: Sequence[str], wanted: Sequence[str], file: Path) -> list[int]:
    """What a folder's own class numbers are called in the order of the model.

    Raises:
        DataError: a class that the model does not know.
    """
    unknown = [name for name in own if name not in wanted]
    if unknown:
        raise DataError(
            str(file),
            got=f"classes that the model does not know: {', '.join(unknown[:5])}",
            need=f"classes among its {len(wanted)}",
            hint="renaming them, or fine-tuning the model on these data first",
        )
    return [list(wanted).index(name) for name in own]


def check_undivided(root: Path, val_split: float | None) -> None:
    """Raise where a folder that has parts is to be divided.

    Raises:
        DataError: ``val_split`` says so.
    """
    if val_split is not None:
        raise DataError(
            str(root),
            got=f"val_split={val_split} for a folder that is divided already",
            need="one or the other",
            hint="leaving out --val-split (val_split)",
        )


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
            "val_split",
            got=str(val_split),
            need="a share between 0 and 1",
            hint="--val-split 0.2 (val_split=0.2)",
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
