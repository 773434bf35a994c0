"""Images with boxes: COCO's JSON, or YOLO's text files.

    DATA/train/*.jpg        DATA/annotations/instances_train.json      (COCO; train2017 and so on)
    DATA/train/*.jpg        DATA/train/_annotations.coco.json          (COCO, as Roboflow writes it)
    DATA/images/*.jpg       DATA/annotations.json                      with a share for validation
    DATA/images/train/*.jpg DATA/labels/train/*.txt                    (YOLO; or train/images …)
    DATA/images/*.jpg       DATA/labels/*.txt                          with a share for validation

Class 0 is the background, as in torchvision's detectors; the classes of the data follow from 1 on.
``classes.txt`` in DATA names the classes of YOLO's numbers, one a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.data.images import MAX_PIXELS, images_below, read_image, size_of
from normswap.data.pairing import (
    WHOLE,
    Samples,
    check_classes,
    check_undivided,
    divided,
    folder_of,
    halves,
    named_classes,
    names_of,
    no_split,
    numbers_of,
)
from normswap.data.segmentation import variations
from normswap.errors import DataError
from normswap.reading import reading
from normswap.regular import read_text

BACKGROUND = "__background__"

_LAYOUT = "COCO's train/ and annotations/instances_train.json, or YOLO's images/ and labels/"
_FORMATS = "COCO's instances, or lines of YOLO's class, centre and size"
_SLACK = 1.0  # pixels by which rounding may push a box over the edge


@dataclass(frozen=True)
class Annotated:
    """An image with what is on it.

    Attributes:
        file: the image.
        boxes: (x0, y0, x1, y1) in pixels.
        classes: one number per box, from 1.
        crowd: whether the box stands for a crowd, which training leaves out.
        source: the file that says so, for error texts.
    """

    file: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    classes: tuple[int, ...]
    crowd: tuple[bool, ...]
    source: Path


_Found = tuple[list[Annotated], tuple[str, ...]]


class DetectionImages(Samples[Annotated, tuple[Tensor, dict[str, Tensor]]]):
    """Images with boxes, as torchvision's detectors take them.

    Args:
        items: what there is.
        class_names: by number; the first is the background.
        train: flip at random, and leave crowds out.
        augmentation: other than that: ``hflip``, ``vflip``, ``color_jitter``.
        max_pixels: larger images are refused.

    Shape:
        ((3, H, W) float32 from 0 to 1, ``{"boxes": (n, 4), "labels": (n,), "crowd": (n,)}``).

    Raises:
        DataError: on reading, with the file's name: a box outside of its image.
    """

    def __init__(
        self,
        items: Sequence[Annotated],
        class_names: Sequence[str],
        *,
        train: bool = False,
        augmentation: Mapping[str, Any] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(items, class_names)
        self.train, self.max_pixels = train, max_pixels
        self.variations = variations(**(augmentation or {})) if train else []

    def listed(self) -> list[tuple[tuple[Path, ...], tuple[Any, ...]]]:
        """File and boxes of every sample, for who wants to know whether they are the same again."""
        return [((item.file,), (item.boxes, item.classes, item.crowd)) for item in self.items]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        item = self.items[index]
        image = read_image(item.file, 3, self.max_pixels)
        kept = [i for i, crowd in enumerate(item.crowd) if not (crowd and self.train)]
        boxes = torch.tensor([item.boxes[i] for i in kept], dtype=torch.float32).reshape(-1, 4)
        self._check_inside(boxes, item, image.width, image.height)
        boxes[:, 0::2].clamp_(0, image.width)
        boxes[:, 1::2].clamp_(0, image.height)
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes, format="XYXY", canvas_size=(image.height, image.width)
            ),
            "labels": torch.tensor([item.classes[i] for i in kept], dtype=torch.int64),
            "crowd": torch.tensor([item.crowd[i] for i in kept], dtype=torch.bool),
        }
        steps = v2.Compose(
            [
                v2.ToImage(),
                *self.variations,
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )
        picture, target = steps(image, target)
        return picture.as_subclass(Tensor), {k: v.as_subclass(Tensor) for k, v in target.items()}

    def _check_inside(self, boxes: Tensor, item: Annotated, width: int, height: int) -> None:
        edges = torch.tensor([width, height, width, height], dtype=torch.float32) + _SLACK
        outside = ((boxes < -_SLACK) | (boxes > edges)).any(1)
        if outside.any():
            box = [round(v, 1) for v in boxes[outside][0].tolist()]
            raise DataError(
                str(item.source),
                got=f"the box {box} on {item.file.name}, which is {width}x{height}",
                need="boxes inside their images",
                hint="correcting it, or the image that it belongs to",
            )


def detection_dataset(
    root: str | Path,
    split: str = "val",
    *,
    train: bool = False,
    class_names: Sequence[str] | None = None,
    val_split: float | None = None,
    seed: int = 0,
    augmentation: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DetectionImages:
    """Images with boxes from a folder; see the module's docstring for the layouts.

    Args:
        root: the folder.
        split: ``"train"``, ``"val"``, or ``"all"`` for a folder without parts.
        train: augment, and leave crowds out.
        class_names: the classes in the order of the model's outputs, background first; None takes
            those of the data.
        val_split: share that a folder without splits gives to ``"val"``.
        seed: of that division.
        augmentation: as for ``DetectionImages``.
        max_pixels: larger images are refused.

    Raises:
        DataError: no such folder or layout, a file that is no annotation, a missing image, a box
            without area, a category that there is not.
    """
    folder = folder_of(root)
    items, names = _part(folder, split, val_split, seed)
    items, names = _renumbered(items, names, class_names)
    return DetectionImages(
        items, names, train=train, augmentation=augmentation, max_pixels=max_pixels
    )


def _part(folder: Path, split: str, val_split: float | None, seed: int) -> _Found:
    found = None
    if split != WHOLE:
        found = _coco_split(folder, split) or _yolo_split(folder, split)
    if found is not None:
        check_undivided(folder, val_split)
        return found
    whole = _coco_whole(folder) or _yolo_whole(folder)
    if whole is not None and split == WHOLE:
        return whole
    if whole is None or val_split is None:
        raise no_split(folder, split, _LAYOUT)
    items, names = whole
    keys = [item.file.name for item in items]
    return divided(items, keys, split, val_split=val_split, seed=seed, where=str(folder)), names


def _renumbered(
    items: list[Annotated],
    names: tuple[str, ...],
    wanted: Sequence[str] | None,
) -> _Found:
    """The data's own classes, or the same under the numbers that a model gives them."""
    if wanted is None or tuple(wanted) == names:
        return items, names
    numbers = numbers_of(names, wanted, items[0].source)
    moved = [replace(item, classes=tuple(numbers[c] for c in item.classes)) for item in items]
    return moved, tuple(wanted)


