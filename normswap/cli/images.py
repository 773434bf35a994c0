"""The options that say which images are read, and how: what ``finetune`` and ``sweep`` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.options import skip_broken_option
from normswap.errors import DataError

if TYPE_CHECKING:
    from normswap.data import Preprocessing


@dataclass(frozen=True)
class ImageChoice:
    """Which images, how they are read, and how training ones are varied."""

    data: str
    val_split: float | None
    validation: bool
    skip_broken: bool
    check_data: bool
    max_pixels: int
    augment: bool
    augmentation: dict[str, Any]
    wanted: dict[str, Any]
    ignore_index: int = 255

    def preprocessing(self, known: Preprocessing) -> Preprocessing:
        """What the model wants of its input, with what was asked for in its place."""
        from normswap.data import Preprocessing

        given = {name: value for name, value in self.wanted.items() if value is not None}
        for name in ("mean", "std"):
            if name in given and len(given[name]) != known.input_size[0]:
                raise click.UsageError(
                    f"--{name}: got {len(given[name])} numbers; need {known.input_size[0]}, "
                    "one for each channel."
                )
        if "crop_pct" in given:
            given["test_crop_pct"] = None  # who names a crop means it
        return Preprocessing(**{**asdict(known), **given}) if given else known

    def check_division(self, task: str = "classification") -> None:
        """A model must be validated on images that it is not trained on, or knowingly on none.

        Raises:
            DataError: there are none, or two ways to divide at once.
        """
        from normswap.data import (
            Preprocessing,
            has_splits,
            image_files,
            is_divided,
            is_named,
            read_folder,
        )

        if task == "classification":
            own = is_named(self.data) or has_splits(self.data)
        else:
            own = is_divided(self.data)
        if own and self.val_split is not None:
            raise DataError(
                self.data,
                got="--val-split for data that have a validation part of their own",
                need="one or the other",
                hint="leaving --val-split out, or --data "
                + ("another name" if is_named(self.data) else str(Path(self.data) / "train")),
            )
        if not self.validation and self.val_split is not None:
            raise click.UsageError("--val-split and --no-validation exclude each other.")
        if self.validation and not own and self.val_split is None and Path(self.data).is_dir():
            # a folder in which nothing can be divided is told what it lacks, not to be divided
            if task != "classification":
                image_files(self.data)
            read_folder(task, self.data, Preprocessing(), "train", val_split=0.5)
            raise DataError(
                self.data,
                got="one folder, and no images to validate on",
                need="images that the model is not trained on",
                hint="--val-split 0.2 to keep a fifth of them for that, or --no-validation",
            )

    def reader(
        self, preprocessing: Preprocessing, seed: int, task: str = "classification"
    ) -> Callable[..., Any]:
        """``read_folder`` with all that has been chosen; ``train=True`` varies the images."""
        from normswap.data import read_folder

        def read(*, train: bool, class_names: Any = None) -> Any:
            return read_folder(
                task,
                self.data,
                preprocessing if train else preprocessing.tested(),
                "train" if train else "val",
                train=train and self.augment,
                class_names=class_names,
                val_split=self.val_split,
                seed=seed,
                augmentation=self.augmentation,
                max_pixels=self.max_pixels,
                ignored=self.ignore_index,
            )

        return read

    def check_files(self, *datasets: Any) -> None:
        """Decode every file once, with ``--check-data``.

        Raises:
            DataError: some are broken, and ``--skip-broken`` was not given.
        """
        for dataset in datasets:
            if self.check_data and hasattr(dataset, "check"):
                dataset.leave_out_broken() if self.skip_broken else dataset.check()

    def division(self, seed: int) -> dict[str, Any] | None:
        """What ``evaluate`` must know to find the images that were kept out of training."""
        from normswap.data import listing_digest

        if self.val_split is None:
            return None
        listing = listing_digest(self.data)
        name = Path(self.data).resolve().name
        return {"data": name, "val_split": self.val_split, "seed": seed, "listing": listing}


_ABOVE = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(0, 1)

max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=1_000_000_000,
    show_default=True,
    help="Larger images are refused as bombs.",
)

ignore_index_option = click.option(
    "--ignore-index",
    type=click.IntRange(0, 65535),
    default=255,
    show_default=True,
    help="Number in a mask that stands for no class.",
)


def _numbers(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"got {value!r}; need numbers, like 0.485,0.456,0.406.") from error


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--data",
        required=True,
        help="train/CLASS/ and val/CLASS/ folders, or a timm data set; images/ and masks/; COCO's "
        "JSON or YOLO's labels/ with their images.",
    ),
    click.option(
        "--val-split",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Share kept for validation, where --data is one folder without parts.",
    ),
    click.option(
        "--validation/--no-validation", default=True, help="Whether to keep images for validation."
    ),
    skip_broken_option,
    click.option(
        "--check-data",
        is_flag=True,
        help="Decode every image first: broken ones are named, and --resume notices other ones.",
    ),
    max_pixels_option,
    ignore_index_option,
    click.option("--no-aug", is_flag=True, help="Train on the images as they are."),
    click.option(
        "--scale",
        nargs=2,
        type=_ABOVE,
        help="Area that a random crop keeps. [default: 0.7 1; with masks 0.25 1]",
    ),
    click.option(
        "--ratio",
        nargs=2,
        type=_ABOVE,
        help="Shape of a random crop. [default: 0.9 1.1; with masks 0.75 1.33]",
    ),
    click.option(
        "--hflip",
        type=_SHARE,
        help="Chance to mirror, for photographs. [default: 0; with masks or boxes 0.5]",
    ),
    click.option("--vflip", type=_SHARE, help="Chance to turn upside down. [default: 0]"),
    click.option(
        "--color-jitter", type=click.FloatRange(min=0), help="Of the colours. [default: none]"
    ),
    click.option("--aa", metavar="POLICY", help="timm's auto_augment, like rand-m9-mstd0.5."),
    click.option("--reprob", type=_SHARE, help="Chance to erase a part. [default: 0]"),
    click.option("--mean", callback=_numbers, help="Per channel, like 0.5,0.5,0.5."),
    click.option("--std", callback=_numbers, help="Per channel, like 0.5,0.5,0.5."),
    click.option("--interpolation", help="Of the resize, like bicubic."),
    click.option("--crop-pct", type=click.FloatRange(0, 2, min_open=True), help="Of the centre."),
)
_AUGMENTATION = {
    "scale": "scale",
    "ratio": "ratio",
    "hflip": "hflip",
    "vflip": "vflip",
    "color_jitter": "color_jitter",
    "aa": "auto_augment",
    "reprob": "re_prob",
}
_WANTED = ("mean", "std", "interpolation", "crop_pct")


def image_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the callback gets them as ``images: ImageChoice``."""

    @functools.wraps(function)
    def wrapper(
        *,
        data: str,
        val_split: float | None,
        validation: bool,
        skip_broken: bool,
        check_data: bool,
        max_pixels: int,
        ignore_index: int,
        no_aug: bool,
        **rest: Any,
    ) -> Any:
        varied = {timm: rest.pop(ours) for ours, timm in _AUGMENTATION.items()}
        varied = {name: value for name, value in varied.items() if value is not None}
        if no_aug and varied:
            raise click.UsageError("--no-aug leaves the other options of augmentation nothing.")
        images = ImageChoice(
            data=data,
            val_split=val_split,
            validation=validation,
            skip_broken=skip_broken,
            check_data=check_data,
            max_pixels=max_pixels,
            augment=not no_aug,
            augmentation=varied,
            wanted={name: rest.pop(name) for name in _WANTED},
            ignore_index=ignore_index,
        )
        return function(images=images, **rest)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper
