"""Images with masks: ``images/`` and ``masks/`` with equal stems.

    DATA/train/images/a.jpg   DATA/train/masks/a.png    and the same under val/
    DATA/images/train/a.jpg   DATA/masks/train/a.png    likewise
    DATA/images/a.jpg         DATA/masks/a.png          with a share for validation

A mask holds one class number a pixel, in 8 or 16 bits or as a palette; one number is ignored.
``classes.txt`` in DATA may name the classes, one a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normswap.data.bands import Bands
from normswap.data.images import (
    MAX_PIXELS,
    UNREADABLE,
    channels_of,
    check_pixels,
    decode,
    images_below,
    opened,
    read_image,
    size_of,
    undecodable,
)
from normswap.data.pairing import (
    CLASSES,
    WHOLE,
    Samples,
    check_classes,
    check_undivided,
    divided,
    folder_of,
    halves,
    named_classes,
    no_split,
    numbers_of,
)
from normswap.data.preprocessing import Preprocessing
from normswap.errors import DataError
from normswap.regular import open_regular

IGNORED = 255
"""The number that marks pixels of no class, as in Pascal VOC and Cityscapes."""

_LAYOUT = "train/images, train/masks, val/images and val/masks, or images/ and masks/ alone"


class SegmentationImages(Samples[tuple[Path, Path], tuple[Tensor, Tensor]]):
    """Images with masks, as (image, mask) pairs.

    Args:
        pairs: (image file, mask file).
        class_names: the classes in the order of their numbers.
        preprocessing: what the model wants; both are resized to its input size.
        train: augment: a random crop of a quarter to all of the area, and a flip.
        ignored: the number in a mask that stands for no class.
        augmentation: other than that: ``scale`` and ``ratio`` of the crop, ``hflip``, ``vflip``,
            ``color_jitter``.
        max_pixels: larger images are refused.
        numbers: what stands in the files → the class that it means; None: the same.

    Shape:
        ((C, H, W) float32, (H, W) int64).

    Raises:
        DataError: on reading, with the file's name: a mask of another size than its image, of
            several channels, or with a class that there is not.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        train: bool = False,
        ignored: int = IGNORED,
        augmentation: Mapping[str, Any] | None = None,
        max_pixels: int = MAX_PIXELS,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(pairs, class_names)
        self.numbers = np.asarray(range(len(class_names)) if numbers is None else numbers)
        self.ignored, self.max_pixels = ignored, max_pixels
        self.channels = channels_of(preprocessing)
        self.transform = joint_transform(preprocessing, train=train, **(augmentation or {}))

    def listed(self) -> list[tuple[tuple[Path, ...], None]]:
        """The files of every sample, for who wants to know whether they are the same again."""
        return [(pair, None) for pair in self.items]

    @property
    def pairs(self) -> list[tuple[Path, Path]]:
        """(image file, mask file) of every sample."""
        return self.items

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors

        image_file, mask_file = self.items[index]
        image = read_image(image_file, self.channels, self.max_pixels)
        size = (image.images[0] if isinstance(image, Bands) else image).size
        mask = read_mask(mask_file, size)
        self._check_classes(mask, mask_file)
        known = mask != self.ignored
        mask[known] = self.numbers[mask[known]]
        picture, labels = self.transform(image, tv_tensors.Mask(torch.from_numpy(mask)))
        return picture.as_subclass(Tensor), labels.as_subclass(Tensor).to(torch.int64)

    def _check_classes(self, mask: np.ndarray[Any, Any], file: Path) -> None:
        known = len(self.numbers)
        wrong = (mask >= known) & (mask != self.ignored)
        if wrong.any():
            raise DataError(
                str(file),
                got=f"class {int(mask[wrong][0])}",
                need=f"0 to {known - 1}, or {self.ignored} for pixels of no class",
                hint=f"more classes, or the number to ignore (--ignore-index, now {self.ignored})",
            )


