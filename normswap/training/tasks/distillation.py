"""A teacher whose logits the model shall keep, for every task that has logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.errors import TrainingError
from normswap.training.options import FineTune


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


def with_teacher(
    options: FineTune, loss: Tensor, scores: Tensor, images: Tensor, read: Callable[[Any], Tensor]
) -> Tensor:
    """The loss with the teacher's share in it, if there is a teacher.

    Args:
        options: the recipe; holds the teacher, its weight and its temperature.
        loss: of the labels.
        scores: the model's logits, (N, K) or (N, K, H, W).
        images: what the model was given.
        read: from the teacher's output to logits of the shape of ``scores``.

    Raises:
        TrainingError: the teacher has other classes.
    """
    teacher, weight = options.teacher, options.distillation_weight
    if teacher is None or weight == 0:
        return loss
    with torch.no_grad():
        taught = read(teacher(images)).float()
    if taught.shape != scores.shape:
        raise TrainingError(
            "teacher",
            got=f"{taught.shape[1]} classes",
            need=f"the model's {scores.shape[1]}",
            hint="a teacher with the same classes, or none",
        )
    mine, theirs = (logits.movedim(1, -1).flatten(0, -2) for logits in (scores, taught))
    towards = distillation_loss(mine, theirs, options.distillation_temperature)
    return (1 - weight) * loss + weight * towards
