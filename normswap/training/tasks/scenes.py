"""Masks and boxes over an image, as the picture room takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.pictures import Scene

SURE = 0.3
"""Boxes with a lower score are not drawn."""
_MOST = 30


def image_of(image: Tensor) -> Any:
    """An image as (H, W, 3) from 0 to 1, whatever it was normalised to."""
    values = image.detach().float().cpu()
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / max(high - low, 1e-6)
    channels = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
    return channels.movedim(0, -1).numpy()


def mask_scene(
    image: Tensor, mask: Tensor, classes: int, names: Sequence[str] | None, title: str
) -> Scene:
    """Class numbers (H, W) over an image (C, H, W)."""
    named = tuple(map(str, names or ()))
    count = max(classes, len(named))
    return Scene(image_of(image), title, mask=mask.cpu().numpy(), classes=count, names=named)


def box_scene(
    image: Tensor,
    found: Mapping[str, Tensor],
    names: Sequence[str] | None,
    title: str,
    sure: float = SURE,
) -> Scene:
    """Boxes over an image (C, H, W); with ``scores`` those that are sure, the surest first."""
    boxes, labels = found["boxes"].tolist(), found["labels"].tolist()
    said = "scores" in found
    scores = found["scores"].tolist() if said else [1.0] * len(boxes)
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    drawn = [
        (boxes[i], name_of(labels[i], names) + (f" {scores[i]:.2f}" if said else ""), labels[i])
        for i in order[:_MOST]
        if scores[i] >= sure
    ]
    return Scene(image_of(image), title, drawn, classes=max([*labels, len(names or ())]) + 1)


def name_of(number: int, names: Sequence[str] | None) -> str:
    """A class by its name, or its number."""
    return str(names[number]) if names is not None and number < len(names) else str(number)
