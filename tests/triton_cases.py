"""Triton's kernels against the definitions, in Triton's interpreter.

Run by test_layers_triton.py: Triton decides as it is imported whether it interprets, so this needs
a process of its own. What a kernel does not write is NaN here.
"""

import copy
import importlib
import logging
import os

import pytest
import reference
import torch
from torch.utils.checkpoint import checkpoint

from normswap.layers import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    CrossIterationBatchNorm2d,
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
)
from normswap.layers.gpu import launching, tiles

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_layers_triton.py runs it", allow_module_level=True)

frn = importlib.import_module("normswap.layers.filter_response_norm")
statistics = importlib.import_module("normswap.layers.batch_statistics")
history = importlib.import_module("normswap.layers.iteration_history")
cbn = importlib.import_module("normswap.layers.iteration_window")
brn = importlib.import_module("normswap.layers.batch_renorm")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
CLASSES = {3: FilterResponseNorm1d, 4: FilterResponseNorm2d, 5: FilterResponseNorm3d}


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)  # then new memory is full of NaN
    yield
    torch.use_deterministic_algorithms(False)


class Counted:
    """The module of kernels, and how often it took a batch."""

    def __init__(self, module):
        self.module, self.taken = module, 0

    def __getattr__(self, name):
        return getattr(self.module, name)

    def forward(self, *arguments):
        found = self.module.forward(*arguments)
        self.taken += found is not None
        return found

    def backward(self, *arguments):
        found = self.module.backward(*arguments)
        self.taken += found is not None
        return found


@pytest.fixture
def kernels(monkeypatch):
    from normswap.layers.gpu import filter_response

    counted = Counted(filter_response)
    monkeypatch.setattr(frn, "_kernels_for", lambda x: counted)
    return counted


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of more than 64 elements are long: two parts, the first in two pieces."""
    from normswap.layers.gpu import filter_response

    monkeypatch.setattr(tiles, "WHOLE", 64)
    monkeypatch.setattr(tiles, "_PIECE", 32)
    monkeypatch.setattr(tiles, "_MOST_PARTS", 2)
    monkeypatch.setattr(tiles, "_NARROW", 2)
    monkeypatch.setattr(tiles, "_WIDE", 4)
    yield
    filter_response._plan_forward.cache_clear()
    filter_response._plan_backward.cache_clear()


def laid_out(x, channels_last):
    return x.contiguous(memory_format=FORMATS[x.dim()]) if channels_last else x


def scrambled(layer):
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(1.0 if name == "weight" else 0.1, 0.5)
    return layer


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def agree(layer, x, grad):
    """Values and all gradients of ``layer`` against the definition in float64."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    (wide_x,) = reference.wide(x)
    vectors = [layer.weight, layer.bias, layer.tau, layer.eps_l]
    wide = [None if v is None else reference.wide(v)[0] for v in vectors]
    expected = reference.filter_response_norm(wide_x, *wide, layer.eps)
    expected.backward(grad.double())
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()
    assert x.grad.dtype == x.dtype
    tolerance = TOLERANCE[x.dtype]
    assert distance(y.detach(), expected.detach()) < tolerance
    assert distance(x.grad, wide_x.grad) < tolerance
    for vector, wanted in zip(vectors, wide, strict=True):
        if vector is not None:
            assert vector.grad.dtype == vector.dtype
            # sums of gradients may cancel: measured against what is summed
            room = tolerance * max(float(wanted.grad.norm()), float(grad.double().norm()))
            assert float((vector.grad.double() - wanted.grad).norm()) < room


SHAPES = [
    (2, 3, 40),
    (1, 1, 7, 7),
    (3, 5, 1, 1),
    (2, 17, 7, 7),
    (2, 64, 4, 4),
    (1, 2, 113, 57),
    (2, 3, 3, 4, 5),
    (1, 3, 1, 2),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_frn_of_any_shape(kernels, shape, channels_last):
    if channels_last and len(shape) == 3:
        pytest.skip("three axes have one format")
    torch.manual_seed(1)
    layer = scrambled(CLASSES[len(shape)](shape[1], learnable_eps=True))
    agree(layer, laid_out(torch.randn(shape) + 0.5, channels_last), torch.randn(shape))
    assert kernels.taken == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("long", "own"), [(False, True), (True, False)])
