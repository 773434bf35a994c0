"""Detection: the losses that a detector of torchvision's contract gives; mAP as COCO defines it."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.errors import DataError, InstallationError, TrainingError
from normswap.factories.heads import detector_classes
from normswap.libraries import library
from normswap.pictures import Scene
from normswap.training.options import FineTune
from normswap.training.tasks.base import Metrics, Step, Task, refuse_loss_by_name
from normswap.training.tasks.scenes import box_scene

_SAID = ("boxes", "labels", "scores")
_BACKENDS = {"pycocotools": "pycocotools", "faster_coco_eval": "faster_coco_eval"}


class Detection(Task):
    """Boxes with classes, by torchvision's contract.

    In training the model is called with a list of images and a list of targets, and gives a dict
    of losses, whose sum is minimised; in eval mode it gives ``{boxes, labels, scores}`` for each
    image. Judged by mAP over IoU 0.5 to 0.95, as COCO defines it, which torchmetrics computes.

    Args:
        options: the recipe.

    Attributes:
        summary: what the last evaluation found besides: mAP at IoU 0.5 and 0.75, recall at 100.
        by_class: class number → mAP in the last evaluation, for classes that there were boxes of.

    Reference:
        Lin et al. 2014, Microsoft COCO, arXiv 1405.0312.
    """

    name: ClassVar[str] = "detection"
    metric_name: ClassVar[str] = "mAP"
    loses_in_eval: ClassVar[bool] = False

    def __init__(self, options: FineTune | None = None) -> None:
        super().__init__(options or FineTune())
        self.classes: range | None = None
        self.summary: dict[str, float] = {}
        self.by_class: dict[int, float] = {}
        refuse_loss_by_name(self.options, "for detection")
        for name, why in (
            ("mixup", "boxes cannot be mixed so"),
            ("cutmix", "boxes cannot be mixed so"),
            ("label_smoothing", "a detector has its own losses"),
        ):
            if getattr(self.options, name):
                raise _unused(name, getattr(self.options, name), f"0: {why}")
        if self.options.teacher is not None:
            raise _unused("teacher", "one", "None: boxes have no logits to keep")

    def meet(self, model: nn.Module, data: Any) -> None:  # noqa: ARG002
        """Learn which class numbers the model knows, where it can be told."""
        self.classes = detector_classes(model)

    def check_data(self, labels: Any) -> None:
        """Labels must be boxes with area and their classes, a mapping for each image."""
        if not isinstance(labels, (list, tuple)) or not all(map(_is_target, labels)):
            raise DataError(
                "targets",
                got=_seen(labels),
                need="a dict with 'boxes' (n, 4) and 'labels' (n,) for each image",
                hint="normswap.data.detection_dataset, or a Dataset of (tensor, dict)",
            )
        for target in labels:
            _check_boxes(target["boxes"])
            self._check_classes(target["labels"])

    def begin(self, output: Any) -> None:
        """The model must be a detector."""
        _predictions(output)

    def step(self, forward: Callable[..., Any], images: Any, labels: Any) -> Step:
        """One forward in training mode, and the sum of its losses."""
        try:
            losses = forward(images, labels)
        except KeyError as error:
            raise TrainingError(
                "model",
                got=f"a detector that asks its targets for {error}",
                need="one that learns from boxes and labels alone",
                hint="a Dataset of your own whose targets hold that too",
            ) from error
        if not _are_losses(losses):
            raise TrainingError(
                "model",
                got=f"{type(losses).__name__} in training mode",
                need="a dict of losses, as torchvision's detectors give for (images, targets)",
                hint="a forward with that contract, or loss=… and another task",
            )
        return Step(torch.stack([loss.float() for loss in losses.values()]).sum(), None,
                    (images, labels))  # fmt: skip

    def measure(self, output: Any, labels: Any) -> list[dict[str, Tensor]]:
        """What was said and what is true of each image."""
        found = []
        for said, true in zip(_predictions(output), labels, strict=True):
            crowd = true.get("crowd", true.get("iscrowd", torch.zeros_like(true["labels"])))
            item = {name: said[name] for name in _SAID}
            item |= {"true_boxes": true["boxes"], "true_labels": true["labels"], "crowd": crowd}
            found.append({name: value.detach().cpu() for name, value in item.items()})
        return found

    def judge(self, found: list[dict[str, Tensor]], images: int, broken: int) -> Metrics:
        """MAP as the metric; NaN where there is no box to find."""
        results = average_precision(found)
        self.summary = {name: _score(results[key]) for name, key in _SUMMARY.items()}
        numbers, each = (results[key].reshape(-1).tolist() for key in ("classes", "map_per_class"))
        self.by_class = {n: v for n, v in zip(numbers, each, strict=True) if v >= 0}
        return Metrics(math.nan, math.nan, math.nan, images, broken, _score(results["map"]))

    def scenes(
        self, image: Tensor, label: Any, output: Any, names: Sequence[str] | None
    ) -> tuple[Scene, Scene]:
        """The boxes as they are and as they were said, over the image."""
        return (
            box_scene(image, label, names, "true"),
            box_scene(image, _predictions(output)[0], names, "said"),
        )

    def _check_classes(self, labels: Tensor) -> None:
        known = self.classes
        if known is None or not labels.numel():
            return
        low, high = (int(item) for item in torch.aminmax(labels))
        if low < known.start or high >= known.stop:
            worst = low if low < known.start else high
            raise DataError(
                "targets",
                got=f"class {worst}",
                need=f"{known.start} to {known.stop - 1}, the classes of the model"
                + (" behind its background" if known.start else ""),
                hint=f"a model with num_classes={worst + 1}" if worst >= known.stop
                else f"numbers from {known.start} up",
            )  # fmt: skip


_SUMMARY = {"mAP": "map", "mAP 0.5": "map_50", "mAP 0.75": "map_75", "recall": "mar_100"}


def average_precision(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All that torchmetrics' ``MeanAveragePrecision`` says.

    Args:
        found: per image ``boxes``, ``labels``, ``scores`` and ``true_boxes``, ``true_labels``,
            ``crowd``.

    Raises:
        InstallationError: torchmetrics or both of its backends are missing.
    """
    backend = next((name for name, module in _BACKENDS.items() if _is_there(module)), None)
    if backend is None or not _is_there("torchmetrics"):
        raise InstallationError(
            "detection",
            got="no torchmetrics" if backend else "neither pycocotools nor faster-coco-eval",
            need="both to compute mAP",
            hint="pip install 'normswap[dense]'",
        )
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    metric = library("torchmetrics.detection").MeanAveragePrecision(
        backend=backend, class_metrics=True
    )
    metric.warn_on_many_detections = False
    metric.update(
        [{name: item[name] for name in _SAID} for item in found],
        [
            {
                "boxes": item["true_boxes"],
                "labels": item["true_labels"],
                "iscrowd": item["crowd"].to(torch.int64),
            }
            for item in found
        ],
    )
    results: dict[str, Tensor] = metric.compute()
    return results


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _score(value: Tensor) -> float:
    return float(value) if float(value) >= 0 else math.nan  # COCO says -1 for nothing


