"""The calculus of producers against autograd, and which modules are refused."""

import pytest
import torch
from torch import nn

from normswap.layers import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    producer_problem,
)
from normswap.layers import producers as producers_room
from normswap.layers.producers import fold_weight, mean_patch, unfold_weight, weight_gradient
from normswap.layers.sampled_gradient import Positions, sampled_gradient

CASES = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    "1x1": (nn.Conv2d(3, 4, 1), (2, 3, 7, 6)),
    "1x1 strided": (nn.Conv2d(3, 4, 1, stride=2), (2, 3, 7, 6)),
    "1x1 padded": (nn.Conv2d(3, 4, 1, padding=1), (2, 3, 7, 6)),
    "strided padded": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "uneven": (nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 3, 7, 6)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 3, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 4, 5, groups=4, padding=2), (2, 4, 7, 6)),
    "depthwise multiplier": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 6)),
    "same": (nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(2, 1)), (2, 3, 7, 6)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 7, 6)),
    "replicate": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="replicate"), (2, 3, 7, 6)),
    "circular": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 7, 6)),
    "circular same": (nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"), (2, 3, 7, 6)),
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "1d reflect": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9)),
    "3d": (nn.Conv3d(3, 4, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 3, 5, 4)),
    "3d grouped": (nn.Conv3d(4, 4, 2, groups=2), (2, 4, 3, 5, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (2, 3, 5, 4)),
    "transposed output padding": (
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
        (2, 3, 5, 4),
    ),
    "transposed grouped dilated": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=1),
        (2, 4, 5, 4),
    ),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), (2, 3, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 2, 3, 2)),
    "transposed 1x1": (nn.ConvTranspose2d(3, 4, 1), (2, 3, 5, 4)),
    "linear": (nn.Linear(5, 4), (7, 5)),
    "linear tokens": (nn.Linear(5, 4, bias=False), (2, 7, 5)),
}
NORMS = {
    2: CrossIterationBatchNorm1d,
    3: CrossIterationBatchNorm1d,
    4: CrossIterationBatchNorm2d,
    5: CrossIterationBatchNorm3d,
}


def channels_first(producer, y):
    return y.movedim(-1, 1) if isinstance(producer, nn.Linear) else y


def call_of(norm, producer, x):
    y = producer(x)
    return norm._link.take(y), y


