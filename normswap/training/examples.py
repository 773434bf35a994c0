"""Pictures of what a model says of some images, beside what is true."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap import pictures
from normswap.provenance import provenance_of
from normswap.running import device_of, evaluating, moved
from normswap.training.batches import Share, evaluation_batches
from normswap.training.samples import rng_kept
from normswap.training.tasks import Task

BEFORE, AFTER = "before.png", "after.png"
_IMAGES = 4


def draw_examples(task: Task, model: nn.Module, data: Any, path: Path) -> Path | None:
    """Draw some validation images: what is true on the left, what the model says on the right.

    Args:
        task: whose ``scenes`` says how; nothing is drawn for one that has none.
        model: in any mode; it is the same afterwards.
        data: what the first images are taken from.
        path: of the picture.
    """
    if type(task).scenes is Task.scenes:  # then no image has to be read for it
        return None
    names = provenance_of(model).class_names or getattr(data, "class_names", None)
    rows = []
    with rng_kept(), evaluating(model), torch.no_grad():
        batches, _ = evaluation_batches(data, batch_size=1, on_broken="skip", share=Share())
        for batch in itertools.islice(batches, _IMAGES):
            if not len(batch.images):
                continue
            output = model(moved(batch.images[:1], device_of(model)))
            found = task.scenes(batch.images[0], batch.labels[0], output, names)
            if found is None:
                return None
            rows.append(found)
    return pictures.scenes(rows, path) if rows else None
