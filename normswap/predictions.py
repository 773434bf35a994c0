"""Images in, classes out: what a classifier says of images that nobody has labelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.data import MAX_PIXELS, Preprocessing, image_files, read_image, transform
from normswap.data.images import channels_of
from normswap.errors import DataError
from normswap.progress import Progress, ProgressCallback
from normswap.running import evaluating, placed
from normswap.training.tasks.classification import class_scores


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

    Attributes:
        file: the image.
        classes: names, or numbers as text where the model knows no names; the likeliest first.
        probabilities: theirs, from the softmax.
        problem: why the image could not be read, or None.
    """

    file: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str | None = None


def predictions(
    model: nn.Module,
    images: str | Path,
    preprocessing: Preprocessing,
    *,
    class_names: Sequence[str] | None = None,
    top: int = 1,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    max_pixels: int = MAX_PIXELS,
    on_broken: str = "error",
    progress: ProgressCallback | None = None,
) -> Iterator[Prediction]:
    """Say what is on images, a batch at a time, in the order of their names.

    Args:
        model: gives logits; torch's or one from ``load_onnx``.
        images: a folder, at any depth, or one file.
        preprocessing: what the model wants of them.
        class_names: in the order of the logits.
        top: how many classes for each image.
        batch_size: images per forward.
        device: where to run; None is where the model is.
        max_pixels: larger images are refused.
        on_broken: ``"error"``, or ``"skip"`` to say what is wrong and go on.
        progress: called with the number of images done and of all.

    Raises:
        DataError: no images, or a broken one.
    """
    files = image_files(images)
    make, channels = transform(preprocessing), channels_of(preprocessing)
    with placed(device, model) as where, evaluating(model), torch.no_grad():
        for start in range(0, len(files), batch_size):
            read: list[tuple[Path, Any]] = []
            for path in files[start : start + batch_size]:
                try:
                    read.append((path, make(read_image(path, channels, max_pixels))))
                except DataError as error:
                    if on_broken == "error":
                        raise
                    yield Prediction(path, problem=error.got)
            yield from _said(model, read, class_names, top, batch_size, where)
            if progress is not None:
                progress(Progress(min(start + batch_size, len(files)), len(files)))


def _said(
    model: nn.Module,
    read: list[tuple[Path, Any]],
    class_names: Sequence[str] | None,
    top: int,
    batch_size: int,
    where: torch.device,
) -> Iterator[Prediction]:
    if not read:
        return
    batch = torch.stack([image for _, image in read])
    fixed = getattr(model, "batch_size", None)
    if fixed is not None and len(batch) < batch_size:  # an ONNX file with a batch of one size
        batch = torch.cat([batch, batch[:1].expand(batch_size - len(batch), *batch.shape[1:])])
    scores = class_scores(model(batch.to(where)))[: len(read)].float().softmax(1).cpu()
    if class_names is not None and len(class_names) != scores.shape[1]:
        raise DataError(
            "class names",
            got=f"{len(class_names)} for a model of {scores.shape[1]} outputs",
            need="one for each output",
            hint="the model as it was saved",
        )
    best = scores.topk(min(top, scores.shape[1]), dim=1)
    for (path, _), numbers, shares in zip(
        read, best.indices.tolist(), best.values.tolist(), strict=True
    ):
        names = tuple(str(n) if class_names is None else str(class_names[n]) for n in numbers)
        yield Prediction(path, names, tuple(shares))
