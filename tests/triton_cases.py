"""Triton's kernels against the definitions, in Triton's interpreter.

Run by test_layers_triton.py: Triton decides as it is imported whether it interprets, so this needs
a process of its own. What a kernel does not write is NaN here.
"""

import importlib
import logging
import os

import pytest
import reference
import torch

from normswap.layers import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from normswap.layers.gpu import launching, tiles

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_layers_triton.py runs it", allow_module_level=True)

frn = importlib.import_module("normswap.layers.filter_response_norm")
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
    monkeypatch.setattr(tiles, "_LINE", 16)
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
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("own", [False, True])
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
    plan = tiles.cut(1, 3, 131 * 126, channels_last, 4)
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