def read_mask(
    file: Path, size: tuple[int, int] | None = None
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The class numbers of a mask file, (H, W).

    Args:
        file: of the mask.
        size: width and height of its image; a mask of another one is not decoded.

    Raises:
        DataError: it cannot be decoded, is of another size, or holds colours.
    """
    try:
        with open_regular(file) as stream, opened(stream) as image:
            check_pixels(file, image, MAX_PIXELS)
            if size is not None and image.size != size:
                raise DataError(
                    str(file),
                    got=f"a mask of {image.width}x{image.height}",
                    need=f"{size[0]}x{size[1]}, as its image",
                    hint="drawing it at the size of its image",
                )
            decode(image)
            mode, values = image.mode, np.asarray(image)
    except UNREADABLE as error:
        raise DataError(
            str(file),
            got=f"a broken mask ({undecodable(error)})",
            need="a complete PNG",
            hint="removing it with its image",
        ) from error
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise DataError(
            str(file),
            got=f"a mask of mode {mode}",
            need="one class number a pixel: 8 or 16 bits of grey, or a palette",
            hint="saving class numbers and not colours",
        )
    return values.astype(np.int32)  # a copy, which may be changed


def joint_transform(
    preprocessing: Preprocessing,
    *,
    train: bool,
    scale: tuple[float, float] = (0.25, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    **variation: Any,
) -> Callable[..., Any]:
    """Resize, crop and flip an image together with its mask."""
    from torchvision import tv_tensors
    from torchvision.transforms import InterpolationMode, v2

    size = list(preprocessing.input_size[-2:])
    kinds = {mode.value: mode for mode in InterpolationMode}
    interpolation = kinds.get(preprocessing.interpolation, InterpolationMode.BILINEAR)
    if train:
        geometry = [
            v2.RandomResizedCrop(
                size, scale=scale, ratio=ratio, interpolation=interpolation, antialias=True
            ),
            *variations(**variation),
        ]
    else:
        geometry = [v2.Resize(size, interpolation=interpolation, antialias=True)]
    made: Callable[..., Any] = v2.Compose(
        [
            v2.ToImage(),
            *geometry,
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    return made


def variations(
    *, hflip: float = 0.5, vflip: float = 0.0, color_jitter: float | None = None
) -> list[Any]:
    """What varies an image together with its mask or its boxes, besides a crop."""
    from torchvision.transforms import v2

    found: list[Any] = []
    if hflip:
        found.append(v2.RandomHorizontalFlip(hflip))
    if vflip:
        found.append(v2.RandomVerticalFlip(vflip))
    if color_jitter:
        found.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return found


def segmentation_dataset(
    root: str | Path,
    preprocessing: Preprocessing,
    split: str = "val",
    *,
    train: bool = False,
    class_names: Sequence[str] | None = None,
    val_split: float | None = None,
    seed: int = 0,
    ignored: int = IGNORED,
    augmentation: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> SegmentationImages:
    """Images with masks from a folder; see the module's docstring for the layouts.

    Args:
        root: the folder.
        preprocessing: what the model wants.
        split: ``"train"``, ``"val"``, or ``"all"`` for a folder without parts.
        train: augment image and mask together.
        class_names: the classes in the order of the model's outputs, to whose numbers those of
            ``classes.txt`` are brought; None takes ``classes.txt``, else as many as the masks of
            this split hold, by number.
        val_split: share that a folder without splits gives to ``"val"``.
        seed: of that division.
        ignored: the number in a mask that stands for no class.
        augmentation: as for ``SegmentationImages``.
        max_pixels: larger images are refused.

    Raises:
        DataError: no such folder or layout, an image without a mask or a mask without an image.
    """
    folder = folder_of(root)
    pairs = _pairs(folder, split, val_split, seed)
    own = named_classes(folder)
    names = tuple(class_names or own or _counted(pairs, ignored))
    return SegmentationImages(
        pairs,
        names,
        preprocessing,
        train=train,
        ignored=ignored,
        augmentation=augmentation,
        max_pixels=max_pixels,
        numbers=None if own is None else numbers_of(own, names, folder / CLASSES),
    )


def _pairs(root: Path, split: str, val_split: float | None, seed: int) -> list[tuple[Path, Path]]:
    if split == WHOLE:
        return _matched(root / "images", root / "masks")
    part = halves(root, split, "masks")
    if part is not None:
        check_undivided(root, val_split)
        return _matched(*part)
    images, masks = root / "images", root / "masks"
    if not (images.is_dir() and masks.is_dir()) or val_split is None:
        raise no_split(root, split, _LAYOUT)
    found = _matched(images, masks)
    keys = [image.relative_to(images).as_posix() for image, _ in found]
    return divided(found, keys, split, val_split=val_split, seed=seed, where=str(images))


def _matched(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """The files of two folders by their stems, sub-folders included."""
    pictures, drawn = (
        {path.relative_to(folder).with_suffix("").as_posix(): path for path in images_below(folder)}
        for folder in (images, masks)
    )
    for what, here, there, folder in (
        ("an image", pictures, drawn, masks),
        ("a mask", drawn, pictures, images),
    ):
        alone = sorted(set(here) - set(there))
        if alone:
            raise DataError(
                str(here[alone[0]]),
                got=f"{what} without its other half"
                + (f", and {len(alone) - 1} more" if len(alone) > 1 else ""),
                need=f"a file {alone[0]} in {folder}",
                hint="adding it, or moving this one away",
            )
    if not pictures:
        raise DataError(
            str(images), got="no images", need="images and their masks", hint="another folder"
        )
    return [(pictures[stem], drawn[stem]) for stem in sorted(pictures)]


def _counted(pairs: Sequence[tuple[Path, Path]], ignored: int) -> tuple[str, ...]:
    most = 0
    for image, file in pairs:
        mask = read_mask(file, size_of(image))
        most = max(most, int(mask[mask != ignored].max(initial=0)))
        check_classes(file, most)
    return tuple(str(number) for number in range(most + 1))
