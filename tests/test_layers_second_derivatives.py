"""Double backward: gradient penalties and the like, through every layer."""

import copy

import pytest
import torch
from torch import nn

from normswap.layers import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    FilterResponseNorm2d,
    load_training_state,
    training_state,
)
from normswap.layers.filter_response_norm import _FilterResponse


@pytest.mark.parametrize("tau", [True, False])
@pytest.mark.parametrize("eps_l", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradgradcheck_of_frn(affine, eps_l, tau):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    rows = [
        (0.5 + torch.rand(3, dtype=torch.float64)).requires_grad_() if wanted else None
        for wanted in (affine, affine, tau, eps_l)
    ]

    def call(x, *rows):
        return _FilterResponse.apply(x, *rows, 1e-6)

    assert torch.autograd.gradcheck(call, (x, *rows))
    assert torch.autograd.gradgradcheck(call, (x, *rows))


def test_both_backwards_of_frn_agree_also_where_the_threshold_ties():
    torch.manual_seed(0)
    layer = FilterResponseNorm2d(3).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x[0, 0] = 0.0  # y = β = τ there
    x.requires_grad_()
    leaves = (x, *layer.parameters())
    upstream = torch.randn_like(x)
    once = torch.autograd.grad(layer(x), leaves, upstream)
    twice = torch.autograd.grad(layer(x), leaves, upstream, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)


def cbn(kind, **arguments):
    """A producer, its CBN with some history, and what a batch of it looks like."""
    torch.manual_seed(0)
    producer, shape = {
        "plain": (nn.Conv2d(2, 3, 2), (2, 2, 4, 4)),
        "grouped": (nn.Conv2d(4, 4, 2, groups=2), (2, 4, 4, 4)),
        "depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding=1, bias=False), (1, 3, 3, 3)),
        "transposed": (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 2, 2, 2)),
        "linear": (nn.Linear(3, 4), (5, 3)),
        "frozen": (nn.Conv2d(2, 3, 2).requires_grad_(False), (2, 2, 4, 4)),
    }[kind]
    producer = producer.double()
    cls = CrossIterationBatchNorm1d if kind == "linear" else CrossIterationBatchNorm2d
    channels = getattr(producer, "out_features", None) or producer.out_channels
    norm = cls(channels, window=3, **arguments).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    norm.attach(producer)
    for _ in range(2):
        norm(producer(torch.randn(shape, dtype=torch.float64)))
        if kind != "frozen":
            with torch.no_grad():
                producer.weight.add_(0.05 * torch.randn_like(producer.weight))
    return producer, norm, torch.randn(shape, dtype=torch.float64)


CBN = ["plain", "grouped", "depthwise", "transposed", "linear", "frozen"]


@pytest.mark.parametrize("kind", CBN)
@pytest.mark.parametrize("through", [True, False])
def test_gradgradcheck_of_cbn(kind, through):
    producer, norm, x = cbn(kind, through_history=through)
    model = nn.Sequential(producer, norm)
    state = training_state(model)
    leaves = [p for p in model.parameters() if p.requires_grad]
    x.requires_grad_()

    def call(x, *_):
        load_training_state(model, state)  # the same history every time
        return model(x)

    if through or kind == "frozen":
        # the paper's form stops the gradient at the history: no difference quotient agrees
        assert torch.autograd.gradcheck(call, (x, *leaves))
    assert torch.autograd.gradgradcheck(call, (x, norm.weight, norm.bias))
    if through:
        assert torch.autograd.gradgradcheck(call, (x, *leaves))


@pytest.mark.parametrize("kind", CBN)
@pytest.mark.parametrize("through", [True, False])
def test_both_backwards_of_cbn_agree(kind, through):
    producer, norm, x = cbn(kind, through_history=through)
    model = nn.Sequential(producer, norm)
    state = training_state(model)
    leaves = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    found = []
    for create_graph in (False, True):
        load_training_state(model, state)
        y = model(x)
        upstream = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
        found.append(torch.autograd.grad(y, leaves, upstream, create_graph=create_graph))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_penalty_is_batch_norms_where_the_window_is_one():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    ours = nn.Sequential(conv, CrossIterationBatchNorm2d(4, window=1), nn.Tanh())
    ours[1].attach(conv)
    theirs = nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(4), nn.Tanh())
    theirs[0]._forward_hooks.clear()
    x = torch.randn(2, 3, 6, 6)
    for model in (ours, theirs):
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        (slope.square().sum() + (model(z) - 1.0).square().mean()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_a_penalty_in_a_training_loop_of_cbn():
    producer, norm, _ = cbn("plain")
    model = nn.Sequential(producer, norm, nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        optimizer.zero_grad()
        (model(x).square().mean() + slope.square().mean()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
