"""What the walker may leave out: the training run, and torch's own way to a shape."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normswap.graph import walk, walker
from normswap.graph.meta import run_on_meta
from normswap.graph.modes import any_depends_on_mode


class Plain(nn.Module):
    def forward(self, x):
        return self.helper(F.dropout(x, p=0.5, training=self.training))

    def helper(self, x):
        return x + 1

    def reset(self):  # not reached from forward
        self.training = False


class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if self.training else x


class InAMethod(Plain):
    def helper(self, x):
        return x + 1 if self.training else x


class InAParent(InAMethod):
    def helper(self, x):
        return super().helper(x)


class InAProperty(Plain):
    @property
    def noise(self):
        return 0.1 if self.training else 0.0

    def helper(self, x):
        return x + self.noise


class ByName(nn.Module):
    def forward(self, x):
        return x + 1 if getattr(self, "training") else x  # noqa: B009


def outside(module, x):
    return x + 1 if module.training else x


class InAFunction(nn.Module):
    def forward(self, x):
        return outside(self, x)


class InALambda(nn.Module):
    def forward(self, x):
        return (lambda y: y + 1 if self.training else y)(x)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return x + 1 if self.training else x


class DecoratedTwice(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return self.helper(x)

    @torch.no_grad()
    def helper(self, x):
        return x + 1 if self.training else x


def homeless():
    model = Plain()
    model.function = lambda x: x
    model.function.__module__ = None  # as exec leaves it
    return nn.Sequential(model, Branch())


class Switches(nn.Module):
    def train(self, mode=True):
        self.extra = mode
        return super().train(mode)

    def forward(self, x):
        return x + 1 if self.extra else x


class OwnDropout(nn.Module):
    def dropout(self, x, training):
        return x + 1 if training else x

    def forward(self, x):
        return self.dropout(x, self.training)


def hooked():
    model = Plain()
    model.register_forward_hook(lambda module, args, output: output)
    return model


def patched():
    model = Plain()
    model.forward = lambda x: x + 1 if model.training else x
    return model


def holding_a_function():
    model = Plain()
    model.function = outside
    return model


@pytest.mark.parametrize(
    "make",
    [
        *(Branch, InAMethod, InAParent, InAProperty, ByName, InAFunction, InALambda, Switches),
        *(OwnDropout, hooked, patched, holding_a_function, Decorated, DecoratedTwice, homeless),
    ],
)
def test_code_that_may_depend_on_the_mode_is_found(make):
    model = nn.Sequential(Plain(), make())
    assert any_depends_on_mode(model.modules())


def test_a_method_that_is_replaced_later_is_looked_at_again(monkeypatch):
    class Changing(Plain):
        pass

    assert not any_depends_on_mode([Changing()])
    monkeypatch.setattr(Changing, "forward", Branch.forward)
    assert any_depends_on_mode([Changing()])


@pytest.mark.parametrize("make", [Plain, nn.ReLU, nn.Dropout, lambda: nn.BatchNorm2d(3)])
def test_code_that_only_drops_out_does_not_depend_on_the_mode(make):
    assert not any_depends_on_mode(nn.Sequential(make(), nn.Conv2d(3, 3, 1)).modules())


@pytest.mark.parametrize(("make", "modes"), [(Plain, ["eval"]), (Branch, ["eval", "train"])])
def test_the_model_runs_in_training_mode_only_where_that_can_show_more(make, modes, monkeypatch):
    ran = []
    original = walker._run

    def run(*args, mode, **kwargs):
        ran.append(mode)
        return original(*args, mode=mode, **kwargs)

    monkeypatch.setattr(walker, "_run", run)
    walk(nn.Sequential(nn.BatchNorm2d(3), make()), torch.zeros(1, 3, 4, 4))
    assert ran == modes


X = torch.empty(2, 6, 5, 5, device="meta")
WIDE = torch.empty(2, 6, 5, 5, dtype=torch.float64, device="meta")
LAST = X.to(memory_format=torch.channels_last)
CALLS = [
    (F.relu, (X,), {}),
    (F.relu, (X,), {"inplace": True}),
    (F.relu6, (LAST,), {}),
    (F.hardswish, (X, True), {}),
    (F.hardtanh, (X, 0.0, 6.0, True), {}),
    (F.leaky_relu, (X, 0.1), {}),
    (F.gelu, (X,), {"approximate": "tanh"}),
    (torch.sigmoid, (X.transpose(1, 2),), {}),
    (F.batch_norm, (X, X[0, :, 0, 0], X[0, :, 0, 0]), {}),
    (F.group_norm, (LAST, 2), {}),
    (torch.Tensor.add, (X, X), {}),
    (torch.Tensor.add, (X, 1), {}),
    (torch.Tensor.mul, (X, X[:, :, :1, :1].contiguous()), {}),
    (torch.Tensor.mul, (X[:, :, :1, :1].contiguous(), X), {}),
    (torch.Tensor.add, (X, WIDE), {}),
    (torch.Tensor.add, (X, LAST), {}),
    (torch.Tensor.div, (X, X[0]), {}),
    (torch.add, (X, X), {"alpha": 2}),
    (torch.cat, ([X, X], 1), {}),
    (torch.cat, ([X, X[:, :2].contiguous()],), {"dim": -3}),
    (torch.cat, ((X, WIDE), 1), {}),
    (torch.cat, ([LAST, LAST], 1), {}),
    (torch.cat, ([X, torch.empty(0, device="meta")], 1), {}),
    (F.softmax, (X, 1), {}),
]


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_the_short_way_on_meta_ends_where_torch_ends(index):
    func, args, kwargs = CALLS[index]
    expected, found = func(*args, **kwargs), run_on_meta(func, args, kwargs)
    assert (found is args[0]) == (expected is args[0])
    for fact in ("shape", "dtype", "device"):
        assert getattr(found, fact) == getattr(expected, fact)


ODD = {"channels_last": LAST, "transposed": X.transpose(1, 2), "strided": X[:, ::2]}


@pytest.mark.parametrize("func", [F.relu, F.gelu, F.silu, torch.tanh, "batch_norm", "group_norm"])
@pytest.mark.parametrize("layout", ODD)
def test_tensors_that_are_not_plain_take_torchs_own_way(func, layout, monkeypatch):
    x = ODD[layout]
    if func == "batch_norm":
        calls = (F.batch_norm, (x, x[0, :, 0, 0], x[0, :, 0, 0]))
    elif func == "group_norm":
        calls = (F.group_norm, (x, 1))
    else:
        calls = (func, (x,))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_: pytest.fail("took the short way"))
    found = run_on_meta(*calls, {})
    assert found.shape == x.shape


def test_an_operation_in_place_changes_the_version_on_meta():
    x = torch.empty(2, 3, device="meta")
    before = x._version
    run_on_meta(F.silu, (x,), {"inplace": True})
    assert x._version > before


def test_shapes_that_cannot_be_joined_are_refused_on_meta():
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        run_on_meta(torch.cat, ([X, X[:, :, :2].contiguous()], 1), {})


class MakesTensors(nn.Module):
    """Makes tensors itself, and lets torch's own Python make some."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        grid = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape))
        return F.grid_sample(self.bn(x) + torch.ones(1), grid + torch.arange(2.0))


def test_tensors_that_a_forward_makes_are_made_on_meta():
    assert walk(MakesTensors(), torch.zeros(1, 3, 4, 4)).device == "meta"


class Autocasts(nn.Module):
    """What timm's EfficientViT and many training scripts write."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.bn(self.conv(x))


def test_autocast_by_the_device_of_a_tensor_is_walked_on_meta():
    before = torch.autocast.__init__
    graph = walk(Autocasts(), torch.zeros(1, 3, 4, 4))
    assert (graph.device, graph.sites[0].producer.name) == ("meta", "conv")
    with torch.device("meta"):
        assert len(walk(Autocasts(), torch.zeros(1, 3, 4, 4))) == 1
    assert torch.autocast.__init__ is before
    with pytest.raises(RuntimeError):
        torch.autocast(device_type="meta")
