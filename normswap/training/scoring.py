"""How good a model is on labelled data, in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import DataError
from normswap.progress import Progress, ProgressCallback
from normswap.running import evaluating, placed
from normswap.training.batches import Share, evaluation_batches, named_samples, samples_of
from normswap.training.execution import usable_device
from normswap.training.options import FineTune
from normswap.training.samples import Batch
from normswap.training.tasks import Metrics, Task, task_for

log = logging.getLogger("normswap")


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_broken: str = "error",
    task: str | Task = "classification",
    progress: ProgressCallback | None = None,
) -> Metrics:
    """Score a model on labelled images, in eval mode.

    Args:
        model: returns logits (N, K), or (N, K, H, W) for segmentation; of a tuple the first, of a
            mapping ``logits`` or ``out``. Its training flags and its device are the same
            afterwards.
        data: a ``Dataset`` of (tensor, label), an (images, labels) pair of tensors, or a
            ``DataLoader``.
        batch_size: images per forward; a loader has its own.
        device: where to run; None is where the model is.
        workers: processes that load a data set.
        on_broken: a sample that cannot be read: ``"error"``, or ``"skip"`` to leave it out and
            count it.
        task: what is measured, by name, or a task of one's own.
        progress: called after each batch with the number of images seen; the total is the data's
            where it has a length.

    Raises:
        DataError: no samples, samples that cannot be read, labels that are no class of the model.
        TrainingError: outputs that are no logits.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> evaluate(net, (torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=torch.long))).images
        6
    """
    where = None if device is None else usable_device(device)
    batches, _ = evaluation_batches(
        data, batch_size=batch_size, workers=workers, on_broken=on_broken, share=Share()
    )
    with placed(where, model) as there:
        judge, left_out = task_for(FineTune(), task), set[int]()
        seen = _noted(batches, left_out)
        tell = None
        if progress is not None:
            total, show = samples_of(data), progress

            def tell(done: int) -> None:
                show(Progress(done, total))

        totals = added_up(judge, model, seen, there, progress=tell)
        if left_out:
            log.warning("left out, as they cannot be read: %s", named_samples(data, left_out))
        return metrics_from(judge, totals)


def _noted(batches: Iterable[Batch], broken: set[int]) -> Iterator[Batch]:
    for batch in batches:
        broken.update(batch.broken)
        yield batch


def added_up(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """What the task measures, images and broken ones, added up over the batches (float64)."""
    sums, seen, unread = torch.zeros(len(task.sums), dtype=torch.float64), 0, 0
    with evaluating(model), torch.no_grad():
        for images, labels, broken in batches:
            unread += len(broken)
            if len(images):
                task.check_data(labels)
                with torch.autocast(device.type, enabled=False):
                    output = model(images.to(device, non_blocking=True))
                found = task.measure(output, labels.to(device))
                sums = found if not len(sums) else sums + found
                seen += len(images)
            if progress:
                progress(seen)
    return torch.cat([sums, torch.tensor([seen, unread], dtype=torch.float64)])


def metrics_from(task: Task, totals: Tensor) -> Metrics:
    """Means from the sums of ``added_up``."""
    *sums, images, broken = totals.tolist()
    if images == 0:
        raise DataError(
            "data",
            got=f"no image to score ({int(broken)} broken)",
            need="at least one",
            hint="another folder or split",
        )
    return task.metrics(dict(zip(task.sums, sums, strict=True)), int(images), int(broken))