def test_frn_of_any_dtype(kernels, request, dtype, channels_last, long, own):
    """``own``: parameters of the batch's dtype, not of float32 as under autocast."""
    if long:
        request.getfixturevalue("small_tiles")
    torch.manual_seed(2)
    layer = scrambled(FilterResponseNorm2d(5, learnable_eps=True))
    layer = layer.to(dtype) if own else layer
    x = laid_out(torch.randn(2, 5, 7, 11), channels_last).to(dtype)
    agree(layer, x, torch.randn(x.shape).to(dtype))
    assert kernels.taken == 2


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("tlu", [False, True])
@pytest.mark.parametrize("learnable_eps", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_frn_with_and_without_its_parameters(kernels, request, affine, tlu, learnable_eps, long):
    if long:
        request.getfixturevalue("small_tiles")
    torch.manual_seed(3)
    layer = scrambled(FilterResponseNorm2d(3, 1e-3, affine, learnable_eps, tlu))
    agree(layer, torch.randn(2, 3, 7, 11), torch.randn(2, 3, 7, 11))
    assert kernels.taken == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_frn_of_rows_that_are_long_by_nature(kernels, channels_last):
    torch.manual_seed(4)
    shape = (1, 3, 131, 126)
    plan = tiles.cut(1, 3, 131 * 126, channels_last)
    assert plan.parts > 1
    x = laid_out(torch.randn(shape), channels_last)
    agree(scrambled(FilterResponseNorm2d(3)), x, torch.randn(shape))
    assert kernels.taken == 2


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "tau", "eps_l", "all vectors"])
def test_frn_gives_the_gradients_that_are_asked_for(kernels, request, frozen, long):
    if long:
        request.getfixturevalue("small_tiles")
    torch.manual_seed(5)
    layer = scrambled(FilterResponseNorm2d(4, learnable_eps=True))
    x, grad = torch.randn(2, 4, 7, 11, requires_grad=True), torch.randn(2, 4, 7, 11)
    layer(x).backward(grad)
    leaves = {"x": x, **dict(layer.named_parameters())}
    whole = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name != frozen and (name == "x" or frozen != "all vectors"))
    layer(x).backward(grad)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, whole[name])
        else:
            assert leaf.grad is None


def test_frn_takes_gradients_of_any_layout(kernels):
    torch.manual_seed(6)
    layer = scrambled(FilterResponseNorm2d(3))
    x = torch.randn(2, 3, 6, 6)
    agree(layer, x, laid_out(torch.randn(2, 3, 6, 6), True))
    layer.zero_grad()
    agree(layer, laid_out(x, True), torch.randn(2, 3, 6, 6))
    layer.zero_grad()
    agree(layer, x, torch.randn(2, 3, 1, 1).expand(2, 3, 6, 6))
    layer.zero_grad()
    agree(layer, x, torch.randn(2 * 3 * 36 + 1)[1:].view(2, 3, 6, 6))  # not on a 16-byte border
    assert kernels.taken == 8


def test_frn_output_may_be_changed_in_place(kernels):
    layer = FilterResponseNorm2d(3)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    layer(x).add_(1.0).sum().backward()
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    assert torch.equal(x.grad, expected)


def test_frn_is_the_same_to_the_bit_each_time(kernels, small_tiles):
    torch.manual_seed(7)
    layer, x = scrambled(FilterResponseNorm2d(5)), torch.randn(2, 5, 7, 11)
    seen = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        seen.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_frn_keeps_what_is_not_finite_where_the_eager_form_does(
    kernels, request, monkeypatch, value, long
):
    if long:
        request.getfixturevalue("small_tiles")
    torch.manual_seed(8)
    layer = scrambled(FilterResponseNorm2d(3))
    x, grad = torch.randn(2, 3, 7, 11), torch.randn(2, 3, 7, 11)
    x[1, 1, 2, 3] = value
    seen = []
    for found in (kernels, None):
        monkeypatch.setattr(frn, "_kernels_for", lambda x, found=found: found)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        seen.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)])
    assert not seen[0][0].isfinite().all()
    for ours, eager in zip(*seen, strict=True):
        torch.testing.assert_close(ours, eager, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert kernels.taken == 2


def test_frn_has_second_derivatives(kernels):
    torch.manual_seed(9)
    layer = scrambled(FilterResponseNorm2d(3, learnable_eps=True))
    x, v = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    (first,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
    found = torch.autograd.grad((first * v).sum(), [x, *layer.parameters()])
    (wide_x,) = reference.wide(x)
    wide = [reference.wide(p)[0] for p in layer.parameters()]
    y = reference.filter_response_norm(wide_x, *wide, layer.eps)
    (first,) = torch.autograd.grad((y**3).sum(), wide_x, create_graph=True)
    expected = torch.autograd.grad((first * v.double()).sum(), [wide_x, *wide])
    assert kernels.taken == 2  # forward, and the first derivative by way of y**3
    for ours, wanted in zip(found, expected, strict=True):
        assert distance(ours, wanted) < 1e-5


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 4, 4, dtype=torch.float64),
        torch.ones(2, 6, 4, 4)[:, ::2],
        torch.ones(2, 3, 4, 8)[..., :4],
        torch.ones(2, 3, 1, 1).expand(2, 3, 4, 4),
        torch.ones(2, 4, 3).transpose(1, 2),
        torch.ones(2, 3),
    ],
    ids=["float64", "every second channel", "left half", "expanded", "transposed", "two axes"],
)
def test_frn_leaves_what_is_unusual_to_the_eager_form(kernels, x):
    layer = CLASSES.get(x.dim(), FilterResponseNorm1d)(3, learnable_eps=True)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer(leaf).sum().backward()
    layer(x)
    assert kernels.taken == 2 * (kernels.module.forward(leaf, *[None] * 4, 1e-6) is not None)
    assert kernels.module.forward(x, None, None, None, None, 1e-6) is None


