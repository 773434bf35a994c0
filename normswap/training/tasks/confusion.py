"""Classification, with every class by itself: which one is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.training.options import FineTune
from normswap.training.tasks.classification import Classification, class_scores


class ClassAccuracy(NamedTuple):
    """How well one class is known.

    Attributes:
        number: of the class.
        images: how many of it were seen.
        top1: share of them that were right.
        taken_for: the class that most of the others were taken for, or None.
        times: how often.
    """

    number: int
    images: int
    top1: float
    taken_for: int | None
    times: int


class Confusion(Classification):
    """Scores a classifier and counts, per class, what its images are taken for.

    Attributes:
        counts: (K, K), rows are the right classes and columns the model's; None before the first
            batch.

    Example:
        >>> from torch import nn
        >>> from normswap.training import evaluate
        >>> net, judge = nn.Sequential(nn.Flatten(), nn.Identity()), Confusion()
        >>> images = torch.eye(3)[[0, 1, 1, 2]].view(4, 3, 1, 1)
        >>> evaluate(net, (images, torch.tensor([0, 1, 2, 2])), task=judge).top1
        0.75
        >>> judge.counts.tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
        >>> judge.by_class()[2]
        ClassAccuracy(number=2, images=2, top1=0.5, taken_for=1, times=1)
    """

    def __init__(self, options: FineTune | None = None) -> None:
        super().__init__(options or FineTune())
        self.counts: Tensor | None = None

    def measure(self, output: Any, labels: Tensor) -> Tensor:
        """Hits, hits among five, loss; the counts grow."""
        sums = super().measure(output, labels)
        scores = class_scores(output).cpu()
        size = scores.shape[1]
        pairs = labels.cpu().long() * size + scores.argmax(1)
        found = torch.bincount(pairs, minlength=size * size).view(size, size)
        self.counts = found if self.counts is None else self.counts + found
        return sums

    def by_class(self) -> Sequence[ClassAccuracy]:
        """Every class of which there were images, in the order of their numbers."""
        if self.counts is None:
            return ()
        found = []
        for number, row in enumerate(self.counts):
            images = int(row.sum())
            if images == 0:
                continue
            wrong = row.clone()
            wrong[number] = 0
            times, other = (int(item) for item in wrong.max(0))
            share = int(row[number]) / images
            found.append(ClassAccuracy(number, images, share, other if times else None, times))
        return tuple(found)
