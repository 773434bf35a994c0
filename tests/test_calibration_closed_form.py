import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.calibration import calibrate, closed_form
from normswap.calibration.lockstep import Ahead, lanes, stop_before, stops
from normswap.calibration.regression import Regression
from normswap.calibration.steady import Moments, steady_scales
from normswap.drift import measure_drift
from normswap.graph import Movable, movable_producers


class Net(nn.Module):
    """One of everything in front of a BatchNorm: dense, depthwise, transposed, padded, shared."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 12, 2, 2), nn.BatchNorm2d(12)
        self.skip, self.bn4 = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.twice, self.bn5 = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.depth(x)))
        x = torch.relu(self.bn3(self.up(x)))
        y = self.skip(x)
        x = self.bn4(y) + y
        x = torch.relu(self.bn5(self.twice(self.twice(x))))
        return self.head(x.mean((2, 3)))


def images(count, seed, size=16):
    draw = torch.Generator().manual_seed(seed)
    loud = 0.3 + torch.rand(count, 3, 1, 1, generator=draw)
    coarse = torch.randn(count, 3, 4, 4, generator=draw)
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return loud * (smooth + 0.3 * torch.randn(count, 3, size, size, generator=draw))


def trained(net=None):
    torch.manual_seed(0)
    net = Net() if net is None else net
    bns = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            conv.weight.mul_(torch.rand(conv.out_channels, 1, 1, 1) * 3 + 0.05)  # unequal channels
        for i in range(40):
            net.train()(images(32, 100 + i))
        for bn in bns:
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.uniform_(-0.5, 0.5)
    return net.eval()


@pytest.fixture(scope="module")
def teacher():
    return trained()


def converted(teacher, target="gn"):
    return normswap.convert(copy.deepcopy(teacher), target, example_inputs=images(2, 0)).model


def test_what_may_move_is_what_a_site_alone_reads(teacher):
    model = converted(teacher)
    names = [f"bn{i}" for i in range(1, 6)]
    found, once = movable_producers(names, model, teacher, images(1, 0))
    assert {site: producer.name for site, producer in found.items()} == {
        "bn1": "stem",
        "bn2": "depth",
        "bn3": "up",
    }  # skip is read by an add too, twice runs two times
    assert once == set(names)


def test_frozen_and_tied_weights_do_not_move(teacher):
    model = converted(teacher)
    model.stem.weight.requires_grad_(False)
    model.also = nn.Conv2d(8, 8, 3, groups=8)
    model.also.weight = model.depth.weight
    found, _ = movable_producers(["bn1", "bn2", "bn3"], model, teacher, images(1, 0))
    assert set(found) == {"bn3"}


@pytest.mark.parametrize("name", ["stem", "depth", "up"])
def test_scales_are_counted_from_the_original(teacher, name):
    model = copy.deepcopy(teacher)
    module, original = getattr(model, name), getattr(teacher, name)
    producer = Movable(name, module, original)
    x = torch.randn(2, module.in_channels, 8, 8)
    wanted = torch.linspace(-2, 3, module.out_channels)
    with torch.no_grad():
        for _ in range(2):  # the second time changes nothing
            producer.scale(wanted)
            assert torch.allclose(module(x), original(x) * wanted.view(1, -1, 1, 1), atol=1e-5)
    assert torch.allclose(producer.loudness(), wanted, atol=1e-4)


def group_error(scales, x, groups):
    """By definition: x is what BatchNorm passes on, the best line through GroupNorm's output."""
    ours = nn.functional.group_norm(x * scales.view(1, -1, 1, 1), groups)
    left = whole = 0.0
    for c in range(x.shape[1]):
        a, b = ours[:, c].flatten().double(), x[:, c].flatten().double()
        a, b = a - a.mean(), b - b.mean()
        left += float(b.square().sum() - (a @ b) ** 2 / a.square().sum()) / float(b.square().sum())
        whole += 1.0
    return left / whole


