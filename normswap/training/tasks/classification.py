"""Classification: a loss by name, smoothed or mixed labels, side heads, a teacher; top-1, top-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.errors import DataError
from normswap.losses import LOSSES
from normswap.training.options import FineTune
from normswap.training.tasks.base import Metrics, Step, Task, logits_in
from normswap.training.tasks.distillation import with_teacher

_AUXILIARY = 0.3  # weight of GoogLeNet's and Inception's side heads, as in the GoogLeNet paper


class Classification(Task):
    """One class per image."""

    name: ClassVar[str] = "classification"
    sums: tuple[str, ...] = ("top1", "top5", "loss")

    def __init__(self, options: FineTune) -> None:
        super().__init__(options)
        self.classes = 0  # known after the first forward
        self._mixup: Any = None

    def check_data(self, labels: Any) -> None:
        """Labels must be class numbers (N,)."""
        check_labels(labels)
        if self.classes:
            check_classes(labels, self.classes)

    def begin(self, output: Any) -> None:
        """Learn the number of classes."""
        self.classes = class_scores(output).shape[1]
        if self.options.mixes:
            self._mixup = self._make_mixup()

    def step(self, forward: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> Step:
        """One forward in training mode, its loss and how many images were right."""
        check_labels(labels)
        check_classes(labels, self.classes)
        labels = labels.to(torch.long)
        mixed, targets = self.mix(images, labels)
        output = forward(mixed)
        scores = class_scores(output).float()
        loss = self.with_teacher(self._own_loss(output, scores, targets), scores, mixed)
        return Step(loss, (scores.detach().argmax(1) == labels).sum(), mixed)

    def measure(self, output: Any, labels: Tensor) -> Tensor:
        """Hits, hits among five, loss."""
        check_labels(labels)
        return class_sums(class_scores(output), labels.to(torch.long))

    def metrics(self, sums: dict[str, float], images: int, broken: int) -> Metrics:
        """Means over the images."""
        top1, top5, loss = (sums[name] / images for name in ("top1", "top5", "loss"))
        return Metrics(top1, top5, loss, images, broken)

    def _make_mixup(self) -> Any:
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.options.mixup,
            cutmix_alpha=self.options.cutmix,
            label_smoothing=self.options.label_smoothing,
            num_classes=self.classes,
        )

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and what to predict: class numbers, or (N, K) shares of classes."""
        if self._mixup is None:
            return images, labels
        pairs = len(images) - len(images) % 2  # timm mixes pairs; an odd sample stays as it is
        if pairs == 0:
            return images, self._soft(labels)
        mixed, targets = self._mixup(images[:pairs].clone(), labels[:pairs])
        if pairs == len(images):
            return mixed, targets
        return (
            torch.cat([mixed, images[pairs:]]),
            torch.cat([targets, self._soft(labels[pairs:])]),
        )

    def _soft(self, labels: Tensor) -> Tensor:
        from timm.data.mixup import mixup_target

        found: Tensor = mixup_target(labels, self.classes, 1.0, self.options.label_smoothing)
        return found

    def _own_loss(self, output: Any, scores: Tensor, targets: Tensor) -> Tensor:
        chosen = LOSSES[self.options.loss]
        loss = chosen(scores, targets, self.options)
        for side in _side_heads(output, scores):
            loss = loss + _AUXILIARY * chosen(side.float(), targets, self.options)
        return loss

    def with_teacher(self, loss: Tensor, scores: Tensor, images: Tensor) -> Tensor:
        """The loss with the teacher's share in it, if there is a teacher."""
        return with_teacher(self.options, loss, scores, images, class_scores)


def _side_heads(output: Any, scores: Tensor) -> list[Tensor]:
    if not isinstance(output, (tuple, list)):
        return []
    return [item for item in output[1:] if isinstance(item, Tensor) and item.shape == scores.shape]


def class_scores(output: Any) -> Tensor:
    """The logits (N, K) in a model's output.

    Raises:
        TrainingError: the output holds none.
    """
    return logits_in(
        output,
        2,
        keys=("logits", "out"),
        need="logits of shape (images, classes)",
        hint="a classifier; for other tasks convert the model inside your own loop",
    )


def check_classes(labels: Tensor, classes: int) -> None:
    """Labels must be classes that the model knows."""
    low, high = (int(item) for item in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise DataError(
            "labels",
            got=f"class {low if low < 0 else high}",
            need=f"0 to {classes - 1}, the model has {classes} logits",
            hint=f"a model with num_classes={high + 1}" if low >= 0 else "labels from 0 up",
        )


def check_labels(labels: Any) -> None:
    """Labels must be class numbers (N,)."""
    fine = isinstance(labels, Tensor) and labels.ndim == 1
    if not fine or labels.is_floating_point() or labels.dtype == torch.bool:
        tensor = isinstance(labels, Tensor)
        raise DataError(
            "labels",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}" if tensor else repr(labels)[:60],
            need="as many labels as images, one integer class number each",
            hint="labels of shape (N,) and dtype torch.int64",
        )


def class_sums(scores: Tensor, labels: Tensor) -> Tensor:
    """Hits, hits among five and loss, added up over a batch (float64)."""
    check_classes(labels, scores.shape[1])
    scores = scores.double()
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    finite = scores.isfinite().all(dim=1, keepdim=True)  # topk takes NaN for the highest
    hits = (best == labels[:, None]) & finite
    loss = F.cross_entropy(scores, labels, reduction="sum")
    return torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss]).cpu()
