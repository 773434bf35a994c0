"""Segmentation: cross-entropy and Dice over pixels, side heads, a teacher; mean IoU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.data.segmentation import IGNORED
from normswap.errors import DataError, TrainingError
from normswap.pictures import Scene
from normswap.training.options import FineTune
from normswap.training.tasks.base import Metrics, Step, Task, logits_in, refuse_loss_by_name
from normswap.training.tasks.distillation import with_teacher
from normswap.training.tasks.scenes import mask_scene

AUXILIARY = 0.5
"""Weight of side heads, as in torchvision's reference training."""


class Segmentation(Task):
    """One class per pixel: outputs (N, K, H, W), alone or as ``out`` beside ``aux``.

    The loss is cross-entropy plus soft Dice; side heads add half of their cross-entropy. Judged by
    mean IoU over the classes that occur, in the labels or in the predictions.

    Args:
        options: the recipe.
        ignored: the number in a mask that stands for no class; what the data set says of it
            (``ignored``) goes before.

    Attributes:
        counts: pixels of each class (row) that were taken for each class (column), likewise.
        by_class: IoU of each class in the last evaluation; NaN for one that occurred nowhere.
    """

    name: ClassVar[str] = "segmentation"
    metric_name: ClassVar[str] = "mean IoU"

    def __init__(self, options: FineTune, ignored: int = IGNORED) -> None:
        super().__init__(options)
        self.ignored = ignored
        self.classes = 0  # known after the first forward
        self.by_class: tuple[float, ...] = ()
        self.counts: Tensor | None = None
        refuse_loss_by_name(options, "for segmentation")
        for name in ("mixup", "cutmix"):
            if getattr(options, name):
                raise TrainingError(
                    f"FineTune.{name}",
                    got=f"{getattr(options, name)} for segmentation",
                    need="0: masks cannot be mixed so",
                    hint="leaving it out",
                )

    def meet(self, model: nn.Module, data: Any) -> None:  # noqa: ARG002
        """Learn which number stands for no class, where the data set says so."""
        self.ignored = int(getattr(data, "ignored", self.ignored))

    def check_data(self, labels: Any) -> None:
        """Labels must be class numbers (N, H, W)."""
        if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.is_floating_point():
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                "masks",
                got=f"{getattr(labels, 'dtype', '')} {shape}".strip(),
                need="one class number a pixel, (N, H, W)",
                hint="masks of dtype torch.int64",
            )
        if self.classes:
            self._checked(labels)

    def begin(self, output: Any) -> None:
        """Learn the number of classes."""
        self.classes = pixel_scores(output).shape[1]
        count = self.classes
        self.sums = (*(f"{t}/{p}" for t in range(count) for p in range(count)), "loss")

    def step(self, forward: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> Step:
        """One forward in training mode, and its loss."""
        labels = self._checked(labels)
        output = forward(images)
        scores = _at_size(pixel_scores(output).float(), labels)
        loss = self.loss(scores, labels)
        for side in side_scores(output):
            loss = loss + AUXILIARY * self._cross_entropy(_at_size(side.float(), labels), labels)
        loss = with_teacher(
            self.options, loss, scores, images, lambda out: _at_size(pixel_scores(out), scores)
        )
        return Step(loss, None, images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy plus soft Dice.

        Args:
            scores: logits (N, K, H, W).
            labels: class numbers (N, H, W).
        """
        return self._cross_entropy(scores, labels) + dice_loss(scores, labels, self.ignored)

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        if bool((labels == self.ignored).all()):
            return scores.sum() * 0.0  # a mean over no pixel would be NaN
        smoothing = self.options.label_smoothing
        return F.cross_entropy(scores, labels, ignore_index=self.ignored, label_smoothing=smoothing)

    def measure(self, output: Any, labels: Tensor) -> Tensor:
        """The confusion matrix, row by row, and the loss."""
        if not self.classes:
            self.begin(output)
        labels = self._checked(labels)
        scores = _at_size(pixel_scores(output).float(), labels)
        table = confusion(scores.argmax(1), labels, self.classes, self.ignored)
        loss = self.loss(scores, labels).double() * len(labels)
        return torch.cat([table.flatten().double(), loss.reshape(1)]).cpu()

    def metrics(self, sums: dict[str, float], images: int, broken: int) -> Metrics:
        """Mean IoU as the metric."""
        *table, loss = sums.values()
        counts = torch.tensor(table, dtype=torch.float64).reshape(self.classes, self.classes)
        iou = intersection_over_union(counts)
        self.counts, self.by_class = counts.long(), tuple(iou.tolist())
        mean = float(iou[iou.isfinite()].mean()) if iou.isfinite().any() else math.nan
        return Metrics(math.nan, math.nan, loss / images, images, broken, mean)

    def scenes(
        self, image: Tensor, label: Any, output: Any, names: Sequence[str] | None
    ) -> tuple[Scene, Scene]:
        """The mask as it is and as it was said, over the image."""
        scores = _at_size(pixel_scores(output).float(), label)[0]
        return (
            mask_scene(image, label, len(scores), names, "true"),
            mask_scene(image, scores.argmax(0), len(scores), names, "said"),
        )

    def _checked(self, labels: Tensor) -> Tensor:
        known = labels[labels != self.ignored]
        if known.numel() and not (int(known.min()) >= 0 and int(known.max()) < self.classes):
            worst = int(known.min()) if int(known.min()) < 0 else int(known.max())
            raise DataError(
                "masks",
                got=f"class {worst}",
                need=f"0 to {self.classes - 1}, or {self.ignored} for pixels of no class",
                hint=f"a model with num_classes={worst + 1}" if worst >= 0 else "numbers from 0 up",
            )
        return labels.to(torch.long)


def pixel_scores(output: Any) -> Tensor:
    """The logits (N, K, H, W) in a model's output.

    Raises:
        TrainingError: the output holds none.
    """
    return logits_in(
        output,
        4,
        keys=("out", "logits"),
        need="logits of shape (images, classes, height, width), or a dict with them as 'out'",
        hint="a segmentation model, or another task",
    )


def side_scores(output: Any) -> list[Tensor]:
    """The logits of side heads: every other 4-d tensor with as many classes."""
    classes = pixel_scores(output).shape[1]
    others: list[Any] = []
    if isinstance(output, Mapping):
        others = [value for name, value in output.items() if name == "aux"]
    elif isinstance(output, (tuple, list)):
        others = list(output[1:])
    return [o for o in others if isinstance(o, Tensor) and o.ndim == 4 and o.shape[1] == classes]


def dice_loss(scores: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """1 - mean over classes of 2·Σpq / (Σp + Σq), over the classes that occur in the batch.

    Args:
        scores: logits (N, K, H, W).
        labels: class numbers (N, H, W).
        ignored: pixels with this number count nowhere.

    Example:
        >>> sure = torch.tensor([[[[9.0]], [[-9.0]]]])
        >>> round(dice_loss(sure, torch.zeros(1, 1, 1, dtype=torch.long)).item(), 4)
        0.0

    Reference:
        Milletari, Navab, Ahmadi 2016, V-Net, arXiv 1606.04797, section 3 (without the squares).
    """
    kept = (labels != ignored).unsqueeze(1)
    truth = F.one_hot(labels.where(kept[:, 0], torch.zeros_like(labels)), scores.shape[1])
    truth = truth.movedim(-1, 1).to(scores.dtype) * kept
    guess = scores.softmax(1) * kept
    axes = (0, 2, 3)
    both, sizes = (truth * guess).sum(axes), truth.sum(axes) + guess.sum(axes)
    present = truth.sum(axes) > 0
    if not bool(present.any()):
        return scores.sum() * 0.0
    return 1 - (2 * both[present] / sizes[present]).mean()


def confusion(guess: Tensor, labels: Tensor, classes: int, ignored: int = IGNORED) -> Tensor:
    """How many pixels of each class (row) were taken for each class (column)."""
    kept = labels != ignored
    pairs = labels[kept].long() * classes + guess[kept].long()
    return torch.bincount(pairs.flatten(), minlength=classes * classes).reshape(classes, classes)


def intersection_over_union(table: Tensor) -> Tensor:
    """IoU per class from a confusion matrix; NaN for a class that occurs nowhere.

    Example:
        >>> intersection_over_union(torch.tensor([[3, 1], [0, 4]])).tolist()
        [0.75, 0.800000011920929]
    """
    table = table.to(torch.float64 if table.dtype == torch.float64 else torch.float32)
    right = table.diagonal()
    return right / (table.sum(0) + table.sum(1) - right)


def _at_size(scores: Tensor, like: Tensor) -> Tensor:
    """Logits at the height and width of ``like``."""
    if scores.shape[-2:] == like.shape[-2:]:
        return scores
    return F.interpolate(scores, size=like.shape[-2:], mode="bilinear", align_corners=False)
