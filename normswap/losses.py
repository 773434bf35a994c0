"""What a classifier is trained by, by name; free of torch until a loss is called, for help texts.

A loss takes the logits (N, K), what to predict (class numbers (N,), or shares of classes (N, K)
where mixup made them) and the options of the run, and gives the mean over the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from normswap.training.options import FineTune

    Loss = Callable[[Tensor, Tensor, FineTune], Tensor]


def cross_entropy(scores: Tensor, targets: Tensor, options: FineTune) -> Tensor:
    """One question an image: which class? Softmax and ``−log p`` of the right one."""
    import torch.nn.functional as F

    smoothing = 0.0 if targets.ndim > 1 else options.label_smoothing
    return F.cross_entropy(scores, targets, label_smoothing=smoothing)


def binary_cross_entropy(scores: Tensor, targets: Tensor, options: FineTune) -> Tensor:
    """One question a class: is it this one? Sigmoid and the mean over all K.

    Reference:
        Wightman, Touvron, Jégou 2021, ResNet strikes back, arXiv 2110.00476, section 2: the loss
        of timm's ``a1_in1k``, ``a2_in1k`` and ``a3_in1k`` weights.
    """
    import torch.nn.functional as F

    return F.binary_cross_entropy_with_logits(scores, shares(scores, targets, options))


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "bce": binary_cross_entropy,
}


def shares(scores: Tensor, targets: Tensor, options: FineTune) -> Tensor:
    """``targets`` as shares of classes (N, K), smoothed; mixup's are so already."""
    import torch.nn.functional as F

    if targets.ndim > 1:
        return targets.to(scores.dtype)
    classes, smoothing = scores.shape[1], options.label_smoothing
    return F.one_hot(targets, classes).to(scores.dtype) * (1 - smoothing) + smoothing / classes
