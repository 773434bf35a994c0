"""EvoNorm-S0: the layer against timm's and its definition, the recipe against BN with SiLU."""

from __future__ import annotations

import copy
import json

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from timm.layers import EvoNorm2dS0
from torch import nn
from traps import randomise

import normswap
from normswap.drift import measure_drift, predict_drift
from normswap.layers import EvoNorm1d, EvoNorm2d, EvoNorm3d, EvoNormAct2d
from normswap.recipes import EvoNorm, recipe_of


def scrambled(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("groups", [1, 4, 16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_timms(groups, dtype):
    torch.manual_seed(0)
    ours = scrambled(EvoNorm2d(64, groups, dtype=dtype))
    theirs = EvoNorm2dS0(64, groups=32 if groups is None else groups, dtype=dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 64, 7, 5, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    exact = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours(x), theirs(twin), rtol=exact, atol=exact)
    ours(x).square().sum().backward()
    theirs(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=30 * exact, atol=30 * exact)


@pytest.mark.parametrize("kind", [EvoNorm1d, EvoNorm2d, EvoNorm3d])
def test_forward_and_backward_match_the_definition(kind):
    torch.manual_seed(0)
    layer = scrambled(kind(6, groups=3, dtype=torch.float64))
    rank = int(kind.__name__[-2])
    x = torch.randn(2, 6, *(3, 4, 2)[:rank], dtype=torch.float64, requires_grad=True)
    wide, *parameters = reference.wide(x, layer.weight, layer.bias, layer.v)
    expected = reference.evo_norm(wide, *parameters, 3, layer.eps)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, wide.grad)
    for ours, theirs in zip((layer.weight, layer.bias, layer.v), parameters, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.autograd.gradgradcheck(layer, x)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(normswap.NormSwapError, match=r"EvoNorm2d: got groups=4 for 6 channels"):
        EvoNorm2d(6, groups=4)


class Blocks(nn.Module):
    """A module, a functional and an in-place activation; a BN that nothing follows."""

    def __init__(self, act):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), randomise(nn.BatchNorm2d(16)), act())
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), randomise(nn.BatchNorm2d(16))
        self.last, self.norm = nn.Conv2d(16, 16, 1), randomise(nn.BatchNorm2d(16))

    def forward(self, x):
        x = self.stem(x)
        x = x + F.silu(self.bn(self.conv(x)), inplace=True)
        return self.norm(self.last(x))


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])
def test_it_takes_the_place_of_norm_and_activation(act):
    x = torch.randn(2, 3, 12, 12)
    result = normswap.convert(Blocks(act).eval(), "evonorm", example_inputs=x)
    assert {e.name: e.becomes for e in result.plan} == {
        "stem.1": "evonorm",
        "bn": "evonorm",
        "norm": "frozen",
    }
    assert "no ReLU or SiLU alone consumes its output" in result.plan.entries[2].reason
    assert "takes the SiLU's place" in str(result.plan)
    model = result.model
    assert type(model.stem[2]) is nn.Identity
    calls = []
    model.bn.register_forward_hook(lambda _m, _a, y: calls.append(y))
    inner = model.stem(x)
    through = inner + model.bn(model.conv(inner))
    torch.testing.assert_close(model(x), model.norm(model.last(through)))
    assert normswap.Plan.from_json(json.loads(json.dumps(result.plan.to_json()))) == result.plan


def test_a_fused_activation_is_absorbed():
    model = timm.create_model("efficientnet_lite0", num_classes=4)
    model.blocks = model.blocks[:2]
    block = model.blocks[0][0]
    assert type(block.bn1.act) is nn.ReLU6  # neither SiLU nor ReLU: it stays a BN, frozen
    b0 = timm.create_model("efficientnet_b0", num_classes=4).eval()
    plan = normswap.plan(b0, "evonorm", example_inputs=torch.zeros(1, 3, 64, 64))
    stem = plan.entries[0]
    assert (stem.becomes, stem.removal.how, stem.removal.op) == ("evonorm", "absorb", "silu")
    normswap.convert(b0, plan)
    assert type(b0.bn1) is EvoNormAct2d
    assert type(b0.bn1.act) is nn.Identity
    assert recipe_of(b0.bn1).taken(b0.bn1) == "silu"