def case(name):
    torch.manual_seed(0)
    producer, shape = CASES[name]
    producer = producer.double()
    norm = CrossIterationBatchNorm1d(
        channels_first(producer, producer(torch.randn(shape).double())).shape[1]
    )
    norm.attach(producer)
    return producer, norm, torch.randn(shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_mean_patch_and_variance_slope_against_autograd(name):
    producer, norm, x = case(name)
    call, y = call_of(norm, producer, x)
    y = channels_first(producer, y)
    axes = [0, *range(2, y.dim())]
    (mean_slope,) = torch.autograd.grad(y.mean(axes).sum(), producer.weight, retain_graph=True)
    patch = mean_patch(producer, call, None)
    folded = fold_weight(producer, mean_slope)
    torch.testing.assert_close(patch.unsqueeze(1).expand_as(folded), folded)

    variance = y.var(axes, unbiased=False)
    (expected,) = torch.autograd.grad(variance.sum(), producer.weight)
    with torch.no_grad():
        centred = y - y.mean(axes, keepdim=True)
        slope = weight_gradient(producer, call, centred, None) * 2 / centred[:, 0].numel()
    torch.testing.assert_close(slope, fold_weight(producer, expected).flatten(0, 1))
    torch.testing.assert_close(unfold_weight(producer, slope), expected)
    norm.detach()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", [name for name in CASES if "linear" not in name])
def test_the_mean_patch_of_a_large_map_is_taken_axis_by_axis(name, monkeypatch):
    producer, norm, x = case(name)
    call, _ = call_of(norm, producer, x)
    at_once = mean_patch(producer, call, None)
    monkeypatch.setattr(producers_room, "_SMALL_MAP", 0)
    torch.testing.assert_close(mean_patch(producer, call, None), at_once)
    norm.detach()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("at", [Positions(1, 0), Positions(2, 0), Positions(2, 1), Positions(3, 1)])
@pytest.mark.parametrize("name", [n for n in CASES if "linear" not in n and "transposed" not in n])
def test_a_sampled_gradient_is_that_of_the_sampled_positions(name, at, channels_last):
    producer, norm, x = case(name)
    if channels_last and x.dim() == 4:
        producer, x = (t.to(memory_format=torch.channels_last) for t in (producer, x))
    call, y = call_of(norm, producer, x)
    kept = at.of(y)
    upstream = torch.randn_like(kept)
    (expected,) = torch.autograd.grad((kept * upstream).sum(), producer.weight)
    found = torch.empty_like(fold_weight(producer, expected).flatten(0, 1))
    with torch.no_grad():
        sampled_gradient(producer, call, upstream, None, at, out=found)
    torch.testing.assert_close(unfold_weight(producer, found), expected)
    if x.dim() == 4:
        producer.to(memory_format=torch.contiguous_format)
    norm.detach()


@pytest.mark.parametrize("name", ["linear tokens", "1d"])
@pytest.mark.parametrize("view", ["flattened", "transposed"])
def test_views_between_the_producer_and_the_normaliser(name, view):
    producer, norm, x = case(name)
    flatten = view == "flattened"
    if name == "1d":
        change = (lambda y: y.movedim(1, -1).flatten(0, -2)) if flatten else (lambda y: y)
    else:
        change = (lambda y: y.flatten(0, 1)) if flatten else (lambda y: y.transpose(1, 2))
    norm.double()
    outputs = []
    for step in range(3):
        y = change(producer(x + step))
        moments = y if y.dim() == 2 else y.movedim(1, -1).flatten(0, 1)
        outputs.append(norm(y))
        with torch.no_grad():
            producer.weight.mul_(1.1)
    # today's weights on every stored batch, by hand: the variance of a scaled map is exact to
    # first order in 0.1, the mean exactly
    means = torch.stack(
        [
            channels_first(producer, producer(x + s)).movedim(1, -1).flatten(0, -2).mean(0)
            for s in range(3)
        ]
    )
    with torch.no_grad():
        producer.weight.div_(1.1)
    window_mean = torch.stack(
        [
            channels_first(producer, producer(x + s)).movedim(1, -1).flatten(0, -2).mean(0)
            for s in range(3)
        ]
    ).mean(0)
    scale = outputs[-1].movedim(1, -1).flatten(0, -2) if outputs[-1].dim() > 2 else outputs[-1]
    slope = (scale[0] - scale[1]) / (moments[0] - moments[1])
    torch.testing.assert_close(moments[0] - scale[0] / slope, window_mean)
    assert means.shape[0] == 3
    norm.detach()


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "strided padded"])
def test_channels_last_weights_need_no_copy(name):
    producer, norm, x = case(name)
    producer = producer.to(memory_format=torch.channels_last)
    call, y = call_of(norm, producer, x.contiguous(memory_format=torch.channels_last))
    folded = fold_weight(producer, producer.weight.detach())
    assert folded.data_ptr() == producer.weight.data_ptr()
    patch = mean_patch(producer, call, None)
    means = torch.einsum("gf,gcf->gc", patch, folded).flatten() + producer.bias
    torch.testing.assert_close(means, y.mean((0, 2, 3)))
    producer.to(memory_format=torch.contiguous_format)
    norm.detach()


@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2}, {"stride": 2, "dilation": 2}, {"groups": 3}]
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_tensorflow_padding(arguments, by_hand):
    from timm.layers import Conv2dSame, pad_same

    torch.manual_seed(0)
    conv = Conv2dSame(3, 6, 3, **arguments).double()
    pad = None
    if by_hand:

        def pad(x):
            return pad_same(x, conv.kernel_size, conv.stride, conv.dilation)

    norm = CrossIterationBatchNorm2d(6)
    norm.attach(conv, pad=pad)
    call, y = call_of(norm, conv, torch.randn(2, 3, 7, 10, dtype=torch.float64))
    (expected,) = torch.autograd.grad(y.mean((0, 2, 3)).sum(), conv.weight, retain_graph=True)
    folded = fold_weight(conv, expected)
    patch = mean_patch(conv, call, pad)
    torch.testing.assert_close(patch.unsqueeze(1).expand_as(folded), folded)
    (expected,) = torch.autograd.grad(y.var((0, 2, 3), unbiased=False).sum(), conv.weight)
    with torch.no_grad():
        centred = y - y.mean((0, 2, 3), keepdim=True)
        slope = weight_gradient(conv, call, centred, pad) * 2 / centred[:, 0].numel()
    torch.testing.assert_close(slope, fold_weight(conv, expected).flatten(0, 1))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Marker(nn.Conv2d):
    """A subclass that changes nothing."""


def test_problems():
    from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d

    assert producer_problem(Marker(2, 2, 1)) is None
    assert producer_problem(Conv2dSame(2, 2, 1)) is None
    assert "overrides" in producer_problem(Scaled(2, 2, 1))
    assert "overrides" in producer_problem(StdConv2d(2, 2, 1))
    assert "overrides" in producer_problem(ScaledStdConv2d(2, 2, 1))
    assert "no convolution" in producer_problem(nn.MaxPool2d(2))
    assert "before its first forward" in producer_problem(nn.LazyConv2d(2, 1))
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    assert "other parameters" in producer_problem(parametrised)
    patched = nn.Conv2d(2, 2, 1)
    patched.forward = lambda x: x
    assert "overrides" in producer_problem(patched)
