"""More kinds of images than were given: parts of them, other colours, two in one.

What is solved from few images fits what these few show. Channels that go together on them need not
on others, and a made-up image shows other company: on EfficientNet-Lite0 (notes of the benchmarks)
a third of a site's error on images of other things goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.running import first

_SMALLEST = 0.45
"""Edge of the smallest part, as a share of the image's."""
_GAIN, _SHIFT = 0.4, 0.2
"""Of a channel, in shares of itself and of the batch's deviation."""
_CELLS = (4, 11)
"""Along an edge of the pattern by which two images are put together: fewest, and one too many."""


def varied(batches: Sequence[Any], most: int, draw: torch.Generator) -> Iterator[Any]:
    """The batches, and up to ``most`` images of each kind made from those that are images."""
    yield from batches
    for batch in first(filter(_are_images, batches), most):
        for make in _KINDS:
            mirrored = _rolled(batch, draw) < 0.5
            yield make(torch.where(mirrored, batch.flip(-1), batch), draw)


def _are_images(batch: Any) -> bool:
    return isinstance(batch, Tensor) and batch.dim() == 4 and batch.is_floating_point()


def _rolled(x: Tensor, draw: torch.Generator, channels: int = 1) -> Tensor:
    """A number between 0 and 1 for each image, or for each of its channels."""
    return torch.rand(len(x), channels, 1, 1, generator=draw).to(x)


def _part(x: Tensor, draw: torch.Generator) -> Tensor:
    """A part of each image, in the size of the whole."""
    height, width = x.shape[-2:]
    found = []
    for image, (edge, top, left) in zip(x, torch.rand(len(x), 3, generator=draw), strict=True):
        share = float(_SMALLEST + (1 - _SMALLEST) * edge)
        rows, columns = max(1, round(share * height)), max(1, round(share * width))
        y, z = round(float(top) * (height - rows)), round(float(left) * (width - columns))
        part = image[None, :, y : y + rows, z : z + columns]
        found.append(F.interpolate(part, (height, width), mode="bilinear", align_corners=False))
    return torch.cat(found)


def _recoloured(x: Tensor, draw: torch.Generator) -> Tensor:
    """A gain and a shift for each channel, and the channels in another order."""
    channels = x.shape[1]
    gain = 1 + _GAIN * (2 * _rolled(x, draw, channels) - 1)
    shift = _SHIFT * (2 * _rolled(x, draw, channels) - 1) * x.std()
    return (x * gain + shift)[:, torch.randperm(channels, generator=draw)]


def _partners(x: Tensor, draw: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=draw).to(x.device)].flip(-1)


def _blended(x: Tensor, draw: torch.Generator) -> Tensor:
    """Two images through each other."""
    return x.lerp(_partners(x, draw), 0.2 + 0.6 * _rolled(x, draw))


def _patched(x: Tensor, draw: torch.Generator) -> Tensor:
    """Two images beside each other, in random shapes of several sizes."""
    shapes = []
    for _ in range(len(x)):
        cells = int(torch.randint(*_CELLS, (), generator=draw))
        coarse = torch.rand(1, 1, cells, cells, generator=draw).to(x)
        shapes.append(F.interpolate(coarse, x.shape[-2:], mode="bicubic", align_corners=False))
    return torch.where(torch.cat(shapes) > 0.5, x, _partners(x, draw))


_KINDS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    _part, _recoloured, _blended, _patched,
)  # fmt: skip