def normal_maps(bn, samples=8, size=24):
    x = torch.randn(samples, bn.num_features, size, size, dtype=torch.float64)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    return x * bn.running_var.sqrt().view(1, -1, 1, 1) + bn.running_mean.view(1, -1, 1, 1)


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])
def test_the_match_is_the_best_of_its_family(act):
    """Exact where the gates can coincide; elsewhere no worse than γ, β, v near it."""
    torch.manual_seed(0)
    bn = randomise(nn.BatchNorm2d(8)).double().eval()
    bn.running_mean[0], bn.bias.data[0] = 0.0, 0.0  # the gate of BN's activation is centred here
    x = normal_maps(bn)
    expected = act()(bn(x))
    layer = normswap.convert(
        nn.Sequential(copy.deepcopy(bn), act()), EvoNorm(groups=1), example_inputs=x
    ).model[0]
    error = ((layer(x) - expected) ** 2).mean((0, 2, 3))
    spread = expected.var((0, 2, 3))
    assert error[0] < 1e-4 * spread[0]
    for name, change in [("weight", 1.1), ("weight", 0.9), ("v", 1.5), ("v", 0.6)]:
        other = copy.deepcopy(layer)
        other.get_parameter(name).data.mul_(change)
        best = ((other(x) - expected) ** 2).mean((0, 2, 3))
        assert (error <= 1.1 * best + 1e-5 * spread).all(), name


def test_drift_and_calibration_know_the_activation_it_took():
    torch.manual_seed(0)
    teacher, x = Blocks(nn.SiLU), torch.randn(16, 3, 16, 16)
    for _ in range(40):
        teacher(x)
    teacher.eval()
    model = copy.deepcopy(teacher)
    originals = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)}
    model = normswap.convert(model, "evonorm", example_inputs=x).model
    predicted = predict_drift(model, originals)
    assert 0 < predicted.sites[0].predicted < 1
    before = measure_drift(model, teacher, x)
    assert before.sites[0].alone < 0.5
    report = normswap.calibrate(model, teacher, x, steps=0)
    assert report.after.output_error < report.before.output_error


@pytest.mark.parametrize("init", ["copy", "reset"])
def test_copy_and_reset(init):
    bn = randomise(nn.BatchNorm2d(8))
    expected = bn.weight.clone() if init == "copy" else torch.ones(8)
    x = torch.randn(2, 8, 4, 4)
    model = nn.Sequential(bn, nn.SiLU())
    new = normswap.convert(model, "evonorm", example_inputs=x, init=init).model[0]
    assert torch.equal(new.weight, expected)
    assert torch.equal(new.v, torch.ones(8))


def test_artefact_and_onnx(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = normswap.convert(Blocks(nn.SiLU).eval(), "evonorm", example_inputs=x).model
    normswap.save(model, tmp_path / "out")
    again = normswap.load(tmp_path / "out", into=Blocks(nn.SiLU).eval())
    assert torch.equal(again(x), model(x))
    assert normswap.export_onnx(again, tmp_path / "model.onnx", example_inputs=x).passed


class Reused(nn.Module):
    """One SiLU for everything, as blocks of torchvision keep it; the last call follows a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), randomise(nn.BatchNorm2d(16))
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), randomise(nn.BatchNorm2d(16))
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), randomise(nn.BatchNorm2d(16))
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(x)))
        return self.act(x + self.bn3(self.conv3(y)))


class Loop(nn.Module):
    """One line of code runs SiLU behind both norms, of which only one may be converted."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.bns = nn.ModuleList(randomise(nn.BatchNorm2d(3)) for _ in range(2))

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.silu(bn(conv(x)))
        return x


class Impostor(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


def test_one_silu_at_several_places_goes_only_where_it_may():
    x = torch.randn(2, 3, 8, 8)
    model = Reused().eval()
    result = normswap.convert(model, "evonorm", example_inputs=x)
    assert result.plan.counts() == {"evonorm": 2, "frozen": 1}
    assert type(model.act) is nn.SiLU  # the sum still needs it
    a = model.bn1(model.conv1(x))
    b = model.bn2(model.conv2(a))
    expected = F.silu(a + model.bn3(model.conv3(b)))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model).train()(x), expected)


def test_all_norms_that_feed_a_call_take_it_or_none():
    x = torch.randn(2, 3, 8, 8)
    both = normswap.plan(Loop().eval(), "evonorm", example_inputs=x)
    assert both.counts() == {"evonorm": 2}
    model = Loop().eval()
    one = normswap.convert(model, "evonorm", example_inputs=x, include="bns.0").plan
    assert [e.becomes for e in one] == ["frozen", "keep"]
    assert "no evonorm: the SiLU stays" in one.entries[0].reason
    original = Loop().eval()
    original.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), original(x))


def test_what_only_looks_like_a_silu_is_no_silu():
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Impostor()).eval()
    plan = normswap.plan(block, "evonorm", example_inputs=torch.randn(1, 3, 8, 8))
    assert plan.counts() == {"frozen": 1}
