"""Models that ran before: what they keep of it is no obstacle to any command."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap import benchmark
from normswap.copying import copied, forget_history
from normswap.errors import SwapError
from normswap.training.optimisation import make_average


class Keeps(nn.Module):
    """Keeps its activation, under two names and in a list."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.history = {}

    def forward(self, x):
        self.feature = F.relu(self.bn(self.conv(x)))
        self.history["last"] = [self.feature]
        return self.feature.mean((2, 3))


class Caches(nn.Module):
    """LeViT's way: what eval mode computes from parameters once is kept until it trains."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.table, self.cache = nn.Parameter(torch.randn(2, 4)), {}

    def train(self, mode=True):
        if mode:
            self.cache = {}
        return super().train(mode)

    def bias(self, x):
        if self.training:
            return self.table[:, [3, 2, 1, 0]]
        if str(x.device) not in self.cache:
            self.cache[str(x.device)] = self.table[:, [3, 2, 1, 0]]
        return self.cache[str(x.device)]

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3)) + self.bias(x)[0]


def normed():
    """torch's old-style reparametrisations compute the weight in front of every forward."""
    first = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    last = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
    return nn.Sequential(
        first, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last
    )


BUILDERS = [Keeps, Caches, normed]


def ran(build):
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(4, 3, 8, 8)
    right = model(x)
    return model, x, right.detach()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("build", BUILDERS)
def test_a_copy_computes_the_same_and_trains(build):
    model, x, right = ran(build)
    twin = copied(model)
    assert torch.equal(twin(x), right)
    twin.train()(x).sum().backward()
    assert all(p.grad is not None for n, p in twin.named_parameters() if "table" not in n)
    assert all(p.grad is None for p in model.parameters())


def test_one_tensor_stays_one():
    model, _, _ = ran(Keeps)
    twin = copied(model)
    assert twin.history["last"][0] is twin.feature
    assert twin.feature is not model.feature
    assert not twin.feature.requires_grad
    assert model.feature.requires_grad


def test_forgetting_keeps_values_and_parameters():
    model, x, right = ran(Caches)
    names = dict(model.named_parameters())
    cached = model.cache["cpu"]
    forget_history(model)
    assert model.cache["cpu"].grad_fn is None
    assert torch.equal(model.cache["cpu"], cached)
    assert dict(model.named_parameters()) == names
    assert torch.equal(model(x), right)


def test_what_cannot_be_copied_is_named():
    model = Keeps()
    model.lock = threading.Lock()
    with pytest.raises(SwapError, match=r"TypeError: .*lock.*taking locks"):
        copied(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("build", BUILDERS)
def test_every_command_takes_a_model_that_ran(build, tmp_path):
    model, x, _ = ran(build)
    teacher = copied(model)
    assert normswap.export_onnx(model, tmp_path / "bn.onnx", example_inputs=x[:1]).passed
    benchmark.compare(model, {"gn": "gn"}, x, rounds=1, warmup=1, onnx=False)
    make_average(model, 0.9)
    converted = normswap.convert(model, "gn", example_inputs=x).model
    converted(x)
    assert normswap.calibrate(converted, teacher, x, seconds=60, steps=3).steps == 3
