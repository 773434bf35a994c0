import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import normswap
from normswap.calibration import calibrate
from normswap.drift import measure_drift
from normswap.errors import CalibrationError


class Net(nn.Module):
    """Depthwise and dense convolutions, a module that is used in place, dropout, a head."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.form = form
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 5)

    def forward(self, x, scale=1.0):
        x = self.relu1(self.bn1(self.conv1(x * scale)))
        x = self.relu2(self.bn2(self.conv2(x)))
        dense = self.bn3(self.conv3(x))
        y = self.head(self.drop(dense.mean((2, 3))))
        forms = {
            "tensor": lambda: y,
            "tuple": lambda: (y, dense),
            "dict": lambda: {"out": dense, "more": [y, None]},
            "none": lambda: len(x),
        }
        return forms[self.form]()


def images(count, seed):
    draw = torch.Generator().manual_seed(seed)
    loud = 0.3 + torch.rand(count, 3, 1, 1, generator=draw)
    coarse = torch.randn(count, 3, 4, 4, generator=draw)
    smooth = nn.functional.interpolate(coarse, 12, mode="bilinear", align_corners=False)
    return loud * (smooth + 0.3 * torch.randn(count, 3, 12, 12, generator=draw))


def pair(target, form="tensor", **options):
    torch.manual_seed(0)
    teacher = Net(form).train()
    with torch.no_grad():
        for i in range(50):
            teacher(images(32, 100 + i))
        for bn in (teacher.bn1, teacher.bn2, teacher.bn3):
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.uniform_(-0.5, 0.5)
    model = copy.deepcopy(teacher.eval())
    return normswap.convert(model, target, example_inputs=images(2, 0), **options).model, teacher


def values(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in now.items())


@pytest.mark.parametrize("target", ["gn", "ln", "frn", "in"])
def test_it_brings_the_model_closer_on_images_it_has_not_seen(target):
    model, teacher = pair(target)
    fresh = images(128, 7)
    before = measure_drift(model, teacher, fresh).output_error
    report = calibrate(model, teacher, images(256, 1), steps=80, seconds=60)
    after = measure_drift(model, teacher, fresh).output_error
    assert after < 0.9 * before
    assert report.best_loss < report.first_loss
    assert (report.steps, report.stopped) == (80, "steps") or report.stopped == "plateau"


def test_the_closed_form_gives_every_site_the_moments_of_the_original():
    model, teacher = pair("gn", init="copy")
    x = images(14, 1)  # fewer than 16: nothing is held out, all images make the moments
    calibrate(model, teacher, x, steps=0)
    with torch.no_grad():
        ours, theirs = model.bn1(model.conv1(x)), teacher.bn1(teacher.conv1(x))
        assert torch.allclose(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=1e-4)
        ratio = ours.std((0, 2, 3)) / theirs.std((0, 2, 3))
        assert ((ratio > 0.6) & (ratio < 1.01)).all()  # least squares would shrink, matching not
        ours = model.bn2(model.conv2(model.relu1(ours.clone())))
        theirs = teacher.bn2(teacher.conv2(teacher.relu1(theirs.clone())))
        assert torch.allclose(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=1e-3)


def test_only_the_replaced_layers_move():
    model, teacher = pair("frn", exclude="bn2")
    model.bn1.tau.data.fill_(0.5)
    before, original = values(model), values(teacher)
    calibrate(model, teacher, images(256, 1), steps=120)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"bn1.weight", "bn1.bias", "bn1.tau", "bn3.weight", "bn3.bias"}
    assert model.bn1.tau.mean() < 0.5
    assert same(teacher, original)


def test_all_parameters_move_if_asked_and_running_statistics_never():
    model, teacher = pair("gn", exclude="bn2")
    model.conv3.weight.requires_grad_(False)
    before, original = values(model), values(teacher)
    calibrate(model, teacher, images(256, 1), steps=20, parameters="all")
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"conv1.weight", "head.weight", "bn2.weight"} <= moved
    assert not any(k.startswith("bn2.running") or k == "conv3.weight" for k in moved)
    assert same(teacher, original)


def test_flags_hooks_gradients_and_random_numbers_are_as_before():
    model, teacher = pair("gn")
    model.train()
    model.drop.eval()
    model.conv1.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(5)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    calibrate(model, teacher, images(32, 1), steps=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.drop.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model.head.bias.grad, torch.ones(5))
    assert model.bn1.weight.grad is None
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_failure_leaves_the_model_untouched():
    model, teacher = pair("frn")
    before = values(model)
    calls = []

    def explode(now):
        calls.append(now.share)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, teacher, images(32, 1), steps=20, progress=explode)
    assert len(calls) == 1
    assert same(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_numbers_that_are_not_finite_end_it_in_the_best_state():
    model, teacher = pair("gn")
    x = images(64, 1)
    x[3] = 3e38  # a training image that overflows: the held-out part stays clean
    report = calibrate(model, teacher, x, steps=50)
    assert report.stopped == "not finite"
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert report.best_loss <= report.first_loss


def test_images_that_are_not_finite_are_refused():
    model, teacher = pair("gn")
    before = values(model)
    broken = images(32, 1)
    broken[20, 0, 0, 0] = float("nan")
    for form in (broken, [broken[:16], broken[16:]], [(broken,)]):
        with pytest.raises(CalibrationError, match="not finite"):
            calibrate(model, teacher, form, steps=5)
    assert same(model, before)


@pytest.mark.parametrize("form", ["tuple", "dict", "none"])
def test_outputs_of_any_structure(form):
    model, teacher = pair("gn", form)
    report = calibrate(model, teacher, images(64, 1), steps=20)
    assert report.best_loss < report.first_loss


@pytest.mark.parametrize("kind", ["generator", "sizes", "positional", "keywords", "dicts"])
def test_images_of_any_structure(kind):
    model, teacher = pair("gn")
    parts = [images(8, i) for i in range(4)]
    given = {
        "generator": (part for part in parts),
        "sizes": [parts[0], parts[1][:, :, :10, :10], parts[2]],
        "positional": [(part, 1.1) for part in parts],
        "keywords": [{"x": part, "scale": 1.1} for part in parts],
        "dicts": [{"x": part} for part in parts],
    }[kind]
    report = calibrate(model, teacher, given, steps=20)
    assert report.best_loss < report.first_loss
    assert report.images == (24 if kind == "sizes" else 32)


def test_the_same_seed_gives_the_same_model():
    found = []
    for seed in (0, 0, 1):
        model, teacher = pair("frn")
        calibrate(model, teacher, images(256, 1), steps=20, seed=seed)
        found.append(model.bn1.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_budget_is_kept():
    model, teacher = pair("gn")
    now = [0.0]

    def clock():
        now[0] += 0.1
        return now[0]

    report = calibrate(model, teacher, images(32, 1), seconds=20, clock=clock)
    assert report.seconds <= 21
    assert report.stopped in ("budget", "plateau")
    assert report.steps > 20


def test_no_trace_stays_in_the_model():
    model, teacher = pair("frn")
    eps = [model.bn1.eps, model.bn2.eps]
    kinds = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    calibrate(model, teacher, images(32, 1), steps=5)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert [model.bn1.eps, model.bn2.eps] == eps
    assert model.bn1(torch.randn(2, 8, 4, 4)).requires_grad


def test_a_learnable_epsilon_does_not_move():
    model, teacher = pair(normswap.FilterResponseNorm(learnable_eps=True))
    before = model.bn1.eps_l.detach().clone()
    calibrate(model, teacher, images(32, 1), steps=5)
    assert torch.equal(model.bn1.eps_l, before)


def test_a_tied_layer_and_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.alias = self.bn

        def forward(self, x):
            return self.alias(self.conv(self.bn(self.conv(x)).relu()))

    torch.manual_seed(0)
    teacher = Twice().train()
    for i in range(30):
        teacher(images(16, i))
    model = copy.deepcopy(teacher.eval())
    model = normswap.convert(model, "gn", example_inputs=images(2, 0)).model
    report = calibrate(model, teacher, images(64, 1), steps=40)
    assert model.alias is model.bn
    assert report.best_loss < report.first_loss


def test_fused_activations():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    teacher = timm.create_model("mobilenetv2_050", num_classes=3).train()
    for i in range(5):
        teacher(images(16, i).repeat(1, 1, 4, 4))
    model = copy.deepcopy(teacher.eval())
    x = images(16, 50).repeat(1, 1, 4, 4)
    model = normswap.convert(model, "frn", example_inputs=x[:2]).model
    report = calibrate(model, teacher, x, steps=3)
    assert report.best_loss < report.first_loss


def test_report(caplog):
    model, teacher = pair("gn")
    report = calibrate(model, teacher, images(32, 1), steps=2)
    text = json.dumps(report.to_json())
    assert json.loads(text)["images"] == 32
    assert "calibrated on 32 images" in str(report)
    entry = normswap.provenance.provenance_of(model).history[-1]
    assert entry["step"] == "calibrated"
    assert entry["steps"] == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seconds": 0}, "seconds: got 0"),
        ({"parameters": "some"}, "parameters: got 'some'"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_options_are_checked_first(options, match):
    model, teacher = pair("gn")
    with pytest.raises(CalibrationError, match=match):
        calibrate(model, teacher, images(4, 1), **options)


def test_nothing_to_calibrate():
    _, teacher = pair("gn")
    with pytest.raises(CalibrationError, match="nothing was replaced"):
        calibrate(copy.deepcopy(teacher), teacher, images(4, 1))
    model, _ = pair("gn")
    with pytest.raises(CalibrationError, match="images: got none"):
        calibrate(model, teacher, [])


class Slow:
    """A clock that runs while a model works: so many seconds per image and forward pass."""

    def __init__(self, seconds, *models):
        self.now, self.seconds = 0.0, seconds
        for model in models:
            model.register_forward_pre_hook(self._tick)

    def _tick(self, _module, args):
        self.now += self.seconds * len(args[0])

    def __call__(self):
        return self.now


def test_a_slow_model_keeps_the_time_too():
    model, teacher = pair("gn")
    clock = Slow(0.1, model, teacher)
    report = calibrate(model, teacher, images(512, 1), seconds=100, batch_size=8, clock=clock)
    assert clock.now < 115
    assert report.steps > 10


def test_a_budget_that_is_too_small_is_refused_with_what_is_needed():
    model, teacher = pair("gn")
    clock = Slow(0.05, model, teacher)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="too few for this model") as caught:
        calibrate(model, teacher, images(64, 1), seconds=5, clock=clock)
    assert clock.now < 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    need = float(re.search(r"about ([\d.]+) s", str(caught.value))[1])
    for more in (1.0, 1.2):
        model, teacher = pair("gn")
        clock = Slow(0.05, model, teacher)
        report = calibrate(model, teacher, images(64, 1), seconds=more * need, clock=clock)
        assert clock.now <= 1.1 * more * need
        assert report.after.output_error <= report.before.output_error


@pytest.mark.parametrize("parameters", ["norms", "producers", "all"])
@pytest.mark.parametrize("seconds", [11, 15])
def test_a_slow_model_never_takes_a_tenth_more(seconds, parameters):
    """A step that no longer fits is not begun; half a budget was spent on the last one."""
    model, teacher = pair("gn")
    clock = Slow(0.05, model, teacher)
    calibrate(model, teacher, images(256, 1), seconds=seconds, parameters=parameters, clock=clock)
    assert clock.now <= 1.1 * seconds


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 9, "best_loss": 0.5, "stopped": "plateau"}, None),
        ({"steps": 0, "best_loss": 0.5, "stopped": "steps"}, None),
        ({"steps": 0, "best_loss": 0.5}, r"time was up before the first step: try more"),
        ({"steps": 0, "best_loss": 1.0}, r"it began: try more time, --calibrate-seconds 33"),
        ({"steps": 9, "best_loss": 1.0, "stopped": "plateau"}, r"ends where it began: try other"),
    ],
)  # fmt: skip
def test_a_report_of_nothing_says_what_to_do(changes, said):
    model, teacher = pair("gn")
    report = calibrate(model, teacher, images(32, 1), steps=1)
    facts = {"first_loss": 1.0, "seconds": 10.2, "stopped": "budget"} | changes
    text = str(replace(report, **facts))
    assert ("Note that" in text) == (said is not None)
    assert said is None or re.search(said, text)
    assert "measured on 4 of them that were held out" in text


@pytest.mark.parametrize(("count", "held_out"), [(10, False), (16, True)])
def test_the_report_says_whether_the_images_were_held_out(count, held_out):
    model, teacher = pair("gn")
    report = calibrate(model, teacher, images(count, 1), seconds=5, steps=2)
    assert report.held_out is held_out
    assert ("measured on the images that it was calibrated on" in str(report)) is not held_out


def test_time_spent_on_reading_images_is_charged_once():
    model, teacher = pair("gn")
    clock = Slow(0.001, model, teacher)

    def reading():
        for seed in range(4):
            clock.now += 10
            yield images(8, seed)

    report = calibrate(model, teacher, reading(), seconds=60, clock=clock)
    assert report.steps > 10
    assert clock.now < 62


def test_a_layer_without_parameters_leaves_nothing_to_move():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).eval()
    model = normswap.convert(copy.deepcopy(net), "brn", example_inputs=images(2, 0)).model
    assert calibrate(model, net, images(32, 0)).stopped == "nothing to move"


@pytest.mark.parametrize(
    "labels",
    [
        (),
        (torch.zeros(8, dtype=torch.long),),
        (torch.zeros(8, 5),),
        (torch.zeros(8, 12, 12, dtype=torch.long), torch.arange(8)),
    ],
)
def test_batches_of_a_data_loader_with_and_without_labels(labels):
    model, teacher = pair("gn")
    loader = [[images(8, seed), *labels] for seed in range(3)]
    report = calibrate(model, teacher, loader, steps=2)
    assert report.steps == 2
    assert report.images == 24


def test_images_that_the_model_does_not_take_are_one_clear_error():
    model, teacher = pair("gn")
    before = values(model)
    with pytest.raises(CalibrationError, match=r"from the model.*\(N, C, H, W\)"):
        calibrate(model, teacher, torch.zeros(20, 7, 9, 9), steps=2)
    assert same(model, before)


def test_it_works_without_gradients_around_it_and_in_float64():
    model, teacher = pair("gn")
    with torch.no_grad():
        report = calibrate(model.double(), teacher.double(), images(32, 1).double(), steps=5)
    assert report.steps == 5
    assert report.best_loss < report.first_loss


class Editing(nn.Module):
    """Centres its input in place, as some preprocessing wrappers do."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x.sub_(1))


