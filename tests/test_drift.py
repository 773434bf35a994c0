import copy
import json

import pytest
import torch
from torch import nn

import normswap
from normswap.drift import leaves, measure_drift, paired_sites, predict_drift, predicted_drift
from normswap.errors import CalibrationError


class Block(nn.Module):
    """Two convolutions; the second BatchNorm feeds an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).tanh()))
        return self.head(self.relu(x).mean((2, 3)))


def trained(model=None):
    """A model whose running statistics are those of its inputs."""
    torch.manual_seed(0)
    model = Block() if model is None else model
    model.train()
    for _ in range(60):
        model(images(16))
    return model.eval()


def images(count, seed=None):
    draw = torch.Generator().manual_seed(seed) if seed is not None else None
    loud = 0.5 + torch.rand(count, 1, 1, 1, generator=draw)
    return loud * torch.randn(count, 3, 12, 12, generator=draw)


def pair(target):
    teacher = trained()
    model = copy.deepcopy(teacher)
    return normswap.convert(model, target, example_inputs=images(2)).model, teacher


def test_exact_targets_do_not_drift():
    model, teacher = pair("frozen")
    drift = measure_drift(model, teacher, images(8, 1))
    assert drift.output_error == 0
    assert drift.agreement == 1
    assert drift.trusted
    assert drift.warning is None
    assert [(s.predicted, s.alone, s.measured) for s in drift.sites] == [(0.0, 0.0, 0.0)] * 2


def test_relative_error_is_its_definition():
    model, teacher = pair("gn")
    x = images(8, 1)
    drift = measure_drift(model, teacher, x, batch_size=3)
    with torch.no_grad():
        z, t = model(x).double(), teacher(x).double()
        first, reference = model.bn1(model.conv1(x)), teacher.bn1(teacher.conv1(x))
    expected = ((z - t).square().sum() / (t - t.mean(0)).square().sum()).sqrt()
    assert drift.output_error == pytest.approx(float(expected), rel=1e-5)
    assert drift.agreement == float((z.argmax(1) == t.argmax(1)).double().mean())
    spread = (reference - reference.mean()).square().sum()
    alone = ((first - reference).square().sum() / spread).sqrt()
    assert drift.sites[0].alone == pytest.approx(float(alone), rel=1e-4)
    assert drift.sites[0].measured == pytest.approx(float(alone), rel=1e-4)
    assert drift.images == 8


def test_a_layer_that_took_the_relu_is_compared_behind_it():
    model, teacher = pair("frn")
    assert model.bn2.tau is not None
    x = images(8, 1)
    site = measure_drift(model, teacher, x).sites[1]
    with torch.no_grad():
        inner = teacher.conv2(teacher.bn1(teacher.conv1(x)).tanh())
        reference = teacher.bn2(inner).relu()
        difference = (model.bn2(inner) - reference).square().sum()
    spread = (reference - reference.mean()).square().sum()
    assert site.alone == pytest.approx(float((difference / spread).sqrt()), rel=1e-4)


def test_nothing_changes():
    model, teacher = pair("gn")
    model.train()
    model.conv1.eval()
    teacher.bn1.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    measure_drift(model, teacher, images(4, 1))
    assert model.training
    assert not model.conv1.training
    assert teacher.bn1.training
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks


def test_hooks_and_flags_come_back_after_an_error():
    model, teacher = pair("gn")
    teacher.train()
    with pytest.raises(RuntimeError):
        measure_drift(model, teacher, torch.zeros(2, 7, 12, 12))
    assert teacher.training
    assert not any(module._forward_hooks for module in (*model.modules(), *teacher.modules()))


def test_a_layer_used_twice_is_compared_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.bn(self.conv(x))))

    teacher = trained(Twice())
    model = normswap.convert(copy.deepcopy(teacher), "frozen", example_inputs=images(2)).model
    drift = measure_drift(model, teacher, images(4, 1))
    assert drift.sites[0].measured == 0


def test_the_root_may_be_a_batchnorm():
    teacher = trained(nn.BatchNorm2d(3))
    model = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=images(2)).model
    drift = measure_drift(model, teacher, images(4, 1))
    assert drift.sites[0].name == ""
    assert drift.output_error == pytest.approx(drift.sites[0].alone, rel=0.01)


@pytest.mark.parametrize("wrong", ["same", "other"])
def test_models_that_do_not_belong_together(wrong):
    model, _ = pair("gn")
    teacher = model if wrong == "same" else nn.Sequential(nn.Conv2d(3, 3, 1))
    if wrong == "same":
        model = teacher = trained()
    with pytest.raises(CalibrationError, match="teacher: got"):
        paired_sites(model, teacher)


def test_no_images():
    model, teacher = pair("gn")
    for none in (torch.zeros(0, 3, 12, 12), []):
        with pytest.raises(CalibrationError, match="images: got none"):
            measure_drift(model, teacher, none)


def test_leaves_of_any_structure():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    found = leaves({"a": a, "more": [(b, torch.zeros(1, dtype=torch.long)), None, "x"], "c": c})
    assert [leaf.shape[0] for leaf in found] == [1, 2, 3]


def test_dense_outputs_agree_per_pixel():
    class Dense(Block):
        def forward(self, x):
            return {"out": self.bn2(self.conv2(self.bn1(self.conv1(x)))), "aux": x.mean()}

    teacher = trained(Dense())
    model = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=images(2)).model
    x = images(3, 1)
    drift = measure_drift(model, teacher, [x[:2], x[2:]])
    with torch.no_grad():
        same = model(x)["out"].argmax(1) == teacher(x)["out"].argmax(1)
    assert drift.agreement == pytest.approx(float(same.double().mean()))


def test_report(tmp_path):
    model, teacher = pair("gn")
    with torch.no_grad():
        model.bn2.weight.mul_(-1)
        model.head.weight.mul_(-1)
    drift = measure_drift(model, teacher, images(16, 1))
    assert "calibration or fine-tuning" in drift.warning
    assert "bn2" in drift.warning
    assert json.loads(json.dumps(drift.to_json()))["images"] == 16
    assert "bn1" in str(drift)
    assert len(drift.rows()) == 2
    assert drift.draw(tmp_path / "drift.png").stat().st_size > 1000


def test_prediction_orders_groups_as_the_measurement_does():
    """One loud channel among quiet ones: a single group must be seen to be worse than two."""
    bn = nn.BatchNorm2d(4)
    bn.running_mean.copy_(torch.tensor([30.0, 30.0, 0.0, 0.0]))
    bn.running_var.copy_(torch.tensor([900.0, 900.0, 0.01, 0.01]))
    one, two = nn.GroupNorm(1, 4), nn.GroupNorm(2, 4)
    assert predicted_drift(one, bn) > 1.5 * predicted_drift(two, bn)
    quiet = nn.BatchNorm2d(4)
    assert predicted_drift(one, quiet) < predicted_drift(two, quiet)


def test_prediction_of_other_layers():
    from normswap.layers import FilterResponseNorm2d, FrozenBatchNorm2d

    bn = nn.BatchNorm2d(4)
    assert predicted_drift(FrozenBatchNorm2d(4), bn) == 0
    assert 0 < predicted_drift(FilterResponseNorm2d(4), bn) < 1
    assert predicted_drift(nn.InstanceNorm2d(4), bn) > predicted_drift(nn.GroupNorm(1, 4), bn)
    assert predicted_drift(nn.GroupNorm(1, 4), nn.BatchNorm2d(4, track_running_stats=False)) is None
    assert predicted_drift(nn.Identity(), bn) is None


class Regressor(nn.Module):
    """Two numbers of very different size: argmax says nothing, one mean for both hides errors."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)
        nn.init.constant_(self.head.bias, 0)
        with torch.no_grad():
            self.head.bias[1] = 100

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def test_outputs_far_apart_hide_no_error():
    teacher = trained(Regressor())
    model = normswap.convert(copy.deepcopy(teacher), "in", example_inputs=images(2)).model
    drift = measure_drift(model, teacher, images(32, 1))
    assert drift.agreement == 1
    assert drift.output_error > 0.9
    assert not drift.trusted
    assert "do not use it" in drift.warning


