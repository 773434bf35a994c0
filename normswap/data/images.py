"""Image files to tensors: reading, converting, transforming; unlabelled folders."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normswap.data.bands import Bands, ByBand, bands_of
from normswap.data.preprocessing import Preprocessing
from normswap.errors import DataError
from normswap.libraries import library
from normswap.regular import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("normswap")

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
)
AUGMENTATION: dict[str, Any] = {
    "scale": (0.7, 1.0),
    "ratio": (0.9, 1.1),
    "hflip": 0.0,
    "vflip": 0.0,
    "color_jitter": None,
}
"""What ``transform(train=True)`` does unless it is told otherwise: a crop to 70 % of the area or
more, nothing that changes what the image shows (a mirrored digit is another sign)."""

MAX_PIXELS = 1_000_000_000
"""Images with more are refused as a bomb; a gigapixel takes 3 GB of memory."""

_MOST_RESIZED = 1 << 28
"""Pixels to which an image may be resized before it is cropped."""

_DRAWN = ("EPS", "WMF", "EMF")
"""What Pillow has another program draw."""

# what Pillow's decoders raise on files that are cut off, mislabelled or hostile
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def transform(
    preprocessing: Preprocessing, train: bool = False, **augmentation: Any
) -> Callable[[Image], Tensor]:
    """Timm's transform for one image.

    Args:
        preprocessing: what the model wants.
        train: timm's training augmentation in place of resize and crop: ``AUGMENTATION``, a random
            crop alone.
        augmentation: options of ``timm.data.create_transform`` that go before, for example
            ``hflip=0.5``, ``color_jitter=0.4``, ``auto_augment="rand-m9-mstd0.5"`` or
            ``re_prob=0.25``.

    Returns:
        A function from a PIL image to a (C, H, W) tensor.

    Raises:
        DataError: the model takes no images.
    """
    channels = channels_of(preprocessing)
    cut = not train and preprocessing.crop_mode == "center"
    shorter = max(preprocessing.input_size[1:]) / preprocessing.crop_pct if cut else 0.0
    if channels in (1, 3):
        return _Pipeline(channels, _timm_transform(preprocessing, train, augmentation), shorter)
    edges = preprocessing.input_size[1:]
    makes = [
        _timm_transform(
            replace(preprocessing, input_size=(1, *edges), mean=(mean,), std=(std,)),
            train,
            augmentation,
        )
        for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)
    ]
    return _Pipeline(channels, ByBand(tuple(makes)), shorter)


def _timm_transform(
    preprocessing: Preprocessing, train: bool, augmentation: Mapping[str, Any]
) -> Callable[[Any], Tensor]:
    make: Callable[[Any], Tensor] = library("timm.data").create_transform(
        input_size=preprocessing.input_size,
        is_training=train,
        interpolation=_of_resize(preprocessing.interpolation, train),
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        **({**AUGMENTATION, **augmentation} if train else augmentation),
    )
    return make


def _of_resize(interpolation: str, train: bool) -> str:
    return "bilinear" if interpolation == "random" and not train else interpolation


@dataclass(frozen=True)
class _Pipeline:
    """A class and not a closure, so that data loaders can send it to their workers."""

    channels: int
    make: Callable[[Any], Tensor]
    shorter: float = 0.0
    """What the shorter edge is resized to, where the longer one follows; else 0."""

    def __call__(self, image: Image | Bands) -> Tensor:
        made = to_channels(image, self.channels)
        first = made.images[0] if isinstance(made, Bands) else made
        self.check_shape(*sorted(first.size))
        return self.make(made)

    def check_shape(self, short: int, long: int) -> None:
        """A line of pixels would be resized to a field of millions."""
        if self.shorter**2 * long / max(short, 1) > _MOST_RESIZED:
            raise DataError(
                "the image",
                got=f"edges of {short} and {long} pixels",
                need=f"a shape that has at most {_MOST_RESIZED:,} pixels when the shorter edge is "
                f"resized to {self.shorter:.0f}",
                hint="cutting it into pieces",
            )


def channels_of(preprocessing: Preprocessing) -> int:
    """Number of channels; an error for models that take no images."""
    size = preprocessing.input_size
    if len(size) != 3:
        raise DataError(
            "preprocessing.input_size",
            got=str(size),
            need="(C, H, W) to read image files",
            hint="passing a tensor of your own, or a Dataset",
        )
    return size[0]


def to_channels(image: Image | Bands, channels: int = 3) -> Any:
    """Any PIL image (grey, 16 bit, palette, RGBA, CMYK, a TIFF of many pages …) in 8 bits.

    Pillow clips 16-bit and float images at 255 when asked for RGB; here they are scaled first.

    Returns:
        RGB for three channels, grey for one, else :class:`normswap.data.bands.Bands`.

    Raises:
        DataError: the image has another number of channels, and the model takes neither 1 nor 3.
    """
    if isinstance(image, Bands):
        return image
    if channels not in (1, 3):
        return bands_of(image, channels, _grey)
    return _rgb_or_grey(image, channels)


def _grey(image: Image) -> Image:
    return _rgb_or_grey(image, 1)


def _rgb_or_grey(image: Image, channels: int) -> Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _to_8_bit(image: Image) -> Image:
    import numpy as np
    import PIL.Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = float(values.max(initial=0.0))
    if image.mode == "F" and peak <= 1.0:
        scale = 255.0
    elif peak <= 255.0 and image.mode in ("F", "I"):
        scale = 1.0
    else:
        scale = 255.0 / max(peak, 65535.0)
    return PIL.Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def read_image(path: Path, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Any:
    """Read and decode one image file; see :func:`to_channels` for what comes back.

    Args:
        path: of the file.
        channels: 1 or 3.
        max_pixels: larger images are refused.

    Raises:
        DataError: the file cannot be decoded, or is larger; the text names it.
    """
    try:
        with warnings.catch_warnings(), open_regular(path) as file, opened(file) as image:
            warnings.simplefilter("ignore")  # remarks on odd but readable metadata
            check_pixels(path, image, max_pixels)
            decode(image)
            return to_channels(image, channels)
    except DataError as error:
        raise DataError(str(path), got=error.got, need=error.need, hint=error.hint) from error
    except UNREADABLE as error:
        raise _broken(path, error) from error


def size_of(path: Path) -> tuple[int, int]:
    """Width and height as an image's header says; nothing is decoded.

    Raises:
        DataError: it is no image, or larger than ``MAX_PIXELS``.
    """
    try:
        with warnings.catch_warnings(), open_regular(path) as file, opened(file) as image:
            warnings.simplefilter("ignore")
            check_pixels(path, image, MAX_PIXELS)
            return image.width, image.height
    except UNREADABLE as error:
        raise _broken(path, error) from error


def undecodable(error: Exception) -> str:
    """Why a file could not be decoded, without the name that Python gives the open file.

    Example:
        >>> undecodable(OSError("cannot identify image file <_io.BufferedReader name=3>"))
        'OSError: cannot identify image file'
    """
    text = re.sub(r"\s*<_io\.[^>]*>", "", str(error))
    return f"{type(error).__name__}: {text[:80]}"


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        str(path),
        got=f"a broken image ({undecodable(error)})",
        need="a complete image file",
        hint="removing it, or --skip-broken (on_broken='skip')",
    )


_BOUND = threading.Lock()


@contextlib.contextmanager
def opened(file: Any) -> Iterator[Image]:
    """``PIL.Image.open`` without its own bound; ``check_pixels`` has ours.

    Raises:
        OSError: no image, or one that another program would have to draw.
    """
    import PIL.Image

    with _unbounded():  # it looks at its bound when it reads the header
        image = PIL.Image.open(file)
    with image:
        if image.format in _DRAWN:
            raise OSError(f"{image.format}, which another program would have to draw")
        yield image


def decode(image: Image) -> None:
    """``image.load()`` without Pillow's own bound."""
    if image.format == "TIFF":  # it looks again
        with _unbounded():
            image.load()
    else:
        image.load()