def test_a_model_that_writes_into_its_input_changes_no_image():
    model, teacher = (Editing(m) for m in pair("brn"))
    x = images(16, 1)
    kept = x.clone()
    assert measure_drift(model, teacher, x).output_error == 0
    assert torch.equal(x, kept)


def test_outputs_that_are_empty_on_both_sides_do_not_count():
    class Detector(Editing):
        def forward(self, x):
            y = self.inside(x)
            return {"boxes": y.new_empty(0, 4), "scores": y}

    model, teacher = (Detector(m) for m in pair("gn"))
    report = calibrate(model, teacher, images(32, 1), steps=3)
    assert report.steps == 3
    assert report.best_loss < report.first_loss


class Keyword(Net):
    def forward(self, x):
        x = self.relu1(self.bn1(input=self.conv1(x)))
        return self.head(self.bn3(input=self.conv3(x)).mean((2, 3)))


def test_norms_that_get_their_input_by_keyword():
    torch.manual_seed(0)
    teacher = Keyword().eval()
    x = images(32, 1)
    model = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=x).model
    report = calibrate(model, teacher, x, steps=5)
    assert report.after.output_error <= report.before.output_error


def test_calibration_inside_inference_mode():
    model, teacher = pair("gn")
    with torch.inference_mode():
        report = calibrate(model, teacher, images(32, 1), steps=3)
    assert report.steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": float("inf")}, "finite"),
        ({"steps": -1}, "0 or more"),
        ({"images": torch.empty(0, 3, 12, 12)}, "got none"),
    ],
)
def test_requests_without_sense(options, message):
    model, teacher = pair("gn")
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, teacher, **{"images": images(32, 1), **options})
