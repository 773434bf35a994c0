"""How good a classifier is: top-1, top-5, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.drift import device_of, evaluating
from normswap.errors import DataError, TrainingError
from normswap.training.batches import Share, check_labels, evaluation_batches
from normswap.training.reading import Batch


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found.

    Attributes:
        top1: share of images whose highest logit is the right class, 0 to 1.
        top5: share of images whose class is among the five highest logits.
        loss: mean cross-entropy in nats.
        images: how many were seen.
        broken: how many could not be read and were left out.
    """

    top1: float
    top5: float
    loss: float
    images: int
    broken: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.images,
            "broken": self.broken,
        }

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f}, "
            f"{self.images} images"
        )


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_broken: str = "error",
    progress: Callable[[int], None] | None = None,
) -> Metrics:
    """Score a classifier on labelled images, in eval mode.

    Args:
        model: returns logits (N, K); of a tuple the first, of a mapping ``logits`` or ``out``.
            Its training flags and its device are the same afterwards.
        data: a ``Dataset`` of (tensor, class), an (images, labels) pair of tensors, or a
            ``DataLoader``.
        batch_size: images per forward; a loader has its own.
        device: where to run; None is where the model is.
        workers: processes that load a data set.
        on_broken: a sample that cannot be read: ``"error"``, or ``"skip"`` to leave it out and
            count it.
        progress: called with the number of images seen after each batch.

    Raises:
        DataError: no samples, samples that cannot be read, labels that are no class of the model.
        TrainingError: outputs that are no logits.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> evaluate(net, (torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=torch.long))).images
        6
    """
    home = device_of(model)
    where = home if device is None else usable_device(device)
    batches, _ = evaluation_batches(
        data, batch_size=batch_size, workers=workers, on_broken=on_broken, share=Share()
    )
    try:
        model.to(where)
        return metrics_from(count_hits(model, batches, where, progress=progress))
    finally:
        model.to(home)


def count_hits(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    autocast: Callable[[], Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Sums over the batches: hits, hits among five, loss, images, broken (float64)."""
    totals = torch.zeros(5, dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for images, labels, broken in batches:
            totals[4] += len(broken)
            if len(images):
                check_labels(labels)
                with autocast() if autocast else torch.autocast(device.type, enabled=False):
                    output = model(images.to(device, non_blocking=True))
                totals[:4] += _score(class_scores(output), labels.to(device, torch.long))
            if progress:
                progress(int(totals[3]))
    return totals


def _score(scores: Tensor, labels: Tensor) -> Tensor:
    check_classes(labels, scores.shape[1])
    scores = scores.double()
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    finite = scores.isfinite().all(dim=1, keepdim=True)  # topk takes NaN for the highest
    hits = (best == labels[:, None]) & finite
    loss = F.cross_entropy(scores, labels, reduction="sum")
    return torch.stack(
        [hits[:, 0].sum().double(), hits.sum().double(), loss, loss.new_tensor(len(labels))]
    ).cpu()


def metrics_from(totals: Tensor) -> Metrics:
    """Means from the sums of ``count_hits``."""
    top1, top5, loss, images, broken = totals.tolist()
    if images == 0:
        raise DataError(
            "data",
            got=f"no image to score ({int(broken)} broken)",
            need="at least one",
            hint="another folder or split",
        )
    return Metrics(top1 / images, top5 / images, loss / images, int(images), int(broken))


def class_scores(output: Any) -> Tensor:
    """The logits (N, K) in a model's output.

    Raises:
        TrainingError: the output holds none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", output.get("out"))
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise TrainingError(
            "model",
            got=f"an output {shape}",
            need="logits of shape (images, classes)",
            hint="a classifier; for other tasks convert the model inside your own loop",
        )
    return found


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


def usable_device(device: str | torch.device) -> torch.device:
    """The device by that name, if this machine has it.

    Raises:
        TrainingError: it does not.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        present = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        raise TrainingError(
            "device",
            got=repr(str(device)),
            need="a device of this machine",
            hint=f"{str(present)!r}",
        ) from error
    return found
