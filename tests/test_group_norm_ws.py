"""GroupNorm behind standardised convolutions: timm's layer, an exact fold, a fair match."""

from __future__ import annotations

import copy
import json

import onnx
import pytest
import torch
from reference import mean
from timm.layers import StdConv2d
from torch import nn
from traps import randomise

import normswap
from normswap import layers
from normswap.drift import measure_drift, predict_drift
from normswap.layers import WeightStandardisedConv1d, WeightStandardisedConv2d, fold_weights
from normswap.recipes import recipe_of
from normswap.training.parameters import parameter_groups, training_mode


@pytest.mark.parametrize("options", [{}, {"groups": 4, "bias": False}, {"stride": 2, "padding": 1}])
def test_the_convolution_is_timms(options):
    torch.manual_seed(0)
    ours = WeightStandardisedConv2d(8, 16, 3, **options).double()
    theirs = StdConv2d(8, 16, 3, **{"bias": True, "padding": 0, **options}).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-8, atol=1e-8)


def test_the_weight_is_the_definitions():
    conv = WeightStandardisedConv1d(3, 4, 5, dtype=torch.float64)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    rows = []
    for filter_ in conv.weight.detach():
        middle = mean(filter_.reshape(-1))
        spread = mean((filter_ - middle).reshape(-1) ** 2)
        rows.append((filter_ - middle) / torch.sqrt(spread + 1e-6))
    expected = nn.functional.conv1d(x, torch.stack(rows), conv.bias)
    torch.testing.assert_close(conv(x), expected)
    assert torch.autograd.gradgradcheck(conv, x.requires_grad_())


class Net(nn.Module):
    """A convolution, a depthwise one, two that gn-ws cannot take, and a tiny map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(16, 16, 1, groups=16), nn.BatchNorm2d(16))
        self.bare = nn.BatchNorm2d(16)
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.deep(self.stem(x))
        return self.last(self.bare(x + self.point(x))).flatten(1)


def trained():
    torch.manual_seed(0)
    model = Net()
    for _ in range(60):
        model(torch.randn(16, 3, 14, 14).abs())
    return model.eval()


X = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(1)).abs()


def test_what_it_takes_and_what_gets_gn_or_frozen():
    model = trained()
    keys, weight = set(model.state_dict()), model.stem[0].weight.detach().clone()
    result = normswap.convert(model, "gn-ws", example_inputs=X)
    assert [(e.name, e.becomes) for e in result.plan] == [
        ("stem.1", "gn-ws"),
        ("deep.1", "gn-ws"),
        ("point.1", "gn"),
        ("bare", "gn"),
        ("last.2", "frozen"),
    ]
    reasons = {e.name: e.reason for e in result.plan}
    assert "one element each" in reasons["point.1"]
    assert "add" in reasons["bare"]
    assert "no gn-ws: its smallest map is 1x1" in reasons["last.2"]
    assert "; no gn: " in reasons["last.2"]
    assert type(model.stem[0]) is WeightStandardisedConv2d
    assert type(model.point[0]) is nn.Conv2d
    assert set(model.state_dict()) <= keys
    assert torch.equal(model.stem[0].weight, weight)
    assert recipe_of(model.stem[1]).target == "gn-ws"
    assert recipe_of(model.bare).target == "gn"
    again = normswap.Plan.from_json(json.loads(json.dumps(result.plan.to_json())))
    twin = normswap.convert(trained(), again).model
    assert torch.equal(twin(X), model(X))


def test_the_match_is_nearer_than_a_copy_and_calibration_nearer_still():
    teacher = trained()
    errors = {}
    for init in ("match", "copy"):
        model = copy.deepcopy(teacher)
        model = normswap.convert(model, "gn-ws", example_inputs=X, init=init).model
        errors[init] = measure_drift(model, teacher, X)
        if init == "match":
            predicted = predict_drift(model, {"stem.1": teacher.stem[1], "bare": teacher.bare})
            report = normswap.calibrate(model, teacher, X, steps=0)
    alone = {init: [site.alone for site in found.sites[:2]] for init, found in errors.items()}
    assert all(m < c for m, c in zip(alone["match"], alone["copy"], strict=True)), alone
    assert predicted.sites[0].predicted is None  # the statistics say nothing of the filters
    assert predicted.sites[1].predicted is not None
    assert not predicted.trusted
    assert report.after.output_error <= report.before.output_error


def test_the_match_is_exact_where_filters_have_no_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), randomise(nn.BatchNorm2d(8))).double().eval()
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean((1, 2, 3), keepdim=True)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    made = model[0](x)
    moments = (made - made.mean((2, 3), keepdim=True)) / made.var(
        (2, 3), correction=0, keepdim=True
    ).sqrt()
    bn = model[1]
    wanted = bn.running_mean.view(1, -1, 1, 1) + moments * bn.running_var.sqrt().view(1, -1, 1, 1)
    expected = bn(wanted)  # every sample has the population's statistics
    converted = normswap.convert(copy.deepcopy(model), "gn-ws(groups=2)", example_inputs=x).model
    conv, weight = converted[0], model[0].weight
    spread = (weight.var((1, 2, 3), correction=0) + 1e-6).sqrt().view(1, -1, 1, 1)
    bias = conv.bias.view(1, -1, 1, 1)
    found = converted[1]((wanted - bias) / spread + bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_nothing_is_left_behind_when_a_swap_is_undone():
    model = trained()
    plan = normswap.plan(model, "gn-ws", example_inputs=X)
    before = [type(m) for m in model.modules()]
    with pytest.raises(normswap.NormSwapError, match="channels"):
        normswap.convert(model, plan, example_inputs=torch.zeros(1, 5, 14, 14))
    assert [type(m) for m in model.modules()] == before


def test_export_and_unwrap_fold_it_into_plain_weights(tmp_path):
    source = normswap.load_model("timm/test_resnet", pretrained=False)
    x = source.example_inputs(2)
    model = normswap.convert(source.model, "gn-ws", example_inputs=x).model
    kept = copy.deepcopy(model.state_dict())
    assert any(type(m) is WeightStandardisedConv2d for m in model.modules())
    assert normswap.export_onnx(model, tmp_path / "model.onnx", example_inputs=x).passed
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {tensor.name for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions
    assert all(node.input[1] in stored for node in convolutions)
    normswap.save(model, tmp_path / "out")
    loaded = normswap.load(tmp_path / "out")
    assert torch.equal(loaded(x), model(x))
    folder = normswap.unwrap(model, tmp_path / "plain", example_inputs=x)
    assert "WeightStandardised" not in (folder / "model.py").read_text()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items())  # itself unchanged


def test_folding_is_exact_and_reaches_nothing_else():
    model = nn.Sequential(WeightStandardisedConv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    x, plain = torch.randn(1, 3, 8, 8), model[1].weight.detach().clone()
    expected = model(x)
    assert torch.equal(fold_weights(model)(x), expected)
    assert [type(m) for m in model] == [nn.Conv2d, nn.Conv2d]
    assert torch.equal(model[1].weight, plain)
    assert set(layers.standardised_classes) == {nn.Conv1d, nn.Conv2d, nn.Conv3d}


def test_a_standardised_convolution_is_no_norm():
    model = normswap.convert(trained(), "gn-ws", example_inputs=X).model
    decays, steady = parameter_groups(model, 0.1)
    assert any(p is model.stem[0].weight for p in decays["params"])
    assert not any(p.ndim > 1 for p in steady["params"])
    with training_mode(model, norms_only=True):
        assert not model.stem[0].weight.requires_grad
        assert model.stem[1].weight.requires_grad
