"""Images in, masks or boxes out: what a model says of images that nobody has drawn on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap import pictures
from normswap.data import MAX_PIXELS, Preprocessing, image_files, read_image
from normswap.data.images import channels_of
from normswap.errors import DataError
from normswap.progress import Progress, ProgressCallback
from normswap.running import evaluating, placed
from normswap.training.tasks.scenes import box_scene, mask_scene, name_of
from normswap.training.tasks.segmentation import pixel_scores


@dataclass(frozen=True)
class Thing:
    """A class on an image.

    Attributes:
        name: of the class, or its number as text.
        share: of the pixels, or the score of the box.
        box: (x0, y0, x1, y1) in pixels of the image file; None of a mask.
    """

    name: str
    share: float
    box: tuple[float, ...] | None = None

    @property
    def place(self) -> str:
        """The box in words."""
        return "" if self.box is None else " ".join(f"{edge:.0f}" for edge in self.box)


@dataclass(frozen=True)
class DensePrediction:
    """What a model says of one image.

    Attributes:
        file: the image.
        things: what is on it, the surest box or the largest class first.
        picture: where it was drawn, or None.
        problem: why the image could not be read, or None.
    """

    file: Path
    things: tuple[Thing, ...] = ()
    picture: Path | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)


def dense_predictions(
    model: nn.Module,
    images: str | Path,
    preprocessing: Preprocessing,
    *,
    task: str,
    class_names: Sequence[str] | None = None,
    min_score: float = 0.5,
    pictures_in: str | Path | None = None,
    device: str | torch.device | None = None,
    max_pixels: int = MAX_PIXELS,
    on_broken: str = "error",
    progress: ProgressCallback | None = None,
) -> Iterator[DensePrediction]:
    """Say what is where on images, one at a time, in the order of their names.

    Args:
        model: a segmentation network or a detector.
        images: a folder, at any depth, or one file.
        preprocessing: what a segmentation network wants; a detector sees images as they are.
        task: ``"segmentation"`` or ``"detection"``.
        class_names: in the order of the model's numbers.
        min_score: boxes with less are left out.
        pictures_in: folder for a picture of each image, under the names of the images.
        device: where to run; None is where the model is.
        max_pixels: larger images are refused.
        on_broken: ``"error"``, or ``"skip"`` to say what is wrong and go on.
        progress: called after each image.

    Raises:
        DataError: no images, or a broken one.
    """
    files = image_files(images)
    root = Path(images)
    make = _segmented if task == "segmentation" else _detected
    with placed(device, model) as where, evaluating(model), torch.no_grad():
        for done, path in enumerate(files, start=1):
            try:
                image = read_image(path, channels_of(preprocessing), max_pixels)
            except DataError as error:
                if on_broken == "error":
                    raise
                yield DensePrediction(path, problem=error.got)
                continue
            things, scene = make(model, image, preprocessing, class_names, min_score, where)
            drawn = None
            if pictures_in is not None:
                name = path.relative_to(root) if root.is_dir() else Path(path.name)
                # the suffix stays in the name: a.jpg and a.png are two images
                drawn = Path(pictures_in) / name.parent / f"{name.name}.png"
                drawn.parent.mkdir(parents=True, exist_ok=True)
                pictures.scenes([[scene]], drawn)
            yield DensePrediction(path, tuple(things), drawn)
            if progress is not None:
                progress(Progress(done, len(files)))


def _segmented(
    model: nn.Module,
    image: Any,
    preprocessing: Preprocessing,
    names: Sequence[str] | None,
    _min_score: float,
    where: torch.device,
) -> tuple[list[Thing], pictures.Scene]:
    from normswap.data.segmentation import joint_transform

    plain = _to_tensor(image)
    batch = joint_transform(preprocessing, train=False)(image)[None].as_subclass(Tensor)
    fixed = getattr(model, "batch_size", None) or 1  # an ONNX file with a batch of one size
    scores = pixel_scores(model(batch.expand(fixed, *batch.shape[1:]).to(where)))[:1].float()
    scores = F.interpolate(scores, plain.shape[-2:], mode="bilinear", align_corners=False)[0]
    mask = scores.argmax(0).cpu()
    shares = torch.bincount(mask.flatten(), minlength=len(scores)) / mask.numel()
    order = shares.argsort(descending=True, stable=True).tolist()
    things = [Thing(name_of(n, names), float(shares[n])) for n in order if shares[n] > 0]
    return things, mask_scene(plain, mask, len(scores), names, "")


def _detected(
    model: nn.Module,
    image: Any,
    _preprocessing: Preprocessing,
    names: Sequence[str] | None,
    min_score: float,
    where: torch.device,
) -> tuple[list[Thing], pictures.Scene]:
    plain = _to_tensor(image)
    (found,) = model([plain.to(where)])
    found = {name: found[name].cpu() for name in ("boxes", "labels", "scores")}
    order = found["scores"].argsort(descending=True, stable=True)
    order = order[found["scores"][order] >= min_score]
    found = {name: values[order] for name, values in found.items()}
    things = [
        Thing(name_of(number, names), score, tuple(round(edge, 1) for edge in box))
        for number, score, box in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
    ]
    return things, box_scene(plain, found, names, "", min_score)


def _to_tensor(image: Any) -> Tensor:
    """(C, H, W) from 0 to 1, at the size of the file."""
    from torchvision.transforms.v2 import functional

    values: Tensor = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)
    return values.as_subclass(Tensor)