def _predictions(output: Any) -> Sequence[Mapping[str, Tensor]]:
    fine = isinstance(output, (list, tuple)) and all(
        isinstance(item, Mapping) and set(_SAID) <= item.keys() for item in output
    )
    if not fine:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TrainingError(
            "model",
            got=f"an output {shape} in eval mode",
            need="a list of dicts with boxes, labels and scores",
            hint="a detector, or another task",
        )
    found: Sequence[Mapping[str, Tensor]] = output
    return found


def _is_target(target: Any) -> bool:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        return False
    boxes, labels = target["boxes"], target["labels"]
    if not (isinstance(boxes, Tensor) and isinstance(labels, Tensor)):
        return False
    whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
    return whole and boxes.ndim == 2 and boxes.shape[1] == 4 and labels.shape == boxes.shape[:1]


def _seen(labels: Any) -> str:
    if not isinstance(labels, (list, tuple)):
        return f"labels of type {type(labels).__name__}"
    bad = next(target for target in labels if not _is_target(target))
    if not isinstance(bad, Mapping):
        return f"a target of type {type(bad).__name__}"
    shapes = {k: tuple(v.shape) for k, v in bad.items() if isinstance(v, Tensor)}
    return f"a target with {shapes or list(bad)}"


def _check_boxes(boxes: Tensor) -> None:
    fine = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not bool(fine.all()):
        raise DataError(
            "targets",
            got=f"the box {boxes[~fine][0].tolist()}",
            need="x0, y0, x1, y1 with x0 < x1 and y0 < y1",
            hint="correcting it, or leaving it out",
        )


def _are_losses(losses: Any) -> bool:
    fits = isinstance(losses, Mapping) and len(losses) > 0
    return fits and all(isinstance(v, Tensor) and v.numel() == 1 for v in losses.values())


def _unused(name: str, got: Any, need: str) -> TrainingError:
    return TrainingError(
        f"FineTune.{name}", got=f"{got} for detection", need=need, hint="leaving it out"
    )
