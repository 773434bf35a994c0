"""The rule, on networks whose answer is known, and what it reads."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.batch_effect import BatchEffect, SiteEffect, measure_batch_effect
from normswap.benchmark import Ratio, compare
from normswap.cli.app import app
from normswap.errors import CalibrationError, PlanError
from normswap.recommendation import Recommendation
from normswap.verdict import Option, decide


class Pool(nn.Module):
    """A BatchNorm whose pooled output is read by a linear layer."""

    def __init__(self, channels, head):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, len(head))
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(head, dtype=torch.float32))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.bn(x).mean((2, 3)))


def seen(net, images):
    """The network with the running statistics of these very images."""
    net.bn.momentum = None
    net.train()(images)
    return net.eval()


def alike():
    """Images with the same statistics each: BatchNorm is right at any batch size."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 16, 16, generator=draw)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    bias = torch.tensor([3.0, 2.0, 1.0, 0.0])
    net = Pool(4, torch.eye(4).tolist())
    with torch.no_grad():
        net.head.bias.copy_(bias)
    return seen(net, x), x


def hot():
    """A channel's mean decides: one image alone erases it under BatchNorm, a group keeps it."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(96, 8, 8, 8, generator=draw)
    x[torch.arange(96), torch.arange(96) % 8] += 1.0
    return seen(Pool(8, torch.eye(8).tolist()), x), x


def halves():
    """One of two halves of the channels is hot: two images of a class lose it under BatchNorm."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(96, 8, 8, 8, generator=draw)
    for image, label in zip(x, torch.arange(96) % 2, strict=True):
        image[label::2] += 1.0
    return seen(Pool(8, [[1, 0] * 4, [0, 1] * 4]), x), x


def loud():
    """Loudness decides: whatever normalises a sample by itself erases it."""
    draw = torch.Generator().manual_seed(0)
    gain = 0.2 + torch.arange(96) % 8 / 4
    pattern = torch.randn(1, 4, 8, 8, generator=draw).abs()
    x = gain.view(-1, 1, 1, 1) * pattern
    net = Pool(4, [[k / 8] * 4 for k in range(8)])
    net = seen(net, x)
    with torch.no_grad():  # class k is the nearest of eight loudnesses: lines that touch a parabola
        heights = net.bn(x).mean((1, 2, 3))[:8]
        net.head.weight.copy_((2 * heights / 4).view(8, 1).expand(8, 4))
        net.head.bias.copy_(-heights.square())
    return net, x


@pytest.mark.parametrize(
    ("make", "batch_size", "answer"),
    [(alike, 1, "bn"), (alike, 2, "bn"), (hot, 1, "gn"), (halves, 2, "gn"), (loud, 2, "frozen")],
)
def test_networks_whose_answer_is_known(make, batch_size, answer):
    net, x = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = normswap.recommend(net, x, batch_size=batch_size, targets=("gn", "frozen"), seconds=3)
    assert found.target == answer, str(found)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [o.target for o in found.options] == ["bn", "gn", "frozen"]
    assert found.reason in str(found)


def test_the_spread_of_batch_means_is_what_random_batches_show():
    net, x = hot()
    found = measure_batch_effect(net, x, 4)
    draw = torch.Generator().manual_seed(1)
    batches = torch.stack([x[torch.randint(96, (4,), generator=draw)] for _ in range(4000)])
    spread = batches.mean((1, 3, 4)).std(0) / (net.bn.running_var + net.bn.eps).sqrt()
    assert found.images == 96
    assert found.sites[0].noise == pytest.approx(float(spread.median()), rel=0.05)
    assert found.sites[0].shift < 1e-3
    shifted = measure_batch_effect(net, x + 2 * net.bn.running_var.sqrt().view(1, -1, 1, 1), 4)
    assert shifted.sites[0].shift == pytest.approx(2.0, rel=0.01)


def test_decisions_are_kept_by_large_batches_and_lost_by_single_images():
    net, x = hot()
    kept = [measure_batch_effect(net, x, size).kept for size in (1, 2, 48)]
    assert kept[0] < 0.5 < kept[2]
    assert kept[2] > 0.95