@pytest.mark.parametrize(("target", "trusted"), [("gn", False), ("brn", True)])
def test_a_prediction_needs_no_data(target, trusted):
    model, teacher = pair(target)
    originals = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)}
    drift = predict_drift(model, originals)
    assert [site.name for site in drift.sites] == ["bn1", "bn2"]
    assert drift.trusted is trusted
    assert "predicted error of a layer" in drift.summary


@pytest.mark.parametrize("suffix", [".png", ".json", ".txt"])
def test_a_report_is_written_by_its_suffix(suffix, tmp_path):
    model, teacher = pair("gn")
    path = measure_drift(model, teacher, images(4, 1)).write(tmp_path / f"drift{suffix}")
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    elif suffix == ".json":
        assert json.loads(content)["trusted"] in (True, False)
    else:
        assert b"bn2" in content


@pytest.mark.parametrize(("target", "words"), [("frn", "which is chance"), ("gn", "33 %")])
def test_a_prediction_says_what_such_conversions_kept_of_a_real_network(target, words):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net[1].running_var.uniform_(0.5, 2.0)
    originals = {"1": copy.deepcopy(net[1])}
    model = normswap.convert(net, target, example_inputs=torch.zeros(1, 3, 8, 8)).model
    found = predict_drift(model, originals)
    assert not found.trusted
    assert "EfficientNet-Lite0" in found.warning
    assert words in found.warning
