"""The largest batch that a device has memory for, found by trying."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from normswap.copying import copied
from normswap.errors import TrainingError
from normswap.training.execution import is_out_of_memory
from normswap.training.optimisation import make_optimizer
from normswap.training.options import FineTune
from normswap.training.samples import rng_kept

log = logging.getLogger("normswap")

MOST = 256


def largest_batch_size(
    model: nn.Module, sample: Tensor, options: FineTune | None = None, *, most: int = MOST
) -> int:
    """The largest power of two of samples for which two updates fit into the memory.

    A copy of the model is trained on noise of the sample's shape, from the largest batch down, on
    the device where the model is. The model and the random generators are left as they were.

    Args:
        model: on its device; it may return anything.
        sample: one input, without the batch.
        options: whose optimizer and precision are tried; None takes the defaults of ``FineTune``.
        most: where to begin.

    Raises:
        TrainingError: not even one sample fits.

    Example:
        >>> largest_batch_size(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 2, 2))
        256
    """
    options = FineTune() if options is None else options
    size = 1 << (max(1, most).bit_length() - 1)
    while size:
        if _fits(model, sample, options, size):
            return size
        size //= 2
    raise TrainingError(
        "batch_size",
        got="out of memory with a single sample",
        need="memory for the activations of one",
        hint="smaller images, --amp bf16 (amp='bf16') or --grad-checkpointing "
        "(grad_checkpointing=True)",
    )


def _fits(model: nn.Module, sample: Tensor, options: FineTune, size: int) -> bool:
    device = next(model.parameters()).device
    try:
        with rng_kept():
            _try(model, sample.to(device), options, size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _try(model: nn.Module, sample: Tensor, options: FineTune, size: int) -> None:
    trained = copied(model).train()
    optimizer = make_optimizer(trained, options, learning_rate=1e-6)
    images = sample.new_zeros(size, *sample.shape)
    kind = torch.bfloat16 if options.amp == "bf16" else torch.float16
    for _ in range(2):  # the optimizer's state is there from the second on
        with torch.autocast(sample.device.type, kind, enabled=options.amp is not None):
            loss = _total(trained(images))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def _total(output: object) -> Tensor:
    """One number that every tensor of an output has a part in."""
    if isinstance(output, Tensor):
        return output.float().sum()
    parts = output.values() if isinstance(output, dict) else output
    return torch.stack([_total(part) for part in parts]).sum()  # type: ignore[attr-defined]