def test_a_batch_that_batchnorm_refuses_is_said():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()).eval()
    found = measure_batch_effect(net, torch.randn(16, 3, 1, 1), 1)
    assert found.kept is None
    assert "Expected more than 1 value per channel" in found.refused
    few = measure_batch_effect(net, torch.randn(3, 3, 1, 1), 8)
    assert (few.kept, few.refused) == (None, None)


def test_fewer_images_than_a_batch_say_nothing_against_batchnorm():
    net, x = hot()
    found = normswap.recommend(net, x[:20], batch_size=32, targets=("frozen",), seconds=1)
    assert found.target == "bn"
    assert "large enough for most networks" in found.reason
    assert any("fewer than a batch of 32" in text for text in found.unknown)
    seen = measure_batch_effect(net, x, 64, seconds=1e-9)  # one batch, however short the time
    assert seen.images >= 64
    assert seen.kept is not None


def effect(kept, batch_size=2):
    return BatchEffect(batch_size, 64, (), kept, None if kept is not None else "it says no")


def rows(**kept):
    free = [Option(name, per_sample=True, kept=value) for name, value in kept.items()]
    exact = [Option(name, per_sample=False, kept=1.0) for name in ("brn", "cbn", "frozen")]
    return [Option("bn", per_sample=False), *free, *exact]


@pytest.mark.parametrize(
    ("options", "seen", "batch_size", "answer"),
    [
        (rows(gn=0.99, frn=0.99), effect(0.95), 16, "bn"),
        (rows(gn=0.95, frn=0.96), effect(0.5), 2, "gn"),
        (rows(gn=0.90, frn=0.97), effect(0.5), 2, "frn"),
        (rows(gn=0.10, frn=0.10), effect(0.5), 2, "frozen"),
        (rows(gn=0.95), effect(None, 1), 1, "gn"),
        (rows(gn=None, frn=None), None, 32, "bn"),
    ],
)
def test_the_rule(options, seen, batch_size, answer):
    found = decide(options, seen, batch_size)
    assert found.target == answer
    assert found.reason


def test_without_images_it_says_what_it_cannot_know():
    net, x = hot()
    found = normswap.recommend(net, example_inputs=x[:1], batch_size=2, seconds=8)
    assert found.effect is None
    assert found.images == 0
    assert "Without images it is not known" in found.unknown[0]
    assert {o.target: o.kept for o in found.options}["brn"] == 1.0
    assert {o.target: o.kept for o in found.options}["gn"] is None
    assert found.options[1].predicted > 0
    assert found.options[1].memory > 0