@pytest.mark.parametrize("groups", [1, 2])
def test_steady_scales_lessen_the_error_of_fresh_samples(groups):
    draw = torch.Generator().manual_seed(3)
    mixing = torch.randn(12, 4, generator=draw)
    level = 2 * torch.rand(12, generator=draw) * torch.randn(12, generator=draw).sign()

    def sample(count, seed):
        draw = torch.Generator().manual_seed(seed)
        means = torch.randn(count, 4, generator=draw) @ mixing.T * 0.4 + level
        loud = torch.exp(0.4 * torch.randn(count, 12, generator=draw))
        noise = torch.randn(count, 12, 6, 6, generator=draw)
        return means[:, :, None, None] + loud[:, :, None, None] * noise

    x, fresh = sample(64, 1), sample(64, 2)
    found = steady_scales(Moments(x.mean((2, 3)), x.square().mean((2, 3))), torch.ones(12), groups)
    equal = 1 / x.std((0, 2, 3))
    assert group_error(found, fresh, groups) < 0.8 * group_error(equal, fresh, groups)
    assert (found.abs() / equal).max() < 64 * (found.abs() / equal).min() + 1e-6


def test_silent_and_single_channels_have_finite_scales():
    x = torch.randn(16, 4, 5, 5) * torch.tensor([1.0, 0.0, 1e-8, 2.0]).view(1, -1, 1, 1)
    moments = Moments(x.mean((2, 3)), x.square().mean((2, 3)))
    for groups in (1, 2, 4):
        assert steady_scales(moments, torch.ones(4), groups).isfinite().all()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(5, 7, 1),
        nn.Conv2d(5, 7, 3, 2, 1, bias=False),
        nn.Conv2d(6, 6, 3, 1, 1, groups=6),
        nn.Conv2d(5, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv1d(5, 7, 3, 2, 1),
    ],
    ids=["pointwise", "dense", "depthwise", "dilated", "1d"],
)
def test_regression_finds_the_weights_that_give_what_is_wanted(conv):
    torch.manual_seed(1)
    conv.reset_parameters()  # those of the collection are anybody's
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other.weight.add_(0.5 * torch.randn_like(other.weight))
        if other.bias is not None:
            other.bias.add_(1.0)
    shape = (8, conv.in_channels, *[9] * (conv.weight.dim() - 2))
    draw = torch.Generator().manual_seed(0)
    regression = Regression(Movable("", conv, copy.deepcopy(conv)))
    with torch.no_grad():
        for held in (False, False, True):
            x = torch.randn(shape)
            regression.add(x, other(x), 400, held=held, draw=draw)
        before = (conv(x) - other(x)).square().mean()
        regression.move()
        assert (conv(x) - other(x)).square().mean() < 0.05 * before


def test_regression_leaves_alone_what_it_would_make_worse():
    torch.manual_seed(1)
    conv = nn.Conv2d(30, 4, 1)
    kept = conv.weight.detach().clone()
    draw = torch.Generator().manual_seed(0)
    regression = Regression(Movable("", conv, copy.deepcopy(conv)))
    with torch.no_grad():
        for held in (False, True):  # pure noise, few positions
            x = torch.randn(2, 30, 4, 4)
            noisy = conv(x) + 10 * torch.randn(2, 4, 4, 4)
            regression.add(x, noisy, 32, held=held, draw=draw)
        regression.move()
    assert torch.equal(conv.weight, kept)


def test_lanes_stop_together_and_go_on_with_other_values(teacher):
    net = copy.deepcopy(teacher)
    hooks = [
        module.register_forward_pre_hook(stop_before(name), with_kwargs=True)
        for name, module in net.named_modules()
        if name in ("bn1", "bn2")
    ]
    batches = list(images(6, 5).split(2))
    seen = []
    with lanes(net, batches) as found:
        for stop, values, instead in stops(found):
            seen.append(stop)
            assert [len(v) for v in values] == [2, 2, 2]
            if stop == ("before", "bn1"):
                instead.extend(torch.zeros_like(v) for v in values)
            else:
                assert torch.allclose(values[0], values[1])  # all saw zeros
    assert seen == [("before", "bn1"), ("before", "bn2")]
    assert all(not lane._thread.is_alive() for lane in found)
    for hook in hooks:
        hook.remove()


