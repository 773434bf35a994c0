"""BatchRenorm."""

import math

import pytest
import reference
import torch
from torch import nn

from normswap.errors import LayerError
from normswap.layers import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    load_training_state,
    training_state,
)

SHAPES = {
    (6, 3): (BatchRenorm1d, nn.BatchNorm1d),
    (2, 3, 9): (BatchRenorm1d, nn.BatchNorm1d),
    (2, 3, 4, 5): (BatchRenorm2d, nn.BatchNorm2d),
    (2, 3, 3, 4, 2): (BatchRenorm3d, nn.BatchNorm3d),
}


def scrambled(layer):
    torch.manual_seed(1)
    with torch.no_grad():
        if layer.affine:
            layer.weight.normal_(1.0, 0.3)
            if layer.bias is not None:
                layer.bias.normal_()
        layer.running_mean.normal_(0.0, 0.3)
        layer.running_var.uniform_(0.5, 2.0)
    return layer


def no_bounds(kind, features, **kwargs):
    return kind(features, r_max=math.inf, d_max=math.inf, **kwargs)


@pytest.mark.parametrize("bounds", [(3.0, 5.0), (1.1, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("affine", ["both", "no bias", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward_and_buffers_match_the_definition(shape, affine, bounds):
    layer = SHAPES[shape][0](3, affine=affine != "none", r_max=bounds[0], d_max=bounds[1])
    if affine == "no bias":
        layer.bias = None
    scrambled(layer)
    x = (2 * torch.randn(shape) + 0.7).requires_grad_()
    (wide_x,) = reference.wide(x)
    wide = [None if v is None else reference.wide(v)[0] for v in (layer.weight, layer.bias)]
    expected, mean, variance = reference.batch_renorm(
        wide_x,
        *wide,
        layer.running_mean.double(),
        layer.running_var.double(),
        layer.eps,
        layer.momentum,
        *bounds,
    )
    upstream = torch.randn(shape)
    y = layer(x)
    y.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip((layer.weight, layer.bias), wide, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck_with_r_and_d_held(check):
    from normswap.layers.batch_renorm import _Renormalise

    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3, 2), (3,), (3,))
    )
    r, d = torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(3, dtype=torch.float64)

    def call(x, weight, bias):
        # the moments are the batch's, as in the layer; the Function differentiates through them
        mean = x.detach().mean((0, 2, 3))
        variance = x.detach().var((0, 2, 3), unbiased=False)
        return _Renormalise.apply(x, weight, bias, mean, variance, r, d, 1e-5)

    assert check(call, (x, weight, bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_bounds_are_batch_norm(shape):
    kind, batch_norm = SHAPES[shape]
    layer = scrambled(kind(3, r_max=1.0, d_max=0.0))
    twin = batch_norm(3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    copy = x.detach().clone().requires_grad_()
    upstream = torch.randn(shape)
    y, expected = layer(x), twin(copy)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)


def test_open_bounds_are_the_eval_output():
    layer = scrambled(no_bounds(BatchRenorm2d, 3))
    x = 3 * torch.randn(2, 3, 4, 4) + 5
    before = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_eval_is_batch_norm_to_the_bit_and_state_dicts_go_both_ways(shape):
    kind, batch_norm = SHAPES[shape]
    twin = scrambled(batch_norm(3)).eval()
    layer = kind(3).eval()
    layer.load_state_dict(twin.state_dict(), strict=True)
    x = torch.randn(shape)
    assert torch.equal(layer(x), twin(x))
    batch_norm(3).load_state_dict(layer.state_dict(), strict=True)
    assert layer.state_dict().keys() == twin.state_dict().keys()


def test_one_element_per_channel():
    layer = scrambled(no_bounds(BatchRenorm2d, 3))
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    expected = layer.eval()(x)
    y = layer.train()(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert torch.isfinite(layer.running_var).all()


def test_nan_reaches_the_output_but_not_the_running_statistics():
    layer = scrambled(BatchRenorm2d(3))
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 0, 0] = math.nan
    y = layer(x)
    assert torch.isnan(y[:, 1]).all()
    assert torch.isfinite(y[:, [0, 2]]).all()
    assert layer.running_mean[1] == before[0][1]
    assert layer.running_var[1] == before[1][1]
    assert layer.running_mean[0] != before[0][0]


def test_empty_batch():
    layer = scrambled(BatchRenorm2d(3))
    before = layer.state_dict()["running_mean"].clone()
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer_dtype", ["float32", "same"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_low_precision_inputs(dtype, layer_dtype, channels_last):
    layer = no_bounds(BatchRenorm2d, 4, momentum=1.0)
    if layer_dtype == "same":
        layer = layer.to(dtype)
    # a variance of 300² fits no float16 buffer
    x = ((300 if layer_dtype == "float32" else 30) * torch.randn(4, 4, 8, 8)).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert layer.weight.grad.dtype == layer.weight.dtype
    for values in (y, x.grad, layer.running_mean, layer.running_var):
        assert torch.isfinite(values).all()
    if layer_dtype == "float32":
        variance = x.detach().double().var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-4, atol=1e-3)


def test_channels_last_is_kept():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = scrambled(BatchRenorm2d(3))
    twin = BatchRenorm2d(3)
    twin.load_state_dict(layer.state_dict())
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, twin(x.detach().contiguous()), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_momentum_none_is_a_cumulative_average():
    layer = BatchRenorm2d(2, momentum=None)
    batches = torch.randn(4, 3, 2, 4, 4)
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1, 3, 4)))


def test_schedule_counts_training_iterations():
    layer = BatchRenorm2d(2, r_max=3.0, d_max=5.0, warmup=2, r_ramp=4, d_ramp=2)
    x = torch.randn(2, 2, 3, 3)
    seen = []
    for _ in range(8):
        seen.append(layer.limits)
        layer(x)
        layer.eval()(x)
        layer.train()
    assert seen[:3] == [(1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]
    assert seen[3:] == [(1.5, 2.5), (2.0, 5.0), (2.5, 5.0), (3.0, 5.0), (3.0, 5.0)]
    layer.set_schedule(warmup=1)
    assert layer.limits == (1.0, 0.0)


def test_schedule_resumes_to_the_bit(tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 4, 4) for _ in range(6)]

    def fresh():
        return nn.Sequential(BatchRenorm2d(3, warmup=1, r_ramp=5, d_ramp=4, momentum=0.3))

    unbroken = fresh()
    outputs = [unbroken(x) for x in batches]
    first = fresh()
    for x in batches[:3]:
        first(x)
    torch.save((first.state_dict(), training_state(first)), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = fresh()
    second.load_state_dict(weights)
    load_training_state(second, state)
    for x, expected in zip(batches[3:], outputs[3:], strict=True):
        assert torch.equal(second(x), expected)
    assert "iteration" not in "".join(second.state_dict())


@pytest.mark.parametrize(
    "arguments",
    [{"r_max": 0.5}, {"d_max": -1.0}, {"warmup": -1}, {"track_running_stats": False}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(LayerError, match="need"):
        BatchRenorm2d(3, **arguments)


def test_wrong_rank_is_refused():
    with pytest.raises(LayerError, match="4 axes"):
        BatchRenorm2d(3)(torch.randn(2, 3, 4))