def test_other_outputs_and_structured_inputs(recwarn):
    """Maps instead of classes, and batches of several parts."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, y):
            return {"out": self.bn(self.conv(x)).mean((1, 2, 3)) + y}

    parts = [(torch.randn(4, 3, 8, 8), torch.randn(4)) for _ in range(5)]
    found = normswap.recommend(Two(), parts, targets=("gn",), seconds=2)
    assert found.images == 20
    assert any("come in batches of several parts" in text for text in found.unknown)
    assert 0 <= found.options[1].kept <= 1


def test_a_target_that_cannot_stand_says_why():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False)).eval()
    found = normswap.recommend(net, torch.randn(32, 4), targets=("frozen", "brn"), seconds=2)
    assert "it has no running statistics" in found.options[1].note


def test_words_that_are_no_request():
    net, x = hot()
    with pytest.raises(CalibrationError, match="batch_size: got 0"):
        normswap.recommend(net, x, batch_size=0)
    with pytest.raises(CalibrationError, match="seconds: got inf"):
        normswap.recommend(net, x, seconds=float("inf"))
    with pytest.raises(PlanError, match="got 'gm'"):
        normswap.recommend(net, x, targets=("gm",))
    with pytest.raises(PlanError, match="at least one BatchNorm"):
        normswap.recommend(nn.Conv2d(3, 3, 1), torch.randn(8, 3, 4, 4))


def test_costs_in_a_budget_have_two_rounds_however_short():
    net, x = hot()
    found = compare(net, {"gn": "gn"}, x[:2], rounds=9, warmup=9, onnx=False, seconds=1e-9)
    assert found.rounds == 2


def test_a_large_batch_is_measured_at_a_smaller_one(monkeypatch):
    from normswap import recommendation

    net, x = hot()
    monkeypatch.setattr(recommendation, "step_seconds", lambda *_: 0.1)
    found = normswap.recommend(net, x, batch_size=64, targets=("frozen",), seconds=6)
    assert found.costs_at < 64
    assert any(f"measured at a batch of {found.costs_at}" in text for text in found.unknown)
    full = compare(net, {"frozen": "frozen"}, x[:64].clone(), rounds=1, onnx=False).rows[0].kept
    assert found.options[0].memory == pytest.approx(full, rel=0.02)


def test_it_is_written_as_a_picture_json_and_a_table(tmp_path):
    net, x = hot()
    found = normswap.recommend(net, x, targets=("gn",), seconds=1)
    assert found.write(tmp_path / "a.png").stat().st_size > 5000
    assert json.loads(found.write(tmp_path / "a.json").read_text())["target"] == found.target
    assert found.reason in found.write(tmp_path / "a.txt").read_text()


def test_the_command_ends_with_a_line_to_run(tmp_path, monkeypatch):
    (tmp_path / "hot_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--no-pretrained", "--image-size", "16", "--seconds", "1", "--to", "gn,frozen"]
    run = CliRunner().invoke(app, ["recommend", "python:hot_net:make", *options])
    assert run.exit_code == 0, run.stderr
    assert "recommended: " in run.stdout
    assert "note: Without images" in run.stdout
    last = run.stdout.splitlines()[-1]
    assert last.startswith(
        "next: normswap convert python:hot_net:make --no-pretrained --image-size"
    )
    found = CliRunner().invoke(app, ["recommend", "python:hot_net:make", *options, "--json"])
    assert json.loads(found.stdout)["batch_size"] == 2


def test_the_line_of_each_answer():
    from normswap.cli.options import ModelChoice
    from normswap.cli.recommend import _next

    chosen = ModelChoice("timm/resnet18.a1_in1k", None, True, None, None, 0, None)
    lines = {}
    for target, free in (("bn", False), ("frozen", False), ("gn(groups=8)", True)):
        found = SimpleNamespace(
            target=target, batch_size=4, options=(Option(target, per_sample=free),)
        )
        lines[target] = " ".join(map(str, _next(chosen, found, None)))
    spec = "timm/resnet18.a1_in1k"
    assert lines == {
        "bn": f"finetune {spec} --data DATA --batch-size 4 -o resnet18-a1_in1k-tuned",
        "frozen": f"convert {spec} --to frozen -o resnet18-a1_in1k-frozen",
        "gn(groups=8)": f"convert {spec} --to gn(groups=8) --calibrate IMAGES "
        "-o resnet18-a1_in1k-gn",
    }


def test_a_calibration_takes_longer_where_its_share_is_too_short(
    monkeypatch,
):
    from normswap import recommendation

    asked = []

    def impatient(*args, seconds, **options):
        asked.append(seconds)
        if len(asked) < 3:
            raise CalibrationError("seconds", got="few", need="more", hint="more")
        return normswap.calibrate(*args, seconds=seconds, **options)

    monkeypatch.setattr(recommendation, "calibrate", impatient)
    net, x = hot()
    found = normswap.recommend(net, x, targets=("gn",), seconds=1)
    assert [b / a for a, b in itertools.pairwise(asked)] == [2, 2]
    assert next(o for o in found.options if o.target == "gn").kept is not None


class Slow(nn.Module):
    """Takes time of a clock of its own for every image, more of it in training."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
        self.spend = lambda count: clock.append(clock.pop() + seconds * count)

    def forward(self, x):
        if not x.is_meta:
            self.spend(len(x) * (3 if torch.is_grad_enabled() else 1))
        return self.body(x)


