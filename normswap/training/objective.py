"""The loss of a fine-tune: cross-entropy, smoothed or mixed labels, auxiliary heads, a teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.errors import TrainingError
from normswap.training.options import FineTune
from normswap.training.scoring import class_scores

_AUXILIARY = 0.3  # weight of GoogLeNet's and Inception's side heads, as in the GoogLeNet paper


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far the student's softened classes are from the teacher's.

    ``T² · mean_n KL(softmax(teacher_n/T) ‖ softmax(student_n/T))``

    Args:
        student: logits (N, K).
        teacher: logits (N, K).
        temperature: T.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> distillation_loss(logits, logits + 3, temperature=2.0).item()
        0.0

    Reference:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
    """
    return (
        F.kl_div(
            F.log_softmax(student / temperature, dim=1),
            F.log_softmax(teacher / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        * temperature**2
    )


class Objective:
    """Labels in, loss out.

    Args:
        options: the recipe.
        classes: number of logits.
    """

    def __init__(self, options: FineTune, classes: int) -> None:
        self.options, self.classes = options, classes
        self.teacher = options.teacher
        self._mixup = self._make_mixup() if options.mixes else None

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

    def loss(self, output: Any, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one batch, and the main logits."""
        scores = class_scores(output).float()
        loss = self._cross_entropy(scores, targets)
        for side in _side_heads(output, scores):
            loss = loss + _AUXILIARY * self._cross_entropy(side.float(), targets)
        weight = self.options.distillation_weight
        if self.teacher is not None and weight > 0:
            with torch.no_grad():
                taught = class_scores(self.teacher(images)).float()
            _check_teacher(taught, scores)
            towards = distillation_loss(scores, taught, self.options.distillation_temperature)
            loss = (1 - weight) * loss + weight * towards
        return loss, scores

    def _cross_entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.ndim > 1 else self.options.label_smoothing
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)


def _side_heads(output: Any, scores: Tensor) -> list[Tensor]:
    if not isinstance(output, (tuple, list)):
        return []
    return [item for item in output[1:] if isinstance(item, Tensor) and item.shape == scores.shape]


def _check_teacher(taught: Tensor, scores: Tensor) -> None:
    if taught.shape != scores.shape:
        raise TrainingError(
            "teacher",
            got=f"{taught.shape[1]} classes",
            need=f"the model's {scores.shape[1]}",
            hint="a teacher with the same classes, or none",
        )