def test_frn_refuses_vectors_that_are_elsewhere_or_not_dense(kernels):
    x, weight = torch.ones(2, 3, 4, 4), torch.ones(6)[::2]
    assert kernels.forward(x, weight, None, None, None, 1e-6) is None
    assert kernels.forward(x, torch.ones(3, device="meta"), None, None, None, 1e-6) is None
    assert kernels.forward(x, torch.ones(3).double(), None, None, None, 1e-6) is None
    assert kernels.forward(x, torch.ones(3), None, None, None, 1e-6) is not None


def test_frn_whose_kernel_cannot_be_built_leaves_the_work_to_the_eager_form(
    kernels, monkeypatch, caplog
):
    """As where there is no C compiler; said once."""

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launching, "_failed", False)
    monkeypatch.setattr(kernels.module.kernels, "forward_whole", Broken())
    kernels.module._plan_forward.cache_clear()
    layer, x = scrambled(FilterResponseNorm2d(3)), torch.randn(2, 3, 4, 4)
    with caplog.at_level(logging.WARNING, "normswap"):
        y = layer(x)
    kernels.module._plan_forward.cache_clear()
    assert kernels.taken == 0
    assert "Failed to find C compiler" in caplog.text
    assert launching._failed
    wide = [reference.wide(v)[0] for v in (x, layer.weight, layer.bias, layer.tau)]
    assert distance(y.detach(), reference.filter_response_norm(*wide, None, layer.eps)) < 1e-6


def test_frn_whose_backward_cannot_be_built_is_the_eager_one(kernels, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("ptxas")

    monkeypatch.setattr(launching, "_failed", False)
    monkeypatch.setattr(kernels.module.kernels, "backward_whole", Broken())
    kernels.module._plan_backward.cache_clear()
    agree(scrambled(FilterResponseNorm2d(3)), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
    kernels.module._plan_backward.cache_clear()
    assert kernels.taken == 1


RENORMS = {3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}


@pytest.fixture
def renorms(monkeypatch):
    from normswap.layers.gpu import batch_renorm

    counted = Counted(batch_renorm)
    monkeypatch.setattr(brn, "_kernels_for", lambda x: counted)
    yield counted
    batch_renorm._plan_forward.cache_clear()
    batch_renorm._plan_backward.cache_clear()


@pytest.fixture
def few_parts(monkeypatch):
    """Parts of several samples, each of several pieces."""
    monkeypatch.setattr(tiles, "_PIECE", 64)
    monkeypatch.setattr(tiles, "_FEWEST", 64)
    monkeypatch.setattr(tiles, "_SMALL", 64)
    monkeypatch.setattr(tiles, "_MOST_PARTS", 2)
    monkeypatch.setattr(tiles, "_WIDE", 4)


def run_in(layer):
    """Running statistics and vectors that are somewhere."""
    scrambled(layer)
    layer.running_mean.normal_(0.0, 0.5)
    layer.running_var.uniform_(0.5, 2.0)
    return layer


def renorm(rank, channels, **settings):
    return run_in(RENORMS[rank](channels, **({"r_max": 1.3, "d_max": 0.4} | settings)))


def renorm_agrees(layer, x, grad, bounds=(1.3, 0.4), rate=0.01):
    """Values, gradients and running statistics against the definition in float64."""
    running = [layer.running_mean.double(), layer.running_var.double()]
    versions = [layer.running_mean._version, layer.running_var._version]
    counted = int(layer.num_batches_tracked)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    (wide_x,) = reference.wide(x)
    vectors = [layer.weight, layer.bias]
    wide = [None if v is None else reference.wide(v)[0] for v in vectors]
    expected, mean, variance = reference.batch_renorm(
        wide_x, *wide, *running, layer.eps, rate, *bounds
    )
    expected.backward(grad.double())
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()
    tolerance = TOLERANCE[x.dtype]
    assert distance(y.detach(), expected.detach()) < tolerance
    # what is left of the gradient when two means are taken off it may be next to nothing
    room = tolerance * max(float(wide_x.grad.norm()), float(grad.double().norm()))
    assert float((x.grad.double() - wide_x.grad).norm()) < room
    for vector, wanted in zip(vectors, wide, strict=True):
        if vector is not None:
            assert vector.grad.dtype == vector.dtype
            room = tolerance * max(float(wanted.grad.norm()), float(grad.double().norm()))
            assert float((vector.grad.double() - wanted.grad).norm()) < room
    tolerance = TOLERANCE[layer.running_mean.dtype]
    assert distance(layer.running_mean, mean) < tolerance
    assert distance(layer.running_var, variance) < tolerance
    assert layer.running_mean._version > versions[0]
    assert layer.running_var._version > versions[1]
    assert int(layer.num_batches_tracked) == counted + 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 11, 13)])
