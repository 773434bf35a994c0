"""How good a model is on labelled data, in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from normswap.errors import DataError
from normswap.progress import Progress, ProgressCallback
from normswap.running import evaluating, moved, placed
from normswap.training.batches import Share, evaluation_batches, named_samples, samples_of
from normswap.training.blame import blaming
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
            mapping ``logits`` or ``out``; for detection a list of ``{boxes, labels, scores}``. Its
            training flags and its device are the same afterwards.
        data: a ``Dataset`` of (tensor, label), for detection of (tensor, ``{boxes, labels}``), an
            (images, labels) pair of tensors, or a ``DataLoader``.
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
        judge.meet(model, data)
        seen = _noted(batches, left_out)
        tell = None
        if progress is not None:
            total, show = samples_of(data), progress

            def tell(done: int) -> None:
                show(Progress(done, total))

        totals = added_up(judge, model, seen, there, data=data, progress=tell)
        if left_out:
            log.warning("left out, as they cannot be read: %s", named_samples(data, left_out))
        return metrics_from(judge, totals)


def _noted(batches: Iterable[Batch], broken: set[int]) -> Iterator[Batch]:
    for batch in batches:
        broken.update(batch.broken)
        yield batch


class Totals(NamedTuple):
    """What a task measured, added up over batches.

    Attributes:
        found: the sum of its measures; None where there was no image.
        images: how many were seen.
        broken: how many could not be read.
    """

    found: Any
    images: int
    broken: int


def added_up(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    data: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Totals:
    """What the task measures, images and broken ones, added up over the batches.

    Args:
        task: what is measured.
        model: in any mode; it is the same afterwards.
        batches: of images and labels.
        device: where the model is.
        data: what the batches are of, to name what is wrong with it.
        progress: called with the number of images seen after each batch.
    """
    found, seen, unread = None, 0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            unread += len(batch.broken)
            if len(batch.images):
                with blaming(task, batch, data):
                    task.check_data(batch.labels)
                    with torch.autocast(device.type, enabled=False):
                        output = model(moved(batch.images, device))
                    mine = task.measure(output, moved(batch.labels, device))
                found = mine if found is None else task.add(found, mine)
                seen += len(batch.images)
            if progress:
                progress(seen)
    return Totals(found, seen, unread)


def together(task: Task, parts: Iterable[Any]) -> Totals:
    """The totals of several processes as one."""
    found, seen, unread = None, 0, 0
    for mine, images, broken in parts:
        if mine is not None:
            found = mine if found is None else task.add(found, mine)
        seen, unread = seen + images, unread + broken
    return Totals(found, seen, unread)


def metrics_from(task: Task, totals: Totals) -> Metrics:
    """What the totals say.

    Raises:
        DataError: there was no image.
    """
    if totals.images == 0:
        raise DataError(
            "data",
            got=f"no image to score ({totals.broken} broken)",
            need="at least one",
            hint="another folder or split",
        )
    return task.judge(totals.found, totals.images, totals.broken)
