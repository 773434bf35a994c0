"""Ghost BatchNorm against its definition and against torch's BatchNorm on each part by itself."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from traps import randomise

import normswap
from normswap import layers
from normswap.layers import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from normswap.training.parameters import notes_on_norms


@pytest.mark.parametrize(
    ("samples", "size", "parts"),
    [(6, 2, (2, 2, 2)), (7, 3, (4, 3)), (5, 8, (5,)), (8, 3, (3, 3, 2)), (4, 1, None)],
)
@pytest.mark.parametrize("kind", [GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d])
def test_forward_and_backward_match_the_definition(kind, samples, size, parts):
    torch.manual_seed(0)
    layer = kind(3, size=size, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    rank = int(kind.__name__[-2])
    x = torch.randn(samples, 3, *(3, 4, 2)[:rank], dtype=torch.float64, requires_grad=True)
    wide, weight, bias = reference.wide(x, layer.weight, layer.bias)
    expected = reference.ghost_batch_norm(wide, weight, bias, layer.eps, parts or (1,) * samples)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, wide.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_batchnorm_on_each_part(momentum):
    torch.manual_seed(0)
    layer = GhostBatchNorm2d(3, momentum=momentum, size=2)
    bn = nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(6, 3, 4, 4)
        y = layer(x)
        assert torch.equal(y, torch.cat([bn(part) for part in x.split(2)]))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), bn.buffers(), strict=True))
    assert torch.equal(layer.eval()(x), bn.eval()(x))


def test_a_checkpointed_block_counts_a_batch_once():
    layer, x = GhostBatchNorm2d(3, size=2), torch.randn(4, 3, 4, 4, requires_grad=True)
    twin = copy.deepcopy(layer)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    twin(x.detach())
    assert torch.equal(layer.running_mean, twin.running_mean)
    assert int(layer.num_batches_tracked) == int(twin.num_batches_tracked) == 2


def test_second_derivatives_are_right():
    layer = GhostBatchNorm2d(2, size=2, dtype=torch.float64)
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_it_takes_the_place_of_batchnorm_exactly_and_gives_it_back():
    x = torch.randn(8, 3, 8, 8)
    original = nn.Sequential(nn.Conv2d(3, 8, 3), randomise(nn.BatchNorm2d(8))).eval()
    expected = original(x)
    result = normswap.convert(copy.deepcopy(original), "gbn(size=4)", example_inputs=x)
    assert torch.equal(result.model(x), expected)
    assert result.model[1].size == 4
    assert "size=4" in repr(result.model)
    assert layers.training_state(result.model).keys() == {"1"}
    assert "GBN: each process splits its own batch" in notes_on_norms(result.model, 2)
    again = normswap.convert(result.model, "bn", example_inputs=x).model
    assert type(again[1]) is nn.BatchNorm2d
    assert torch.equal(again(x), expected)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(normswap.NormSwapError, match="GhostBatchNorm2d"):
        GhostBatchNorm2d(3, size=0)
    with pytest.raises(normswap.NormSwapError, match=r"gbn\(size=0\): got 0"):
        normswap.recipes.GhostBatchNorm(size=0)