def test_brn_of_any_shape(renorms, shape, channels_last):
    if channels_last and len(shape) == 3:
        pytest.skip("three axes have one format")
    torch.manual_seed(1)
    layer = renorm(len(shape), shape[1])
    renorm_agrees(layer, laid_out(torch.randn(shape) + 0.5, channels_last), torch.randn(shape))
    assert renorms.taken == 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("few", "own"), [(False, True), (True, False)])
def test_brn_of_any_dtype(renorms, request, dtype, channels_last, few, own):
    """``own``: parameters and buffers of the batch's dtype, not of float32 as under autocast."""
    if few:
        request.getfixturevalue("few_parts")
    torch.manual_seed(2)
    layer = renorm(4, 5).to(dtype if own else torch.float32)
    x = laid_out(torch.randn(3, 5, 7, 11), channels_last).to(dtype)
    renorm_agrees(layer, x, torch.randn(x.shape).to(dtype))
    assert renorms.taken == 2


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bounds", [(1.0, 0.0), (1.1, 0.1), (3.0, 5.0), (float("inf"),) * 2])
def test_brn_with_any_bounds(renorms, few_parts, affine, bounds):
    torch.manual_seed(3)
    layer = renorm(4, 3, affine=affine, r_max=bounds[0], d_max=bounds[1], momentum=0.3)
    renorm_agrees(layer, torch.randn(3, 3, 7, 11), torch.randn(3, 3, 7, 11), bounds, 0.3)
    assert renorms.taken == 2


def test_brn_with_a_cumulative_average(renorms, few_parts):
    torch.manual_seed(4)
    layer = renorm(4, 5, momentum=None)
    layer.num_batches_tracked.fill_(3)
    for count in (4, 5):
        x = torch.randn(3, 5, 7, 11)
        renorm_agrees(layer, x, torch.randn(x.shape), rate=1.0 / count)
        layer.zero_grad()
    assert renorms.taken == 4


@pytest.mark.parametrize("momentum", [0.2, None])
def test_brn_without_a_counter(renorms, momentum):
    torch.manual_seed(5)
    layer = renorm(4, 3, momentum=momentum)
    layer.num_batches_tracked = None
    eager, x = copy.deepcopy(layer), torch.randn(2, 3, 7, 11)
    y = layer(x)
    torch.testing.assert_close(y, eager._train_by_torch(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)
    assert renorms.taken == 1


def test_brn_keeps_its_schedule(renorms, monkeypatch):
    torch.manual_seed(6)
    layer = renorm(4, 3, r_max=2.0, d_max=1.0, warmup=2, r_ramp=3, d_ramp=2, momentum=0.5)
    eager = copy.deepcopy(layer)
    for step in range(8):
        x = torch.randn(2, 3, 5, 5) + step
        y = layer(x)
        torch.testing.assert_close(y, eager._train_by_torch(x), rtol=1e-5, atol=1e-5)
        assert layer.iteration == eager.iteration
        assert layer.limits == eager.limits
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)
    assert renorms.taken == 8


@pytest.mark.parametrize("channels_last", [False, True])
def test_brn_of_a_mean_far_from_zero(renorms, few_parts, channels_last):
    torch.manual_seed(7)
    x = laid_out(torch.randn(3, 5, 7, 11) + 1000.0, channels_last)
    layer = BatchRenorm2d(5, momentum=1.0)
    y = layer(x)
    wide = x.double()
    assert distance(layer.running_mean, wide.mean((0, 2, 3))) < 1e-6
    assert distance(layer.running_var, wide.var((0, 2, 3), unbiased=False)) < 1e-4
    # float32 itself holds 1000 to 6e-5
    assert float((y.mean((0, 2, 3)) - 5.0).abs().max()) < 1e-3  # d_max
    assert renorms.taken == 1


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_brn_takes_no_channel_that_is_not_finite(renorms, request, value, few):
    if few:
        request.getfixturevalue("few_parts")
    torch.manual_seed(8)
    layer = renorm(4, 3)
    eager = copy.deepcopy(layer)
    x, grad = torch.randn(3, 3, 7, 11), torch.randn(3, 3, 7, 11)
    x[2, 1, 6, 3] = value
    before = layer.running_mean.clone(), layer.running_var.clone()
    seen = []
    for train, vectors in ((layer, layer), (eager._train_by_torch, eager)):
        leaf = x.clone().requires_grad_()
        y = train(leaf)
        seen.append([y, *torch.autograd.grad(y, [leaf, *vectors.parameters()], grad)])
    assert seen[0][0][:, 1].isnan().all()
    for ours, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(ours, wanted, equal_nan=True, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)
    for now, then in zip((layer.running_mean, layer.running_var), before, strict=True):
        assert now[1] == then[1]
        assert now[0] != then[0]
        assert now[2] != then[2]
    assert renorms.taken == 2


