"""What went wrong, in words that help: the layer that gave NaN, the memory that ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import TrainingError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_ONE_VALUE = "expected more than 1 value per channel"


def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Where infinite or undefined numbers first appear in a forward, in words.

    Runs one forward in the model's present mode; running statistics are put back.
    """
    if not torch.isfinite(images).all():
        return "the input images"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name}"
    found: list[str] = []
    with _watched(model, found), _buffers_kept(model), torch.no_grad():
        model(images)
    return f"the output of {found[0]}" if found else "the loss itself; every layer is finite"


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextlib.contextmanager
def explained(batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn torch's errors about memory and batches of one into ones that say what to do."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY):
            raise _out_of_memory(batch_size, device) from error
        if _ONE_VALUE in text:
            raise _one_value(batch_size, str(error)) from error
        raise


def _out_of_memory(batch_size: int, device: torch.device) -> TrainingError:
    return TrainingError(
        str(device),
        got=f"out of memory at batch_size={batch_size}",
        need="memory for the activations of one batch",
        hint="a smaller batch_size with gradient_accumulation, smaller images, amp='bf16', "
        "or the model's own gradient checkpointing (timm: model.set_grad_checkpointing())",
    )


def _one_value(batch_size: int, text: str) -> TrainingError:
    return TrainingError(
        "BatchNorm",
        got=f"one value per channel at batch_size={batch_size} ({text})",
        need="several values to take a variance of",
        hint="batch_size=2 or more, or converting to gn, frn, brn or cbn",
    )