def test_lanes_end_with_what_drives_them_and_pass_errors_on(teacher):
    net = copy.deepcopy(teacher)
    net.bn1.register_forward_pre_hook(stop_before("bn1"), with_kwargs=True)
    with lanes(net, [images(2, 0), images(2, 1)]) as found:
        found[0].advance()
        assert found[0]._thread.is_alive()
    assert not found[0]._thread.is_alive()
    with (
        pytest.raises(RuntimeError, match="channels"),
        lanes(net, [torch.zeros(2, 5, 8, 8)]) as found,
    ):
        found[0].advance()


def test_the_original_runs_ahead_until_it_has_what_is_asked_for(teacher):
    net = copy.deepcopy(teacher)
    for name in ("bn1", "bn2", "bn3"):
        getattr(net, name).register_forward_pre_hook(stop_before(name), with_kwargs=True)
    with lanes(net, [images(2, 0)]) as found:
        ahead = Ahead(found)
        (later,) = ahead.take(("before", "bn2"))
        (sooner,) = ahead.take(("before", "bn1"))
        assert (later.shape[-1], sooner.shape[-1]) == (8, 16)
        assert ahead.take(("before", "elsewhere")) is None


@pytest.mark.parametrize("target", ["gn", "ln"])
def test_producers_bring_it_nearer_than_norms_alone(teacher, target):
    fresh, errors = images(96, 7), {}
    for parameters in ("norms", "producers"):
        model = converted(teacher, target)
        report = calibrate(model, teacher, images(192, 1), steps=0, parameters=parameters)
        assert report.parameters == parameters
        errors[parameters] = measure_drift(model, teacher, fresh).output_error
    assert errors["producers"] < 0.9 * errors["norms"]


def test_only_producers_move_with_the_norms_and_the_record_names_them(teacher):
    model = converted(teacher)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, teacher, images(192, 1), steps=2)
    now = model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], now[k]) and not k.startswith("bn")}
    assert {"stem.weight", "depth.weight", "up.weight"} <= moved
    assert not any(k.startswith(("skip", "twice", "head")) for k in moved)
    assert now.keys() == before.keys()
    entry = normswap.provenance.provenance_of(model).history[-1]
    assert set(entry["moved"]) == moved


def test_it_may_be_done_twice(teacher):
    model = converted(teacher)
    first = calibrate(model, teacher, images(192, 1), steps=0).after.output_error
    second = calibrate(model, teacher, images(192, 1), steps=0).after.output_error
    assert second <= 1.02 * first


def test_alone_is_measured_with_the_producer_that_moved(teacher):
    model = converted(teacher)
    before = measure_drift(model, teacher, images(64, 9))
    calibrate(model, teacher, images(192, 1), steps=0)
    after = measure_drift(model, teacher, images(64, 9))
    for name in ("bn1", "bn2", "bn3"):
        site = next(s for s in after.sites if s.name == name)
        was = next(s for s in before.sites if s.name == name)
        assert site.alone < 1.2 * was.alone


def test_decisions_never_get_worse_than_they_came(teacher):
    teacher = copy.deepcopy(teacher)
    teacher.head.weight.data *= 20  # sure of some
    model = converted(teacher)
    report = calibrate(model, teacher, images(96, 1), steps=30, parameters="all")
    assert report.after.agreement >= report.before.agreement
    assert report.after.agreement <= report.after.sure_agreement <= 1
    assert "of those the original is sure of" in str(report)


def test_producers_are_scaled_as_long_as_there_is_time():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    net.eval()
    x = torch.randn(16, 3, 12, 12)
    model = normswap.convert(copy.deepcopy(net), "gn(groups=2)", example_inputs=x).model
    before = [model[at].weight.clone() for at in (0, 3)]
    pairs, producers, _ = closed_form._replaced(model, net, x)
    moments = closed_form.moments_before(pairs, producers, net, [x], torch.Generator())
    asked = iter([False, True])
    closed_form.steady(pairs, producers, moments, lambda: next(asked))
    same = [torch.equal(old, model[at].weight) for old, at in zip(before, (0, 3), strict=True)]
    assert same == [False, True]
