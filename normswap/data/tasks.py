"""The folder of any task, read in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normswap.data.detection import detection_dataset
from normswap.data.images import MAX_PIXELS
from normswap.data.labelled import labelled_dataset
from normswap.data.pairing import WHOLE, is_divided
from normswap.data.preprocessing import Preprocessing
from normswap.data.segmentation import IGNORED, segmentation_dataset


def read_folder(
    task: str,
    root: str | Path,
    preprocessing: Preprocessing,
    split: str = "val",
    *,
    train: bool = False,
    class_names: Sequence[str] | None = None,
    val_split: float | None = None,
    seed: int = 0,
    augmentation: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
    ignored: int = IGNORED,
) -> Any:
    """Images with classes, masks or boxes.

    Args:
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``.
        root: the folder; for classification also a name that timm knows.
        preprocessing: what the model wants; a detector sees its images as they are.
        split: ``"train"`` or ``"val"``. Of a folder of masks or boxes that has no such part all is
            taken where ``val_split`` does not divide it.
        train: augment.
        class_names: in the order of the model's outputs; None takes those of the data.
        val_split: share that a folder without parts gives to ``"val"``.
        seed: of that division.
        augmentation: other than the task's usual one.
        max_pixels: larger images are refused.
        ignored: the number in a mask that stands for no class.

    Raises:
        DataError: what is there is no such thing.
    """
    common: dict[str, Any] = {
        "train": train,
        "class_names": class_names,
        "val_split": val_split,
        "seed": seed,
        "augmentation": dict(augmentation or {}),
        "max_pixels": max_pixels,
    }
    if task == "classification":
        return labelled_dataset(root, preprocessing, split, **common)
    if val_split is None and not is_divided(root, split):
        split = WHOLE
    if task == "detection":
        return detection_dataset(root, split, **common)
    return segmentation_dataset(root, preprocessing, split, ignored=ignored, **common)