# --------------------------------------------------------------------------------------- COCO


def _coco_split(root: Path, split: str) -> _Found | None:
    for name in names_of(split):
        for home in sorted(root.glob(f"{name}*")):
            own = home / "_annotations.coco.json"
            if own.is_file():
                return read_coco(own, home)
            file = root / "annotations" / f"instances_{home.name}.json"
            if home.is_dir() and file.is_file():
                return read_coco(file, home)
        file = root / "annotations" / f"instances_{name}.json"
        if file.is_file():
            return read_coco(file, root / "images")
    return None


def _coco_whole(root: Path) -> _Found | None:
    for file in (root / "annotations.json", root / "annotations" / "instances.json"):
        if file.is_file():
            return read_coco(file, root / "images" if (root / "images").is_dir() else root)
    return None


def read_coco(file: Path, images: Path) -> _Found:
    """The instances of a COCO file and the names of its classes, background first.

    Raises:
        DataError: it is no such file, or names an image, a category or a box that cannot be.
    """
    with reading(file, DataError, need=_FORMATS, hint="correcting the file"):
        return _coco(json.loads(read_text(file)), file, images)


def _coco(data: Any, file: Path, images: Path) -> _Found:
    categories = {c["id"]: str(c["name"]) for c in data["categories"]}
    pictures = {p["id"]: str(p["file_name"]) for p in data["images"]}
    boxes = [(a["image_id"], a) for a in data["annotations"]]
    order = sorted(categories)
    numbers = {key: number for number, key in enumerate(order, start=1)}
    grouped: dict[Any, list[Mapping[str, Any]]] = {key: [] for key in pictures}
    for image, annotation in boxes:
        if image not in grouped:
            raise _malformed(file, f"an annotation on image {image!r}, which it does not list")
        grouped[image].append(annotation)
    items = [
        _coco_boxes(_image(images, name, file), grouped[key], numbers, file)
        for key, name in sorted(pictures.items(), key=lambda pair: str(pair[1]))
    ]
    if not items:
        raise _malformed(file, "no images")
    return items, (BACKGROUND, *(categories[key] for key in order))