@pytest.mark.parametrize("pace", [0.001, 0.02, 0.1, 0.4])
def test_the_time_is_held_however_slow_a_piece_is(pace):
    """Within half of it more, 5 s, and what is looked at once: 8 images, a batch, a few of two."""
    clock, told = [0.0], []
    torch.manual_seed(0)
    net, x = Slow(clock, pace).eval(), torch.randn(160, 3, 8, 8)
    found = normswap.recommend(
        net, x, batch_size=4, seconds=10, progress=told.append, clock=lambda: clock[0]
    )
    assert found.seconds == pytest.approx(clock[0])
    assert found.seconds <= 1.5 * 10 + 5 + 40 * pace
    assert ("It took" in found.over) == (found.seconds > 12)
    assert str(found).endswith(found.over or found.reason)
    shares = [now.share for now in told]
    assert shares == sorted(shares)
    assert all(now.share <= now.done / 10 + 1e-9 for now in told[:-1])  # no share ahead of time
    assert found.effect.judged >= 4
    if pace == 0.001:
        assert all(o.kept is not None for o in found.options[1:])
        assert all(o.inference is not None for o in found.options)
    if pace == 0.4:
        assert any("no time" in o.note for o in found.options)
        assert any("what each target costs was not measured" in text for text in found.unknown)
        assert not found.firm


