"""The inputs of a proof. No model is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from normswap.errors import ExportError
from normswap.onnx.file.parity import Array
from normswap.onnx.subject import Subject, as_array

BATCHES = (1, 2, 5)
MAX_IMAGES = 8
_SEED = 20_180_322


@dataclass(frozen=True)
class Trial:
    """Inputs for one run.

    Attributes:
        name: for reports.
        inputs: one array per input of the graph.
        batch: rows.
        rows: which rows of the pool these are; None if they are not from there.
    """

    name: str
    inputs: list[Array]
    batch: int
    rows: slice | None = None


def random_inputs(subject: Subject, rows: int, *, grow: bool = False) -> list[Array]:
    """Standard normal floats, integers from the range of the example; the same every time.

    Args:
        subject: whose inputs.
        rows: of every input that has a batch axis.
        grow: at a second resolution.
    """
    rng = np.random.default_rng(_SEED)
    found = []
    for item in subject.signature.inputs:
        if not item.rows:
            found.append(item.example)
            continue
        shape = [rows, *item.shape[1:]]
        if grow and item.axes:
            shape[2:] = [_grown(size) for size in shape[2:]]
        found.append(_random(rng, shape, item.example))
    return found


def _grown(size: int) -> int:
    return size + 32 if size >= 32 else 2 * size


def _random(rng: np.random.Generator, shape: Sequence[int], like: Array) -> Array:
    if like.dtype.kind == "f":
        return rng.standard_normal(shape).astype(like.dtype)
    if like.dtype.kind == "b" or like.size == 0:
        return rng.integers(0, 2, shape).astype(like.dtype)
    return rng.integers(int(like.min()), int(like.max()) + 1, shape).astype(like.dtype)


def trials_for(
    subject: Subject, *, static_batch: bool, dynamic_size: bool, images: Any = None
) -> list[Trial]:
    """Random inputs at batch sizes 1, 2 and 5, the examples, a second resolution, real images."""
    batch = subject.signature.batch
    if static_batch or batch is None:
        rows = batch or 1
        pool = random_inputs(subject, rows)
        found = [Trial(f"random inputs, batch {rows}", pool, rows, slice(0, rows))]
    else:
        rows = 2
        pool = random_inputs(subject, max(BATCHES))
        starts = {1: 0, 2: 1, 5: 0}
        found = [_cut(subject, pool, starts[n], n) for n in BATCHES]
    examples = subject.signature.with_rows(rows) if batch else subject.signature
    found.append(Trial(f"example inputs, batch {rows}", examples.examples, rows))
    if dynamic_size:
        grown = random_inputs(subject, rows, grow=True)
        sizes = "×".join(str(size) for size in grown[0].shape[2:])
        found.append(Trial(f"random inputs at {sizes}, batch {rows}", grown, rows))
    return found + _image_trials(subject, images, rows, static_batch=static_batch)


def _cut(subject: Subject, pool: list[Array], start: int, rows: int) -> Trial:
    """Some rows of the pool."""
    part = slice(start, start + rows)
    pairs = zip(pool, subject.signature.inputs, strict=True)
    inputs = [array[part] if item.rows else array for array, item in pairs]
    return Trial(f"random inputs, batch {rows}", inputs, rows, part)


def _image_trials(subject: Subject, images: Any, rows: int, *, static_batch: bool) -> list[Trial]:
    if images is None:
        return []
    inputs = subject.signature.inputs
    stack = images if isinstance(images, torch.Tensor) else _stacked(list(images))
    if len(inputs) != 1 or stack.shape[1:] != inputs[0].shape[1:] or not len(stack):
        raise ExportError(
            "images",
            got=f"a stack of shape {list(stack.shape)} for {len(inputs)} input(s)",
            need=f"images of shape {list(inputs[0].shape[1:])} for a model of one input",
            hint="the model's own preprocessing",
        )
    array = as_array(stack[:MAX_IMAGES].to(inputs[0].dtype))
    if not static_batch:
        return [Trial(f"{len(array)} images", [array], len(array))]
    starts = range(0, len(array) - rows + 1, rows)
    return [Trial(f"{rows} images", [array[start : start + rows]], rows) for start in starts]


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(images) if images else torch.empty(0)