@pytest.mark.parametrize("frozen", ["x", "weight", "all vectors"])
def test_brn_gives_the_gradients_that_are_asked_for(renorms, few_parts, frozen):
    torch.manual_seed(9)
    layer = renorm(4, 4, momentum=0.0)
    x, grad = torch.randn(3, 4, 7, 11, requires_grad=True), torch.randn(3, 4, 7, 11)
    layer(x).backward(grad)
    leaves = {"x": x, **dict(layer.named_parameters())}
    whole = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name != frozen and (name == "x" or frozen != "all vectors"))
    layer(x).backward(grad)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None
    (only,) = torch.autograd.grad(
        layer(x), next(v for v in leaves.values() if v.requires_grad), grad
    )
    assert only.isfinite().all()


def test_brn_takes_gradients_of_any_layout(renorms):
    torch.manual_seed(10)
    layer, x = renorm(4, 3), torch.randn(2, 3, 6, 6)
    for batch, grad in (
        (x, laid_out(torch.randn(2, 3, 6, 6), True)),
        (laid_out(x, True), torch.randn(2, 3, 6, 6)),
        (x, torch.randn(2, 3, 1, 1).expand(2, 3, 6, 6)),
        (x, torch.randn(2 * 3 * 36 + 1)[1:].view(2, 3, 6, 6)),  # not on a 16-byte border
    ):
        layer.zero_grad()
        renorm_agrees(layer, batch, grad)
    assert renorms.taken == 8


def test_brn_is_the_same_to_the_bit_each_time(renorms, few_parts):
    torch.manual_seed(11)
    layer, x = renorm(4, 5, momentum=0.0), torch.randn(3, 5, 7, 11)
    seen = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = copy.deepcopy(layer)(leaf)
        seen.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_brn_output_may_be_changed_in_place(renorms):
    layer, x = renorm(4, 3, momentum=0.0), torch.randn(2, 3, 6, 6, requires_grad=True)
    layer(x).relu_().square().sum().backward()
    expected = torch.autograd.grad(layer(x).relu().square().sum(), x)[0]
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_brn_has_second_derivatives(renorms):
    torch.manual_seed(12)
    layer = renorm(4, 3, momentum=0.0)
    eager = copy.deepcopy(layer)
    x, v = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    seen = []
    for train, vectors in ((layer, layer), (eager._train_by_torch, eager)):
        (first,) = torch.autograd.grad((train(x) ** 3).sum(), x, create_graph=True)
        seen.append(torch.autograd.grad((first * v).sum(), [x, *vectors.parameters()]))
    for ours, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
    assert renorms.taken >= 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_brn_under_a_checkpoint_is_the_eager_form(renorms, reentrant):
    torch.manual_seed(13)
    layer = renorm(4, 3, momentum=0.3)
    plain, x = copy.deepcopy(layer), torch.randn(2, 3, 6, 6)
    leaf = x.clone().requires_grad_()
    checkpoint(layer, leaf, use_reentrant=reentrant).square().sum().backward()
    assert renorms.taken == 0
    other = x.clone().requires_grad_()
    plain(other).square().sum().backward()
    assert renorms.taken == 2
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)


def test_brn_whose_statistics_are_counted_anew_is_the_eager_form(renorms):
    layer = renorm(4, 3)
    loader = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    torch.optim.swa_utils.update_bn(loader, layer)
    assert renorms.taken == 0
    assert int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize("name", ["moments", "renormalise"])
def test_brn_whose_kernel_cannot_be_built_counts_a_batch_once(renorms, monkeypatch, name):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launching, "_failed", False)
    monkeypatch.setattr(renorms.module.kernels, name, Broken())
    torch.manual_seed(14)
    layer, x = renorm(4, 3, warmup=3), torch.randn(2, 3, 6, 6)
    eager = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x), eager._train_by_torch(x))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert layer.iteration == eager.iteration == 1
    assert renorms.taken == 0


