"""What a model wants of its input, as plain checked data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from normswap import checks
from normswap.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROP_MODES = ("center", "squash", "border")
_MOST_NUMBERS = 1 << 28
_LEAST_STD = 1e-9  # float32 divides by it


@dataclass(frozen=True)
class Preprocessing:
    """What a model wants of its input.

    Args:
        input_size: (C, H, W), or (C, T, H, W) for video; (C, L) or (C,) where there is no image.
        mean: per channel, on the scale 0 to 1.
        std: per channel, on the scale 0 to 1.
        interpolation: of the resize, for example ``"bicubic"``.
        crop_pct: edge of the crop over edge of the resized image.
        crop_mode: ``"center"`` (keeps the aspect ratio, cuts the rest away), ``"squash"`` (keeps
            all, bends the aspect ratio) or ``"border"`` (keeps all, pads).
        test_input_size: at which the model is evaluated, where that is not ``input_size``.
        test_crop_pct: likewise for ``crop_pct``.

    Raises:
        DataError: a field is out of its range.

    Example:
        >>> Preprocessing(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,)).input_size
        (1, 28, 28)
    """

    input_size: tuple[int, ...] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    test_input_size: tuple[int, ...] | None = None
    test_crop_pct: float | None = None

    def __post_init__(self) -> None:
        size = _positive_ints("input_size", self.input_size)
        object.__setattr__(self, "input_size", size)
        for name in ("mean", "std"):
            values = _finite_floats(name, getattr(self, name))
            if len(values) != size[0]:
                raise _bad_field(
                    name, f"{len(values)} numbers", f"one for each of {size[0]} channels"
                )
            object.__setattr__(self, name, values)
        if min(self.std) < _LEAST_STD or max(map(abs, self.mean)) > 1 / _LEAST_STD:
            got = f"{self.std} around {self.mean}"
            raise _bad_field("std", got, f"deviations of {_LEAST_STD} at least")
        self._check_crops()
        if self.interpolation not in _INTERPOLATIONS:
            raise _bad_field(
                "interpolation", repr(self.interpolation), f"one of {', '.join(_INTERPOLATIONS)}"
            )
        if self.crop_mode not in _CROP_MODES:
            raise _bad_field("crop_mode", repr(self.crop_mode), f"one of {', '.join(_CROP_MODES)}")

    def _check_pixels(self) -> None:
        """A file may ask for images that no memory holds; before a crop they are larger still."""
        for name in ("", "test_"):
            size = getattr(self, f"{name}input_size") or self.input_size
            share = getattr(self, f"{name}crop_pct") or self.crop_pct
            if math.prod(size) > _MOST_NUMBERS * min(share, 1.0) ** 2:
                raise _bad_field(
                    f"{name}input_size",
                    f"{size} and a crop of {share:g}",
                    f"images of at most {_MOST_NUMBERS:,} numbers before the crop",
                )

    def _check_crops(self) -> None:
        crops: dict[str, Any] = {"crop_pct": self.crop_pct}
        if self.test_crop_pct is not None:
            crops["test_crop_pct"] = self.test_crop_pct
        for name, share in crops.items():
            if not checks.above(share, 0) or share > 2:
                raise _bad_field(name, repr(share), "a number above 0, at most 2")
        if self.test_input_size is not None:
            tested = _positive_ints("test_input_size", self.test_input_size)
            if (len(tested), tested[0]) != (len(self.input_size), self.input_size[0]):
                raise _bad_field(
                    "test_input_size", str(tested), f"another size than {self.input_size} alone"
                )
            object.__setattr__(self, "test_input_size", tested)
        self._check_pixels()

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_json(cls, data: Any) -> Preprocessing:
        """The inverse of ``to_json``.

        Raises:
            DataError: ``data`` is no such thing.

        Example:
            >>> Preprocessing.from_json(Preprocessing().to_json()) == Preprocessing()
            True
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise _bad_field("fields", repr(data)[:80], f"a mapping with {sorted(known)}")
        return cls(**data)

    def with_channels(self, channels: int) -> Preprocessing:
        """The same for images of another number of channels.

        One channel gets the average of means and deviations, more than there are repeat them.

        Example:
            >>> Preprocessing().with_channels(1).mean
            (0.449,)
            >>> Preprocessing().with_channels(4).std
            (0.229, 0.224, 0.225, 0.229)
        """
        if channels == self.input_size[0]:
            return self
        values = asdict(self)
        values["input_size"] = (channels, *self.input_size[1:])
        if self.test_input_size is not None:
            values["test_input_size"] = (channels, *self.test_input_size[1:])
        for name in ("mean", "std"):
            old = values[name]
            average = round(sum(old) / len(old), 6)
            values[name] = (
                (average,) if channels == 1 else tuple(old[i % len(old)] for i in range(channels))
            )
        return Preprocessing(**values)

    def resized(self, image_size: int | Sequence[int] | None) -> Preprocessing:
        """The same for images of another height and width (one number: square)."""
        if image_size is None:
            return self
        if len(self.input_size) < 3:
            raise _bad_field("image_size", repr(image_size), "a model that takes images")
        edges = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(edges) != 2:
            raise _bad_field("image_size", repr(image_size), "one number, or height and width")
        values = asdict(self)
        values["input_size"] = (*self.input_size[:-2], *edges)
        values["test_input_size"] = None  # who names a size means it
        return Preprocessing(**values)

    def tested(self) -> Preprocessing:
        """What the model wants of its input when it is evaluated.

        Example:
            >>> Preprocessing(test_input_size=(3, 288, 288), test_crop_pct=1.0).tested().input_size
            (3, 288, 288)
        """
        values = asdict(self)
        size, share = (values.pop(name) for name in ("test_input_size", "test_crop_pct"))
        return Preprocessing(
            **values
            | {"input_size": size or self.input_size}
            | {"crop_pct": self.crop_pct if share is None else share}
        )


def _bad_field(name: str, got: str, need: str) -> DataError:
    return DataError(f"preprocessing.{name}", got=got, need=need, hint="correcting that field")


def _positive_ints(name: str, values: Any) -> tuple[int, ...]:
    good = isinstance(values, list | tuple) and 1 <= len(values) <= 4
    if not good or not all(checks.whole(v, 1) for v in values):
        raise _bad_field(name, repr(values), "one to four positive integers, channels first")
    return tuple(values)


def _finite_floats(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(checks.number(v) for v in values):
        raise _bad_field(name, repr(values), "a list of finite numbers")
    return tuple(float(v) for v in values)