def test_threads_that_begin_to_hinder_each_other_are_left_aside():
    clock, before = [0.0], torch.get_num_threads()
    net = Slow(clock, 0.001).eval()
    quick = net.spend

    def spend(count):
        hindered = clock[0] > 0.01 and torch.get_num_threads() > 1
        quick(count * (100 if hindered else 1))

    net.spend = spend
    torch.set_num_threads(2)
    try:
        found = normswap.recommend(
            net, torch.randn(160, 3, 8, 8), seconds=10, clock=lambda: clock[0]
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert any("Measured with one thread: 2 threads took 100 times" in t for t in found.unknown)
    assert found.seconds < 30
    assert found.effect.judged > 100
    assert all(o.images == 40 for o in found.options if o.per_sample)


def test_shares_are_of_images_that_no_calibration_saw(monkeypatch):
    from normswap import recommendation

    given = []

    def watched(model, teacher, images, **options):
        given.append(images)
        return normswap.calibrate(model, teacher, images, **options)

    monkeypatch.setattr(recommendation, "calibrate", watched)
    net, x = hot()
    found = normswap.recommend(net, x, targets=("gn", "frn"), seconds=4)
    shown = {o.target: o.images for o in found.options}
    assert shown == {"bn": 0, "gn": 24, "frn": 24}
    assert [len(images) for images in given] == [72, 72]
    assert torch.equal(*given)
    few = normswap.recommend(net, x[:40], targets=("gn",), seconds=2)
    assert len(given[-1]) == 40
    assert 0 < few.options[1].images <= 5


def test_a_calibration_that_does_not_end_is_ended(monkeypatch):
    from normswap import recommendation

    clock = [0.0]

    def endless(*_, **options):
        while True:
            clock[0] += 0.5
            options["clock"]()

    monkeypatch.setattr(recommendation, "calibrate", endless)
    net, x = hot()
    found = normswap.recommend(net, x, targets=("gn",), seconds=10, clock=lambda: clock[0])
    assert found.seconds <= 20
    gn = found.options[1]
    assert (gn.kept, gn.hurried, gn.images, gn.note) == (None, True, 24, "no time to calibrate")
    assert gn.matched is not None
    assert "It took" in found.over


def test_costs_end_at_once_when_the_time_is_over():
    net, x = hot()
    asked = itertools.count()
    found = compare(
        net, {"gn": "gn", "frn": "frn"}, x[:2], onnx=False, expired=lambda: next(asked) > 9
    )
    assert [row.target for row in found.rows] == ["bn", "gn", "frn"]
    assert [(row.training, row.inference) for row in found.rows] == [(None, None)] * 3
    asked = itertools.count()
    found = compare(
        net, {"gn": "gn", "frn": "frn"}, x[:2], onnx=False, expired=lambda: next(asked) > 0
    )
    assert [row.target for row in found.rows] == ["bn", "gn"]


def of(images, **kept):
    made = [Option(n, per_sample=True, kept=k, images=images) for n, k in kept.items()]
    return [*made, Option("frozen", per_sample=False, kept=1.0)]


@pytest.mark.parametrize(
    ("images", "kept", "answer", "firm"),
    [
        (256, {"gn": 0.80}, "gn", True),
        (8, {"gn": 1.0}, "gn", False),  # too few for anything
        (31, {"gn": 0.55}, "gn", False),  # may be below a half
        (31, {"gn": 0.48}, "frozen", False),
        (256, {"gn": 0.10}, "frozen", True),
        (32, {"gn": 0.78, "frn": 0.88}, "gn", True),  # within the error: nothing is decided
        (1000, {"gn": 0.78, "frn": 0.88}, "frn", True),
    ],
)
def test_a_difference_within_the_error_decides_nothing(images, kept, answer, firm):
    seen = BatchEffect(2, 256, (), 0.4, None, 256)
    found = decide(of(images, **kept), seen, 2)
    assert (found.target, found.firm) == (answer, firm)
    assert f"of {images} images" in found.reason
    assert ("Not firm" in found.reason) == (not firm)


@pytest.mark.parametrize(("judged", "firm"), [(2000, True), (64, False), (8, False)])
def test_batchnorm_stays_firmly_where_enough_images_say_so(judged, firm):
    found = decide(of(64, gn=0.9), BatchEffect(16, judged, (), 0.94, None, judged), 16)
    assert (found.target, found.firm) == ("bn", firm)
    assert f"of {judged} images" in found.reason


def test_the_reason_says_why_frozen_lost():
    sites = (SiteEffect("bn", 0.15, 0.2),)
    seen = BatchEffect(2, 256, sites, 0.4, None, 256)
    gn, frozen = of(256, gn=0.62)
    reason = decide([gn, frozen], seen, 2).reason
    assert "Frozen keeps all of them, needs no batch either, but its statistics stay" in reason
    assert "lie 0.15 running standard deviations" in reason
    steady = {"gn": Ratio(1.2, 1.3, 1.4, 9), "frozen": Ratio(0.8, 0.9, 0.95, 9)}
    pair = [replace(o, training=steady[o.target]) for o in (gn, frozen)]
    assert "costs less (0.90 beside 1.30)" in decide(pair, seen, 2).reason
    noisy = [replace(pair[0], training=Ratio(0.5, 1.3, 1.6, 9)), pair[1]]
    assert "costs less" not in decide(noisy, seen, 2).reason
    assert "rozen" not in decide([gn], seen, 2).reason


def test_a_target_without_time_for_a_calibration_is_judged_as_it_stands():
    hurried = Option("gn", per_sample=True, matched=0.9, images=64, hurried=True)
    frn = Option("frn", per_sample=True, kept=0.6, images=64)
    found = decide([hurried, frn, *of(0)], BatchEffect(2, 64, (), 0.4, None, 64), 2)
    assert (found.target, found.firm) == ("gn", False)
    assert "there was no time to calibrate gn" in found.reason
    assert "without calibration it keeps 90%" in found.reason


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (Ratio(0.9, 1.0, 1.1, 9), "1.00"),
        (Ratio(0.6, 1.0, 1.1, 9), "1.00?"),
        (Ratio(1.0, 1.0, 1.0, 2), "1.00?"),
    ],
)
def test_costs_that_are_noise_are_marked(ratio, shown):
    option = Option("gn", per_sample=True, matched=0.5, kept=0.75, training=ratio, images=33)
    found = Recommendation("gn", "", (option,), 2, (), None, 314, (), None, 2, 1.0)
    assert found.rows()[0][2:5] == ("50% of 33", "75% of 33", shown)