def test_brn_whose_backward_cannot_be_built_has_the_eager_one(renorms, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("ptxas")

    monkeypatch.setattr(launching, "_failed", False)
    monkeypatch.setattr(renorms.module.kernels, "backward", Broken())
    renorm_agrees(renorm(4, 3), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6))
    assert renorms.taken == 1


def test_brn_leaves_what_is_unusual_to_the_eager_form(renorms):
    x = torch.ones(2, 3, 4, 4)
    for batch in (x.double(), torch.ones(2, 6, 4, 4)[:, ::2], x[:, :, :1, :1].expand(2, 3, 4, 4)):
        layer = BatchRenorm2d(3, dtype=batch.dtype)
        assert layer(batch).isfinite().all()
    BatchRenorm1d(3)(torch.randn(4, 3))
    vectors = torch.ones(3), torch.ones(6)[::2], torch.ones(3).double()
    for bias in vectors:
        running = renorms.Running(torch.ones(3), torch.ones(3), None)
        plan = renorms.plan_for(x, vectors[0], bias, running, 0.1)
        assert (plan is not None) == (bias is vectors[0])
    layer = BatchRenorm2d(3)
    layer.num_batches_tracked = torch.tensor(0.0)
    layer(x)
    assert renorms.taken == 0


@pytest.fixture
def windows(monkeypatch):
    from normswap.layers.gpu import cross_iteration

    counted = Counted(cross_iteration)
    monkeypatch.setattr(cbn, "_kernels_for", lambda x: counted)
    yield counted
    cross_iteration._plan.cache_clear()


def by_definition(x, weight, bias, window, eps):
    """This batch has its share of μ̄ and σ̄²; autograd does the rest."""

    def column(vector):
        return vector.double().reshape(-1, *[1] * (x.dim() - 2))

    axes = [0, *range(2, x.dim())]
    own = x.mean(axes)
    spread = ((x - column(window.mean)) ** 2).mean(axes)
    share = window.share.double() if isinstance(window.share, torch.Tensor) else window.share
    mean = window.mean.double() + share * (own - own.detach())
    variance = window.variance.double() + share * (spread - spread.detach())
    y = (x - column(mean)) / torch.sqrt(column(variance) + eps)
    y = y if weight is None else y * column(weight)
    return y if bias is None else y + column(bias)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.25, "by channel"])
@pytest.mark.parametrize("few", [False, True])
def test_cbn_gradients_of_the_normalisation(windows, request, dtype, channels_last, share, few):
    if few:
        request.getfixturevalue("few_parts")
    torch.manual_seed(1)
    if share == "by channel":
        share = torch.tensor([0.25, 1.0, 0.5, 0.2, 1.0 / 3])
    window = cbn.Window(torch.randn(5) * 0.3, torch.rand(5) + 0.5, share)
    x = laid_out(torch.randn(3, 5, 7, 11), channels_last).to(dtype).requires_grad_()
    weight, bias = (torch.randn(5, requires_grad=True) for _ in range(2))
    grad = torch.randn(x.shape).to(dtype)
    found = torch.autograd.grad(
        cbn.normalise(x, weight, bias, window, 1e-3), [x, weight, bias], grad
    )
    wide = reference.wide(x, weight, bias)
    y = by_definition(*wide, window, 1e-3)
    expected = torch.autograd.grad(y, wide, grad.double())
    assert windows.taken == 1
    assert found[0].stride() == x.stride()
    for ours, wanted in zip(found, expected, strict=True):
        assert distance(ours, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 3])
@pytest.mark.parametrize("affine", [False, True])
def test_cbn_gradients_of_any_shape(windows, shape, affine):
    torch.manual_seed(2)
    channels = shape[1]
    window = cbn.Window(torch.randn(channels) * 0.3, torch.rand(channels) + 0.5, 0.5)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    vectors = [torch.randn(channels, requires_grad=True) for _ in range(2)] if affine else []
    pair = vectors or [None, None]
    found = torch.autograd.grad(cbn.normalise(x, *pair, window, 1e-3), [x, *vectors], grad)
    wide_x, *wide = reference.wide(x, *vectors)
    y = by_definition(wide_x, *(wide or [None, None]), window, 1e-3)
    expected = torch.autograd.grad(y, [wide_x, *wide], grad.double())
    assert windows.taken == 1
    for ours, wanted in zip(found, expected, strict=True):
        room = 3e-6 * max(float(wanted.norm()), float(grad.norm()))
        assert float((ours.double() - wanted).norm()) < room


