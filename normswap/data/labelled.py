"""Images with labels: class folders, and the datasets that timm knows by name."""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from normswap import checks
from normswap.data.images import (
    MAX_PIXELS,
    UNREADABLE,
    channels_of,
    check_on_broken,
    check_pixels,
    decode,
    images_below,
    opened,
    read_image,
    transform,
)
from normswap.data.pairing import SPLITS
from normswap.data.preprocessing import Preprocessing
from normswap.errors import DataError, InstallationError, NormSwapError, in_short, some
from normswap.libraries import library
from normswap.regular import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("normswap")

_NAMED = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Image files with class numbers.

    Args:
        samples: (file, class number) pairs.
        class_names: the classes in the order of their numbers.
        make: from a PIL image to a tensor.
        channels: 1 or 3.
        on_broken: ``"error"``: reading a broken image raises and names it; ``"skip"``: all files
            are decoded once, here, and the broken ones left out (they stand in ``skipped``), so
            that length, order and metrics are those of the good images.
        max_pixels: larger images are refused.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        class_names: Sequence[str],
        make: Callable[[Image], Tensor],
        *,
        channels: int = 3,
        on_broken: str = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_on_broken(on_broken)
        self.max_pixels = max_pixels
        self.samples = list(samples)
        self.class_names = tuple(class_names)
        self.transform = make
        self.channels = channels
        self.skipped: tuple[Path, ...] = ()
        if on_broken == "skip":
            self.leave_out_broken()

    @property
    def targets(self) -> list[int]:
        """The class number of every sample."""
        return [target for _, target in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        return self.transform(read_image(path, self.channels, self.max_pixels)), target

    def broken(self) -> tuple[Path, ...]:
        """The files that cannot be decoded; every file is read once."""
        paths = [path for path, _ in self.samples]
        with ThreadPoolExecutor() as pool:  # decoding releases the GIL
            good = list(pool.map(functools.partial(_is_readable, self.max_pixels), paths))
        return tuple(path for path, ok in zip(paths, good, strict=True) if not ok)

    def check(self) -> None:
        """Find broken files before work starts.

        Raises:
            DataError: there are some; the text names the first ten.
        """
        found = [str(path) for path in self.broken()]
        if found:
            raise DataError(
                found[0],
                got=f"{len(found)} of {len(self)} images broken: {some(sorted(found), 10)}",
                need="images that can be decoded",
                hint="repairing or removing them, or --skip-broken (on_broken='skip')",
            )

    def leave_out_broken(self) -> None:
        """Go on without the files that cannot be decoded, and name them."""
        paths = [path for path, _ in self.samples]
        self.skipped = self.broken()
        gone = set(self.skipped)
        self.samples = [sample for sample in self.samples if sample[0] not in gone]
        if self.skipped:
            logger.warning(
                "skipped %d of %d images: broken: %s",
                len(self.skipped),
                len(paths),
                some(sorted(map(str, self.skipped)), 10),
            )
        if not self.samples:
            raise DataError(
                str(paths[0].parent) if paths else "samples",
                got=f"{len(paths)} images, all broken",
                need="images that can be decoded",
                hint="another folder",
            )


def _is_readable(max_pixels: int, path: Path) -> bool:
    try:
        with warnings.catch_warnings(), open_regular(path) as file, opened(file) as image:
            warnings.simplefilter("ignore")
            check_pixels(path, image, max_pixels)
            image.draft("RGB", (64, 64))  # JPEG: the whole file is read at an eighth of the work
            decode(image)
    except (*UNREADABLE, DataError):
        return False
    return True


def labelled_dataset(
    spec: str | Path,
    preprocessing: Preprocessing,
    split: str = "val",
    train: bool = False,
    class_names: Sequence[str] | None = None,
    *,
    val_split: float | None = None,
    seed: int = 0,
    on_broken: str = "error",
    root: str | Path | None = None,
    download: bool = False,
    augmentation: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset[tuple[Tensor, int]]:
    """Images with labels, as a dataset of (tensor, class number) with ``.class_names``.

    Args:
        spec: a folder with ``train/CLASS/…`` and ``val/CLASS/…``; a folder with ``CLASS/…`` alone;
            or a name that ``timm.data.create_dataset`` knows (``hfds/…``, ``wds/…``, ``torch/…``).
        preprocessing: what the model wants.
        split: ``"train"`` or ``"val"`` (other names are handed to timm for its own datasets).
        train: timm's training augmentation.
        class_names: the model's classes, in the order of its logits; folders are matched to them
            by name. Without it the sorted folder names of the training part are the classes.
        val_split: share of each class that a folder without splits gives to ``"val"``; which
            images depends on their names and ``seed`` alone. Without it such a folder is one split.
        seed: of the split.
        on_broken: see ``LabelledImages``.
        root: where a named dataset lies, or is to be put.
        download: let timm download a named dataset.
        augmentation: further options of ``transform``, used when ``train`` is set.
        max_pixels: larger images are refused.

    Raises:
        DataError: no such folder, no class folders, a class folder that is empty or missing in
            one of the splits, folders that are not among ``class_names``.
    """
    make = transform(preprocessing, train, **(augmentation or {}) if train else {})
    if is_named(spec):
        return _named_dataset(str(spec), split, train, class_names, make, root, download)
    samples, names = _folder_samples(Path(spec), split, class_names, val_split, seed)
    return LabelledImages(
        samples,
        names,
        make,
        channels=channels_of(preprocessing),
        on_broken=on_broken,
        max_pixels=max_pixels,
    )


def is_named(spec: str | Path) -> bool:
    """Whether a spec is the name of a data set, and no folder."""
    return str(spec).startswith(_NAMED) and not Path(spec).exists()


def listing_digest(folder: str | Path) -> str:
    """SHA-256 over the names and sizes of the images in a folder, wherever that lies."""
    root = Path(folder)
    names = sorted(
        f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in images_below(root)
    )
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def has_splits(folder: str | Path) -> bool:
    """Whether a folder holds both a training and a validation part."""
    return all(_split_folder(Path(folder), split) for split in SPLITS)


def _folder_samples(
    root: Path,
    split: str,
    class_names: Sequence[str] | None,
    val_split: float | None,
    seed: int,
) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    if split not in SPLITS:
        raise DataError("split", got=repr(split), need="'train' or 'val'", hint="one of them")
    if not root.is_dir():
        raise DataError(
            str(root), got="nothing there", need="a folder of class folders", hint="another path"
        )
    folder, reference = _part(root, split, val_split)
    folders = _class_folders(folder)
    if reference is not None and reference != folder:
        _check_same_classes(folder, set(folders), set(_class_folders(reference)))
    names = tuple(class_names) if class_names is not None else tuple(sorted(folders))
    numbers = _class_numbers(folder, folders, names)
    samples = []
    for name, path in folders.items():
        files = images_below(path)
        if reference is None:
            files = _take(files, path, split, val_split, seed)
        if not files:
            raise DataError(
                str(path),
                got="a class folder without images",
                need="at least one image in every class folder",
                hint="removing the folder or filling it",
            )
        samples += [(file, numbers[name]) for file in files]
    return samples, names


def _part(root: Path, split: str, val_split: float | None) -> tuple[Path, Path | None]:
    """The folder to read and the one whose classes it must have; None where it is to be divided."""
    train, val = (_split_folder(root, name) for name in SPLITS)
    own, other = (train, val) if split == "train" else (val, train)
    if own is not None and other is not None:
        return own, train
    if own is None and other is None:
        return root, None
    if val_split is not None:
        return own or other or root, None
    if own is not None:
        return own, own
    raise DataError(
        str(root),
        got=f"a folder {(other or root).name} alone",
        need=f"a folder {split} beside it",
        hint="adding it, or dividing one folder with --val-split 0.2 (val_split=0.2)",
    )


def _split_folder(root: Path, split: str) -> Path | None:
    def holds_classes(folder: Path) -> bool:  # a class may be called "train": it holds images
        return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())

    return next((root / name for name in SPLITS[split] if holds_classes(root / name)), None)


def _class_folders(folder: Path) -> dict[str, Path]:
    found = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if not found:
        raise DataError(
            str(folder),
            got="no class folders",
            need="one sub-folder of images per class",
            hint="the layout train/CLASS/image.jpg, val/CLASS/image.jpg",
        )
    return found


def _check_same_classes(folder: Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("missing", expected - found), ("not in train", found - expected)):
        if names:
            raise DataError(
                str(folder),
                got=f"class folders {what}: {some(sorted(names), 5)}",
                need="the same class folders in train and val",
                hint="adding or removing them",
            )


def _class_numbers(folder: Path, folders: Iterable[str], names: Sequence[str]) -> dict[str, int]:
    numbers = {name: number for number, name in enumerate(names)}
    unknown = set(folders) - set(numbers)
    if unknown and len(names) == 1000:
        # ImageNet folders carry WordNet ids, its models readable names
        numbers = {name: number for number, name in enumerate(imagenet_names())}
        unknown = set(folders) - set(numbers)
    counts = Counter(names)
    twice = {name for name in folders if counts[name] > 1}
    if twice:
        raise DataError(
            str(folder),
            got=f"class folders that name several classes of the model: {some(sorted(twice), 5)}",
            need="one class for each folder",
            hint="class_names without repetition; ImageNet's folders by their WordNet ids",
        )
    if unknown:
        raise DataError(
            str(folder),
            got=f"class folders that the model does not know: {some(sorted(unknown), 5)}",
            need=f"folders among its {len(names)} classes: {some(sorted(names), 5)}",
            hint="renaming them, or fine-tuning the model on this folder first",
        )
    return numbers


def imagenet_names() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's thousand classes, which are the names of its folders."""
    found: tuple[str, ...] = tuple(library("timm.data").ImageNetInfo().label_names())
    return found


def _take(
    files: list[Path], folder: Path, split: str, val_split: float | None, seed: int
) -> list[Path]:
    if val_split is None:
        return files
    if not checks.above(val_split, 0) or val_split >= 1:
        raise DataError(
            "val_split",
            got=repr(val_split),
            need="a share between 0 and 1",
            hint="--val-split 0.2 (val_split=0.2)",
        )

    def rank(file: Path) -> bytes:
        # by name, so that neither the disk's order nor a moved folder changes the split
        name = f"{seed}/{folder.name}/{file.relative_to(folder).as_posix()}"
        return hashlib.sha256(name.encode()).digest()

    if len(files) < 2:
        raise DataError(
            str(folder),
            got=f"{len(files)} images",
            need="at least 2 to divide between train and val",
            hint="adding images or removing the class",
        )
    count = min(max(1, round(len(files) * val_split)), len(files) - 1)
    chosen = set(sorted(files, key=rank)[:count])
    return [file for file in files if (file in chosen) == (split == "val")]


def _named_dataset(
    name: str,
    split: str,
    train: bool,
    class_names: Sequence[str] | None,
    make: Callable[[Image], Tensor],
    root: str | Path | None,
    download: bool,
) -> Dataset[tuple[Tensor, int]]:
    create = library("timm.data").create_dataset
    asked = "validation" if split == "val" else split
    where = None if root is None else str(root)
    try:
        dataset = create(name, root=where, split=asked, is_training=train, download=download)
    except NormSwapError:
        raise
    except ImportError as error:
        package = (error.name or "datasets").partition(".")[0]
        raise InstallationError(
            name, got=f"no package named {package}", need="it", hint=f"`pip install {package}`"
        ) from error
    except Exception as error:
        raise DataError(
            name,
            got=f"{type(error).__name__}: {in_short(error)}",
            need="a dataset that timm.data.create_dataset can open",
            hint="another --split (split; root=FOLDER where it lies, download=True)",
        ) from error
    dataset.transform = make
    dataset.class_names = tuple(class_names) if class_names else _names_of(dataset)
    result: Dataset[tuple[Tensor, int]] = dataset
    return result


def _names_of(dataset: Any) -> tuple[str, ...] | None:
    classes = getattr(dataset, "classes", None)
    if classes:
        return tuple(str(name) for name in classes)
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(sorted(numbers, key=numbers.__getitem__)) if numbers else None
