"""Several processes: what they share and how they agree. One process needs none of it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn


def wrap(model: nn.Module, accelerator: Any) -> Any:
    """The model itself, or in DistributedDataParallel where there are several processes."""
    if accelerator.num_processes == 1:
        return model
    return accelerator.prepare_model(model)


def unwrap(wrapped: Any, accelerator: Any) -> None:
    """Undo what ``wrap`` did to the model inside."""
    if accelerator.num_processes > 1:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)


def synchronised(
    wrapped: Any, accelerator: Any, now: bool
) -> contextlib.AbstractContextManager[Any]:
    """Average gradients over the processes only in the last forward before an update."""
    if now or accelerator.num_processes == 1:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any] = accelerator.no_sync(wrapped)
    return found


def any_of(accelerator: Any, *flags: bool) -> tuple[bool, ...]:
    """Each flag as soon as one process has raised it, so that all do the same."""
    if accelerator.num_processes == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return tuple(bool(item) for item in accelerator.reduce(raised, "sum").tolist())


def added_up(accelerator: Any, numbers: list[float]) -> list[float]:
    """Sums over the processes."""
    if accelerator.num_processes == 1:
        return numbers
    mine = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    summed: list[float] = accelerator.reduce(mine, "sum").tolist()
    return summed


def gathered(accelerator: Any, item: Any) -> list[Any]:
    """One piece of plain data from every process."""
    if accelerator.num_processes == 1:
        return [item]
    buffer = io.BytesIO()
    torch.save(item, buffer)  # as bytes: all_gather_object cannot pickle every tensor
    found: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, buffer.getvalue())
    return [torch.load(io.BytesIO(part), weights_only=True) for part in found]


def wait_for_all(accelerator: Any) -> None:
    """Go on when every process has come here."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()


def share_buffers(model: nn.Module, accelerator: Any) -> None:
    """Give every process the running statistics of the first one."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