@pytest.mark.parametrize("bias", [False, True])
def test_cbn_layer_is_the_same_with_its_gradient_through_the_history(windows, monkeypatch, bias):
    """Six steps of a convolution and its norm, by kernels and by torch's operations."""
    torch.manual_seed(3)
    batches = [torch.randn(2, 3, 6, 6) for _ in range(6)]
    upstream = torch.randn(2, 4, 6, 6)
    seen = []
    for found in (windows, None):
        monkeypatch.setattr(cbn, "_kernels_for", lambda x, found=found: found)
        torch.manual_seed(4)
        conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=bias)
        norm = CrossIterationBatchNorm2d(4, window=3)
        norm.attach(conv)
        leaves = [*conv.parameters(), *norm.parameters()]
        for batch in batches:
            gradients = torch.autograd.grad((norm(conv(batch)) * upstream).sum(), leaves)
            seen.append(gradients)
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.sub_(0.001 * gradient)
    assert windows.taken == 6
    for ours, eager in zip(seen[:6], seen[6:], strict=True):
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_cbn_whose_kernel_cannot_be_built_has_the_eager_gradient(windows, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("ptxas")

    monkeypatch.setattr(launching, "_failed", False)
    monkeypatch.setattr(windows.module.cross_iteration_kernels, "backward", Broken())
    torch.manual_seed(5)
    window = cbn.Window(torch.zeros(3), torch.ones(3), 0.5)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    grad = torch.randn(2, 3, 4, 4)
    (found,) = torch.autograd.grad(cbn.normalise(x, None, None, window, 1e-3), x, grad)
    (wide_x,) = reference.wide(x)
    y = by_definition(wide_x, None, None, window, 1e-3)
    assert distance(found, torch.autograd.grad(y, wide_x, grad.double())[0]) < 3e-6
    assert windows.taken == 0


@pytest.fixture
def vectors(monkeypatch):
    """The module of kernels on vectors, and what it was asked for and gave."""
    from normswap.layers.gpu import vectors

    class Heard:
        def __init__(self):
            self.done = []

        def __getattr__(self, name):
            def call(*arguments):
                found = getattr(vectors, name)(*arguments)
                if found:
                    self.done.append(name)
                return found

            return call

    heard = Heard()
    for module in (statistics, history, cbn):
        monkeypatch.setattr(module, "vector_kernels_for", lambda x: heard)
    # what a GPU would hold up
    monkeypatch.setattr(cbn, "answers_at_once", lambda x: False)
    monkeypatch.setattr(statistics, "answers_at_once", lambda x: False)
    yield heard
    vectors._plan_track.cache_clear()
    vectors._plan_join.cache_clear()


@pytest.mark.parametrize("rule", ["max", "drop"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("channels", [1, 3, 200])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_vectors_join_a_window(vectors, rule, rows, channels, layout):
    torch.manual_seed(1)
    mean, shift = torch.randn(channels), torch.randn(rows, channels)
    variances = torch.randn(rows, channels) + 0.5
    here = rows // 2
    shift[here], variances[here] = 0.0, variances[here].abs()
    for row in set(range(rows)) - {here}:
        shift[row, row % channels] = (float("nan"), float("inf"))[row % 2]
        variances[row, (row + 1) % channels] = (float("inf"), float("nan"))[row % 2]
    if layout == "columns":
        shift, variances = (t.t().contiguous().t() for t in (shift, variances))
    window, entries = cbn.join(mean, shift, variances, here, rule)
    for c in range(channels):
        pairs = list(enumerate(zip(shift[:, c].tolist(), variances[:, c].tolist(), strict=True)))
        kept = {
            k: (s, v)
            for k, (s, v) in pairs
            if k == here or (abs(s) < 1e9 and abs(v) < 1e9 and (rule == "max" or v >= 0))
        }
        share = 1.0 / len(kept)
        centre = share * sum(s for s, _ in kept.values())
        spread = share * sum(max(v, 0.0) + (s - centre) ** 2 for s, v in kept.values())
        assert float(window.mean[c]) == pytest.approx(float(mean[c]) + centre, abs=1e-5)
        assert float(window.variance[c]) == pytest.approx(spread, rel=1e-5, abs=1e-6)
        assert float(window.share[c]) == pytest.approx(share)
        for k in range(rows):
            counts = k in kept
            s, v = kept.get(k, (0.0, 0.0))
            assert float(entries.share[k, c]) == pytest.approx(share if counts else 0.0)
            deviation = s - centre if counts else 0.0
            assert float(entries.deviation[k, c]) == pytest.approx(deviation, abs=1e-5)
            grows = share if counts and v > 0 else 0.0
            assert float(entries.grows[k, c]) == pytest.approx(grows)
    assert entries.here == here
    assert vectors.done == ["join"]


def test_vectors_join_a_batch_that_is_not_finite(vectors):
    mean = torch.tensor([float("nan"), 1.0, 1.0])
    shift = torch.tensor([[float("nan"), 0.5, 0.5], [float("nan"), 0.0, 0.0]])
    variances = torch.tensor([[1.0, 1.0, 1.0], [float("nan"), 2.0, float("nan")]])
    window, entries = cbn.join(mean, shift, variances, 1, "max")
    expected = cbn._join_by_rule(mean, shift, variances, 1, "max")
    for ours, wanted in zip((*window, *entries[1:]), (*expected[0], *expected[1][1:]), strict=True):
        torch.testing.assert_close(ours, wanted, equal_nan=True)


@pytest.mark.parametrize("momentum", [0.1, 1, None])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 2500])
def test_vectors_track_as_batch_norm_does(vectors, momentum, counts, dtype, channels):
    torch.manual_seed(2)
    layer = run_in(BatchRenorm2d(channels, momentum=momentum)).to(dtype)
    layer.num_batches_tracked.fill_(4)
    if not counts:
        layer.num_batches_tracked = None
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.1
    mean[-1] = float("nan")
    before = layer.running_mean.double(), layer.running_var.double()
    version = layer.running_mean._version
    layer._track(mean, variance, 9)
    rate = momentum if momentum is not None else 1.0 / 5 if counts else 1.0
    pairs = zip(before, (mean.double(), variance.double() * 9 / 8), strict=True)
    expected = [old + rate * (new - old) for old, new in pairs]
    for found, wanted, old in zip(
        (layer.running_mean, layer.running_var), expected, before, strict=True
    ):
        assert found[-1] == old[-1]
        if channels > 1:
            assert distance(found[:-1], wanted[:-1]) < TOLERANCE[dtype]
    assert vectors.done == ["track"]
    assert layer.running_mean._version > version
    assert not counts or int(layer.num_batches_tracked) == 5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels", "taps"), [(1, 1), (3, 27), (70, 20)])
def test_vectors_forget_what_is_not_finite(vectors, dtype, channels, taps):
    torch.manual_seed(3)
    kept = history.History(2, lends=True)
    mean, variance = torch.randn(channels), torch.rand(channels)
    kept.prepare(mean, (1, channels, taps), dtype)
    place, room = kept.place(), kept.room()
    place.normal_()
    room.copy_(torch.randn(channels, taps))
    values = (float("nan"), float("inf"), -float("inf"))
    for number, value in enumerate(values):
        room.view(-1)[number * 7 % room.numel()] = value
        place.view(-1)[number * 5 % place.numel()] = value
    mean[channels // 2] = values[channels % 3]
    variance[channels // 3] = float("nan")
    wanted = room.nan_to_num()
    wanted[(mean + variance).isfinite().logical_not()] = 0.0
    patch, version = place.nan_to_num(0.0, 0.0, 0.0), room._version
    kept.forget_values(mean, variance)
    assert vectors.done == ["forget"]
    assert torch.equal(kept.room(), wanted)
    assert torch.equal(kept.place(), patch)
    assert room._version > version


def test_vectors_leave_what_is_unusual(vectors):
    layer = BatchRenorm2d(3, dtype=torch.float64)
    layer._track(torch.ones(3).double(), torch.ones(3).double(), 9)
    layer = BatchRenorm2d(3)
    layer.num_batches_tracked = torch.tensor(0.0)
    layer._track(torch.ones(3), torch.ones(3), 9)
    rows = torch.ones(2, 3).double()
    window, _ = cbn.join(rows[0], rows, rows, 0, "max")
    assert window.mean.dtype == torch.float64
    assert vectors.done == []


def test_vectors_cbn_layer_is_the_same(vectors, windows, monkeypatch):
    torch.manual_seed(3)
    batches, upstream = torch.randn(6, 2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    seen = []
    for found, gradients_by in ((vectors, windows), (None, None)):
        for module in (statistics, history, cbn):
            monkeypatch.setattr(module, "vector_kernels_for", lambda x, found=found: found)
        monkeypatch.setattr(cbn, "_kernels_for", lambda x, found=gradients_by: found)
        torch.manual_seed(4)
        conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        norm = CrossIterationBatchNorm2d(4, window=3)
        norm.attach(conv)
        leaves = [*conv.parameters(), *norm.parameters()]
        for batch in batches:
            y = norm(conv(batch))
            seen.append([y, *torch.autograd.grad((y * upstream).sum(), leaves)])
            with torch.no_grad():
                for leaf, gradient in zip(leaves, seen[-1][1:], strict=True):
                    leaf.sub_(0.001 * gradient)
        seen.append(list(norm.state_dict().values()))
    # every third batch has a slope of its own, and what is not finite in it is forgotten
    borrowing = ["join", "track"] * 2
    assert vectors.done == ["forget", "track", *borrowing, "join", "forget", "track", *borrowing]
    for ours, eager in zip(seen[:7], seen[7:], strict=True):
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
