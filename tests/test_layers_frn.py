"""FilterResponseNorm and ThresholdedLinearUnit."""

import math

import pytest
import reference
import torch
from torch import nn

from normswap.errors import LayerError
from normswap.layers import (
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
    ThresholdedLinearUnit,
)

SHAPES = {
    (5, 3): FilterResponseNorm1d,
    (2, 3, 40): FilterResponseNorm1d,
    (2, 3, 4, 5): FilterResponseNorm2d,
    (2, 3, 1, 1): FilterResponseNorm2d,
    (2, 3, 3, 4, 2): FilterResponseNorm3d,
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def scrambled(layer):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(1.0 if name == "weight" else 0.0, 0.5)
    return layer


def values_of(layer):
    return [layer.weight, layer.bias, layer.tau, layer.eps_l]


@pytest.mark.parametrize("learnable_eps", [False, True])
@pytest.mark.parametrize("tlu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_and_backward_match_the_definition(shape, tlu, learnable_eps, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("the format exists for four and five axes")
    layer = scrambled(SHAPES[shape](3, tlu=tlu, learnable_eps=learnable_eps))
    x = torch.randn(shape)
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(shape)])
    x.requires_grad_()
    upstream = torch.randn(shape)
    y = layer(x)
    y.backward(upstream)

    (wide_x,) = reference.wide(x)
    wide = [None if v is None else reference.wide(v)[0] for v in values_of(layer)]
    expected = reference.filter_response_norm(wide_x, *wide, layer.eps)
    expected.backward(upstream.double())

    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=2e-4, atol=2e-5)
    for mine, theirs in zip(values_of(layer), wide, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=2e-4, atol=2e-4)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape):
    layer = scrambled(SHAPES[shape](3, learnable_eps=True, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_without_affine_and_without_bias():
    x = torch.randn(2, 3, 5, 5)
    plain = FilterResponseNorm2d(3, affine=False, tlu=False)
    assert plain.weight is None
    torch.testing.assert_close(plain(x).square().mean((2, 3)), torch.ones(2, 3))
    no_bias = scrambled(FilterResponseNorm2d(3, tlu=False))
    no_bias.register_parameter("bias", None)
    expected = plain(x) * no_bias.weight.view(1, 3, 1, 1)
    torch.testing.assert_close(no_bias(x), expected)
    no_bias(x).sum().backward()
    assert no_bias.weight.grad is not None


def test_training_and_eval_are_the_same_function():
    layer, x = scrambled(FilterResponseNorm2d(3)), torch.randn(2, 3, 7, 7)
    trained = layer(x)
    assert torch.equal(trained, layer.eval()(x))
    with torch.no_grad():
        assert torch.equal(trained, layer(x))


def test_agrees_with_timm_at_its_eps():
    from timm.layers import FilterResponseNormTlu2d

    theirs = scrambled(FilterResponseNormTlu2d(6))
    ours = FilterResponseNorm2d(6, eps=theirs.eps)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(12, 12), (1, 1)])
def test_statistics_in_float32_under_mixed_precision(dtype, size):
    x = (300 * torch.randn(2, 4, *size)).to(dtype).requires_grad_()
    layer = FilterResponseNorm2d(4)
    y = layer(x)
    assert y.dtype == dtype
    expected = reference.filter_response_norm(
        x.detach().double(),
        *(None if v is None else v.detach().double() for v in values_of(layer)),
        layer.eps,
    )
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


def test_half_precision_parameters():
    layer = FilterResponseNorm2d(4).bfloat16()
    x = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == layer.weight.grad.dtype == torch.bfloat16


def test_autocast():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), FilterResponseNorm2d(4), nn.Conv2d(4, 2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8))
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


def test_nan_stays_in_its_row():
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 0, 0] = math.nan
    y = FilterResponseNorm2d(3)(x)
    bad = torch.isnan(y).all((2, 3))
    assert bad.tolist() == [[False] * 3, [False, False, True]]
    assert torch.isfinite(y[0]).all()


def test_empty_batch():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = FilterResponseNorm2d(3)(x)
    assert y.shape == x.shape
    y.sum().backward()


def test_keeps_no_more_than_batch_norm_for_backward():
    def kept(module):
        x = torch.randn(2, 8, 16, 16)
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(x.requires_grad_())
        del y
        return sum(storages.values())

    batch_norm = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    assert kept(FilterResponseNorm2d(8)) <= 1.05 * kept(batch_norm)


def test_what_follows_a_tlu_may_work_in_place():
    layer = scrambled(FilterResponseNorm2d(3))
    x = torch.randn(2, 3, 5, 5)
    layer(x).mul(2).sum().backward()
    expected = layer.tau.grad.clone()
    layer.zero_grad()
    layer(x).mul_(2).sum().backward()
    torch.testing.assert_close(layer.tau.grad, expected)


def test_eps_l_alone_makes_one_by_one_maps_nearly_linear():
    layer = FilterResponseNorm2d(1, tlu=False, learnable_eps=True)
    with torch.no_grad():
        layer.eps_l.fill_(1e4)
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    y = layer(x)
    assert y[1].item() == pytest.approx(2 * y[0].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (FilterResponseNorm2d(3), (2, 3, 4)),
        (FilterResponseNorm1d(3), (2, 3, 4, 4)),
        (FilterResponseNorm2d(3), (2, 4, 4, 4)),
        (ThresholdedLinearUnit(3), (2, 4, 4)),
    ],
)
def test_wrong_shapes_are_refused(layer, shape):
    with pytest.raises(LayerError, match="need"):
        layer(torch.randn(shape))


def test_threshold_clips_from_below_and_learns():
    layer = ThresholdedLinearUnit(2)
    with torch.no_grad():
        layer.tau.copy_(torch.tensor([-1.0, 0.5]))
    x = torch.tensor([[-2.0, 0.0], [3.0, 1.0]], requires_grad=True)
    y = layer(x)
    assert y.tolist() == [[-1.0, 0.5], [3.0, 1.0]]
    y.sum().backward()
    assert layer.tau.grad.tolist() == [1.0, 1.0]
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_fused_threshold_is_the_separate_one():
    x = torch.randn(2, 3, 5, 5)
    fused = scrambled(FilterResponseNorm2d(3))
    bare, tlu = FilterResponseNorm2d(3, tlu=False), ThresholdedLinearUnit(3)
    with torch.no_grad():
        bare.weight.copy_(fused.weight)
        bare.bias.copy_(fused.bias)
        tlu.tau.copy_(fused.tau)
    assert torch.equal(fused(x), tlu(bare(x)))


@pytest.mark.parametrize("learnable_eps", [False, True])
def test_a_backward_inside_autocast_is_the_one_outside(learnable_eps):
    """Some people call it there, and autocast would take a row's products in bfloat16."""

    def gradients(inside):
        torch.manual_seed(0)
        layer = FilterResponseNorm2d(8, learnable_eps=learnable_eps)
        x, weight = torch.randn(3, 8, 16, 16, requires_grad=True), torch.randn(3, 8, 16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (layer(x) * weight).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    for mine, right in zip(gradients(inside=True), gradients(inside=False), strict=True):
        assert torch.equal(mine, right)