@contextlib.contextmanager
def _unbounded() -> Iterator[None]:
    import PIL.Image

    with _BOUND:  # Pillow keeps its bound in a global
        before, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = before


def check_pixels(path: Path, image: Image, max_pixels: int) -> None:
    """Refuse an image whose header promises more than may be decoded.

    Raises:
        DataError: it has more pixels than that.
    """
    found = image.width * image.height
    if found > max_pixels:
        raise DataError(
            str(path),
            got=f"an image of {image.width} x {image.height} = {found:,} pixels",
            need=f"at most {max_pixels:,}",
            hint=f"--max-pixels {found} (max_pixels={found}) if the file is what it says",
        )


def image_files(folder: str | Path) -> list[Path]:
    """Every image below a folder, at any depth, sorted; links are followed, hidden files left out.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(
            str(folder), got="nothing there", need="a folder of images", hint="another path"
        )
    if folder.is_file():
        return [folder]
    found = images_below(folder)
    if not found:
        raise DataError(
            str(folder),
            got="a folder without images",
            need=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
            hint="another folder",
        )
    return found


def images_below(folder: Path) -> list[Path]:
    """The image files below a folder, sorted, links to folders followed once; none is no error."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        paths = (Path(place, name) for name in files if name[0] != ".")
        found += (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if path.is_file())


def load_images(
    folder: str | Path,
    preprocessing: Preprocessing,
    *,
    limit: int | None = None,
    on_broken: str = "error",
) -> Tensor:
    """Unlabelled images as one preprocessed batch.

    Args:
        folder: images at any depth, or one image.
        preprocessing: what the model wants.
        limit: at most so many, taken evenly over the sorted files, so that a folder sorted by
            class is not cut down to its first classes.
        on_broken: ``"error"``, or ``"skip"`` to leave broken images out and log how many.

    Shape:
        (N, C, H, W).

    Raises:
        DataError: no image, or a broken one; the text names the file.
    """
    check_on_broken(on_broken)
    if limit is not None and limit < 1:
        raise DataError("limit", got=str(limit), need="at least 1", hint="leaving it out")
    make = transform(preprocessing)
    channels = channels_of(preprocessing)
    files = _evenly(image_files(folder), limit)
    tensors, broken = [], 0
    for path in files:
        try:
            tensors.append(make(read_image(path, channels)))
        except DataError:
            if on_broken == "error":
                raise
            broken += 1
    if broken:
        logger.warning("%s: skipped %d of %d images: broken", folder, broken, len(files))
    if not tensors:
        raise DataError(
            str(folder),
            got=f"{broken} images, all broken",
            need="images that can be decoded",
            hint="another folder",
        )
    return torch.stack(tensors)


def _evenly(files: list[Path], limit: int | None) -> list[Path]:
    if limit is None or limit >= len(files):
        return files
    return [files[(2 * i + 1) * len(files) // (2 * limit)] for i in range(limit)]


def check_on_broken(on_broken: str) -> None:
    """Refuse anything but the two known ways of treating broken images."""
    if on_broken not in ("error", "skip"):
        raise DataError(
            "on_broken", got=repr(on_broken), need="'error' or 'skip'", hint="one of them"
        )