def _coco_boxes(
    image: Path, annotations: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int], file: Path
) -> Annotated:
    boxes, classes, crowd = [], [], []
    for annotation in annotations:
        name = f"annotation {annotation.get('id', '?')}"
        category = annotation.get("category_id")
        if category not in numbers:
            got = "without a category" if category is None else f"of the category {category!r}"
            raise _malformed(file, f"{name} {got}, which it does not list")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
            raise _malformed(file, f"{name} with the box {box!r:.60}")
        x, y, width, height = map(float, box)
        boxes.append(_with_area((x, y, x + width, y + height), f"{name}", file))
        classes.append(numbers[category])
        crowd.append(bool(annotation.get("iscrowd", 0)))
    return Annotated(image, tuple(boxes), tuple(classes), tuple(crowd), file)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --------------------------------------------------------------------------------------- YOLO


def _yolo_split(root: Path, split: str) -> _Found | None:
    part = halves(root, split, "labels")
    return None if part is None else _yolo(*part, root)


def _yolo_whole(root: Path) -> _Found | None:
    images, labels = root / "images", root / "labels"
    return _yolo(images, labels, root) if images.is_dir() and labels.is_dir() else None


def _yolo(images: Path, labels: Path, root: Path) -> _Found:
    files = images_below(images)
    by_stem = {path.relative_to(images).with_suffix("").as_posix(): path for path in files}
    for file in sorted(labels.rglob("*.txt")):
        if file.relative_to(labels).with_suffix("").as_posix() not in by_stem:
            raise DataError(
                str(file),
                got="labels without an image",
                need=f"an image of that name in {images}",
                hint="adding it, or removing the labels",
            )
    names = named_classes(root)
    items = [
        read_yolo(path, labels / f"{stem}.txt", len(names) if names else None)
        for stem, path in by_stem.items()
    ]
    if not items:
        raise DataError(str(images), got="no images", need="images", hint="another folder")
    most = max((number for item in items for number in item.classes), default=1)
    return items, (BACKGROUND, *(names or tuple(str(n) for n in range(most))))


def read_yolo(image: Path, labels: Path, classes: int | None = None) -> Annotated:
    """The boxes of one image: lines of class, centre and size, as shares of width and height.

    A missing text file is an image without boxes.

    Raises:
        DataError: a line that is none, a class beyond ``classes``, a box without area.
    """
    if not labels.exists():
        return Annotated(image, (), (), (), image)
    width, height = size_of(image)
    boxes, numbers = [], []
    for count, words in _lines(labels):
        where = f"line {count}"
        try:
            number, (x, y, w, h) = int(words[0]), map(float, words[1:5])
        except ValueError as error:
            raise _malformed(labels, f"{where}: {' '.join(words)[:60]!r}") from error
        if number < 0 or (classes is not None and number >= classes):
            raise _malformed(labels, f"{where}: class {number} of {classes}")
        check_classes(labels, number)
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        boxes.append(_with_area(box, where, labels))
        numbers.append(number + 1)
    return Annotated(image, tuple(boxes), tuple(numbers), (False,) * len(boxes), labels)


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    for count, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            yield count, line.split()


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise _malformed(file, str(error)[:80]) from error


# -------------------------------------------------------------------------------------- shared


def _with_area(
    box: tuple[float, float, float, float], name: str, file: Path
) -> tuple[float, float, float, float]:
    if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
        rounded = [round(v, 1) if math.isfinite(v) else v for v in box]
        raise _malformed(file, f"{name} with the box {rounded}, which has no area")
    return box


def _image(folder: Path, name: str, file: Path) -> Path:
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
        raise DataError(
            str(file),
            got=f"the image {name!r}, which is not in {folder}",
            need="images that are there",
            hint="adding it, or removing it from the file",
        )
    return path


def _malformed(file: Path, got: str) -> DataError:
    return DataError(str(file), got=got, need=_FORMATS, hint="correcting the file")
