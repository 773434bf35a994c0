"""The largest batch that fits, found by trying."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_runs import Net, weights

from normswap.errors import TrainingError
from normswap.training import FineTune
from normswap.training.batch_size import largest_batch_size


class Full(nn.Module):
    """Has memory for so many samples, in training mode."""

    def __init__(self, room, error):
        super().__init__()
        self.net, self.room, self.error, self.seen = Net("bn", dropout=0.5), room, error, []

    def forward(self, x):
        self.seen.append((len(x), self.training))
        if len(x) > self.room:
            raise self.error
        return {"logits": self.net(x), "more": [x.mean()]}


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("room", "most", "found"), [(5, 256, 4), (64, 256, 64), (64, 21, 16), (1, 2, 1)]
)
def test_it_is_the_largest_that_fits(room, most, found, error):
    model = Full(room, error).eval()
    before = weights(model)
    assert largest_batch_size(model, torch.randn(1, 8, 8), most=most) == found
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_the_random_generator_is_left_alone():
    model, state = Full(9, ERRORS[0]), torch.get_rng_state()
    sample = torch.zeros(1, 8, 8)
    largest_batch_size(model, sample, FineTune(amp="bf16", optimizer="sgd"))
    assert torch.equal(torch.get_rng_state(), state)


def test_not_even_one():
    with pytest.raises(TrainingError, match="out of memory with a single sample"):
        largest_batch_size(Full(0, ERRORS[0]), torch.zeros(1, 8, 8))


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        largest_batch_size(Full(9, RuntimeError("mat1 and mat2 differ")), torch.zeros(1, 8, 8))
