"""Images of another number of channels than one or three: one grey image for each channel.

Alpha and CMYK files have four; TIFF files hold any number, as pages. Pillow and the transforms know
no image of five channels, so each channel is transformed by itself, with the same random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normswap.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_FOUR = {"RGBA": "RGBA", "RGBa": "RGBA", "CMYK": "CMYK"}


@dataclass(frozen=True)
class Bands:
    """An image as one 8-bit grey image for each of its channels."""

    images: tuple[Image, ...]


@dataclass(frozen=True)
class ByBand:
    """One transform for each channel, all with the same random numbers."""

    makes: tuple[Callable[[Image], Tensor], ...]

    def __call__(self, bands: Bands) -> Tensor:
        """(C, H, W)."""
        states = random.getstate(), torch.get_rng_state()
        channels = []
        for make, image in zip(self.makes, bands.images, strict=True):
            random.setstate(states[0])
            torch.set_rng_state(states[1])
            channels.append(make(image))
        return torch.cat(channels)


def bands_of(image: Image, channels: int, grey: Callable[[Image], Image]) -> Bands:
    """A PIL image as so many bands.

    Args:
        image: of any mode, or with several pages.
        channels: how many the model takes.
        grey: makes an 8-bit grey image of one of a single channel.

    Raises:
        DataError: the image has another number of channels.
    """
    found = tuple(grey(band) for band in _bands(image, channels, grey))
    if len(found) != channels:
        raise DataError(
            "the image",
            got=f"{len(found)} channels ({image.mode}, {_pages(image)} pages)",
            need=f"the {channels} channels of the model's input",
            hint="images with alpha for 4, TIFF files with a page for each channel, or tensors of "
            "your own",
        )
    return Bands(found)


def _pages(image: Image) -> int:
    return int(getattr(image, "n_frames", 1))


def _bands(image: Image, channels: int, grey: Callable[[Image], Image]) -> Iterator[Image]:
    pages = _pages(image)
    if pages == 1 and channels == 4:
        image = grey(image) if image.mode.startswith(("I", "F")) else image
        yield from image.convert(_FOUR.get(image.mode, "RGBA")).split()
        return
    size = image.size
    for page in range(min(pages, channels + 1)):  # one too many is enough to know
        if pages > 1:
            image.seek(page)
        if image.size != size:  # the first has been measured
            raise DataError(
                "the image",
                got=f"pages of {size} and of {image.size} pixels",
                need="channels of one size",
                hint="tensors of your own",
            )
        yield from image.split() if len(image.getbands()) > 1 else (image.copy(),)
