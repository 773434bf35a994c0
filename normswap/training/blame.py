"""Which sample a complaint about a batch is about, by the name of its file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from normswap.errors import DataError
from normswap.training.batches import named_samples
from normswap.training.samples import Batch
from normswap.training.tasks import Task


@contextlib.contextmanager
def blaming(task: Task, batch: Batch, data: Any) -> Iterator[None]:
    """Put the file's name to a ``DataError`` about the labels of a batch.

    Args:
        task: asked again about each sample by itself.
        batch: the samples; nothing is added where it does not know which they are.
        data: the data set that they are from.
    """
    try:
        yield
    except DataError as error:
        number = _culprit(task, batch)
        if number is None or data is None:
            raise
        name = named_samples(data, [number])
        where = f"sample {name}" if name.isdecimal() else name
        raise DataError(where, got=error.got, need=error.need, hint=error.hint) from error


def _culprit(task: Task, batch: Batch) -> int | None:
    for place, number in enumerate(batch.samples):
        try:
            task.check_data(batch.labels[place : place + 1])
        except DataError:
            return number
    return None
