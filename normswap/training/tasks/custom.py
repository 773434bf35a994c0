"""A loss or a metric of the caller's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from normswap.errors import TrainingError
from normswap.training.options import FineTune
from normswap.training.tasks.base import (
    LossFunction,
    MetricFunction,
    Metrics,
    Step,
    refuse_loss_by_name,
)
from normswap.training.tasks.classification import Classification, class_scores


class Custom(Classification):
    """A loss, a metric or both from the caller; the rest is classification's, where it applies.

    Args:
        options: the recipe.
        loss: ``loss(output, labels)``, a scalar; None takes cross-entropy. With it the labels may
            be anything; top-1 and top-5 are counted where they are class numbers and the output is
            logits.
        metric: ``metric(output, labels)``, the mean over the batch, higher is better; None judges
            by top-1, or by the loss where there is no top-1.
    """

    name: ClassVar[str] = "custom"
    sums: tuple[str, ...] = ("top1", "top5", "loss", "metric", "classified")

    def __init__(
        self, options: FineTune, loss: LossFunction | None, metric: MetricFunction | None
    ) -> None:
        super().__init__(options)
        _check_function("loss", loss, "torch.nn.functional.cross_entropy, or a name in FineTune")
        _check_function("metric", metric, "lambda output, labels: …")
        if loss is not None:
            refuse_loss_by_name(options, "together with a loss of your own")
        self.loss, self.metric = loss, metric
        for name in ("label_smoothing", "mixup", "cutmix"):
            if loss is not None and getattr(options, name):
                raise TrainingError(
                    f"FineTune.{name}",
                    got=f"{getattr(options, name)} together with a loss of your own",
                    need=f"a loss that does it itself, and {name}=0",
                    hint=f"leaving {name} out",
                )

    def check_data(self, labels: Any) -> None:
        """Class numbers are needed by cross-entropy alone."""
        if self.loss is None:
            super().check_data(labels)

    def begin(self, output: Any) -> None:
        """Learn the number of classes, if there are any."""
        if self.loss is None:
            super().begin(output)

    def step(self, forward: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> Step:
        """One forward in training mode, and the caller's loss of it."""
        if self.loss is None:
            return super().step(forward, images, labels)
        output = forward(images)
        loss = _scalar("loss", self.loss(output, labels))
        if self.options.teacher is not None:
            loss = self.with_teacher(loss, class_scores(output).float(), images)
        if not _classes(output, labels):
            return Step(loss, None, images)
        right = (class_scores(output).detach().argmax(1) == labels).sum()
        return Step(loss, right, images)

    def measure(self, output: Any, labels: Tensor) -> Tensor:
        """Hits, hits among five, loss, metric, images with class numbers."""
        count, sums = len(labels), torch.zeros(5, dtype=torch.float64)
        if self.loss is None or _classes(output, labels):
            sums[:3] = super().measure(output, labels)
            sums[4] = count
        if self.loss is not None:
            sums[2] = count * float(_scalar("loss", self.loss(output, labels)))
        if self.metric is not None:
            sums[3] = count * float(_scalar("metric", self.metric(output, labels)))
        return sums

    def metrics(self, sums: dict[str, float], images: int, broken: int) -> Metrics:
        """What can be said of this task."""
        found = super().metrics(sums, images, broken)
        if sums["classified"] != images:
            found = replace(found, top1=math.nan, top5=math.nan)
        return found if self.metric is None else replace(found, metric=sums["metric"] / images)


def _check_function(name: str, given: Any, hint: str) -> None:
    if given is not None and not callable(given):
        need = "a function of the output and the labels"
        raise TrainingError(name, got=repr(given), need=need, hint=hint)


def _classes(output: Any, labels: Tensor) -> bool:
    """Whether labels are class numbers and the output logits."""
    whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
    return whole and labels.ndim == 1 and isinstance(output, Tensor) and output.ndim == 2


def _scalar(name: str, value: Any) -> Tensor:
    found = torch.as_tensor(value)
    if found.numel() != 1:
        raise TrainingError(
            name,
            got=f"a tensor of shape {tuple(found.shape)}",
            need="one number for the batch",
            hint=f"the mean of what {name} returns",
        )
    return found.reshape(())
