import copy
import json

import pytest
import torch
from PIL import Image
from test_calibration_closed_form import Net, images, trained
from torch import nn

import normswap
from normswap import keeping
from normswap.calibration import moments_alone, solve_alone
from normswap.errors import PlanError
from normswap.keeping import _first_half, _Guess, kept_share
from normswap.planning import Plan
from normswap.site_costs import cheapest_first, cost_of, slopes_of


@pytest.fixture(scope="module")
def teacher():
    net = trained()
    net.head.weight.data *= 20  # decisions of which it is sure
    return net


def kept(teacher, keep, target="gn", **options):
    model = copy.deepcopy(teacher)
    options = {"example_inputs": images(2, 0), "images": images(128, 1)} | options
    return normswap.convert(model, target, keep=keep, **options)


def test_everything_is_kept_where_everything_is_asked_for(teacher):
    result = kept(teacher, 1.0)
    share, _ = kept_share(result.model, teacher, [images(64, 9)])
    assert result.bound == 1.0
    assert share > 0.95
    assert "frozen" in result.plan.counts()


@pytest.mark.parametrize("target", ["gn", "frn"])
def test_less_is_kept_with_more_converted(teacher, target):
    few, many = kept(teacher, 0.97, target), kept(teacher, 0.5, target)
    assert few.bound >= 0.97
    assert many.bound >= 0.5
    assert few.plan.counts().get(target, 0) <= many.plan.counts()[target]
    assert few.model is not teacher
    share, _ = kept_share(many.model, teacher, [images(64, 9)])
    assert share >= 0.4


def one_site_alone(teacher, model, name, producer, x):
    """The teacher with one site (and its producer) of the model, its γ and β the best there are."""
    one, layer, outputs, inputs = copy.deepcopy(teacher), copy.deepcopy(model), [], []
    layer = getattr(layer, name)
    handle = getattr(one, name).register_forward_hook(lambda *call: outputs.append(call[2]))
    one(x)
    handle.remove()
    if producer:  # the scaled convolution goes with its norm
        getattr(one, producer).load_state_dict(getattr(model, producer).state_dict())
    handle = getattr(one, name).register_forward_hook(lambda *call: inputs.append(call[1][0]))
    one(x)
    handle.remove()
    normal = nn.functional.group_norm(inputs[0], 1, eps=layer.eps)
    for c in range(normal.shape[1]):
        a, b = normal[:, c].flatten(), outputs[0][:, c].flatten()
        slope = ((a - a.mean()) * (b - b.mean())).mean() / (a - a.mean()).square().mean()
        layer.weight[c], layer.bias[c] = slope, b.mean() - slope * a.mean()
    setattr(one, name, layer)
    return one


def test_sites_whose_errors_cancel_come_before_those_whose_errors_agree():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, generator=draw)
    slopes = {"a": a, "like a": 1.01 * a, "other": 1.2 * b}
    order, costs = cheapest_first(slopes)
    assert order == ["a", "other", "like a"]
    assert costs == sorted(costs)
    against = {"a": a, "other": 1.05 * b, "against": -1.1 * a}
    assert cheapest_first(against)[0] == ["a", "against", "other"]
    never = {"never": torch.empty(0), **slopes}
    assert cheapest_first(never)[0][-1] == "never"
    assert cost_of(torch.empty(0)) == float("inf")
    twice = {**slopes, "twice": torch.cat([a, a]) / 2}
    assert cheapest_first(twice)[0][0] == "twice"


def test_costs_are_what_one_site_alone_does_to_the_softmax(teacher):
    """Against the divergence itself, with that one site converted and all else exact."""
    x = images(48, 5)
    producers = {"bn1": "stem", "bn2": "depth", "bn3": "up", "bn4": None, "bn5": None}
    small = copy.deepcopy(teacher)
    small.head.weight.data /= 20  # where the second order is enough
    model = normswap.convert(copy.deepcopy(small), "ln", example_inputs=x[:2]).model
    seen = moments_alone(model, small, [x], torch.Generator())
    scaled, draw = solve_alone(model, small, [x], seen), torch.Generator().manual_seed(0)
    slopes = slopes_of(list(producers), model, scaled, small, [x], draw)
    found = {name: cost_of(values) for name, values in slopes.items()}
    with torch.no_grad():
        truth = small(x).log_softmax(1)
        for name, producer in producers.items():
            ours = one_site_alone(small, model, name, producer, x)(x).log_softmax(1)
            cost = nn.functional.kl_div(ours, truth, log_target=True, reduction="batchmean")
            assert 0.4 * cost < found[name] < 2.5 * cost, name


def test_the_plan_remembers_costs_and_reasons_and_converts_again(teacher):
    result = kept(teacher, 0.95)
    again = Plan.from_json(result.plan.to_json())
    assert again == result.plan
    assert set(result.costs) == {entry.name for entry in again if entry.cost is not None}
    frozen = [entry for entry in again if entry.becomes == "frozen"]
    assert all("decisions" in entry.reason for entry in frozen)
    twin = normswap.convert(copy.deepcopy(teacher), again, example_inputs=images(2, 0)).model
    twin.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(images(4, 3)), result.model.eval()(images(4, 3)))


def test_the_dearest_sites_are_the_frozen_ones(teacher):
    result = kept(teacher, 0.93)
    became = {entry.name: entry.becomes for entry in result.plan}
    frozen = [cost for name, cost in result.costs.items() if became[name] == "frozen"]
    rest = [cost for name, cost in result.costs.items() if became[name] != "frozen"]
    assert not (frozen and rest) or min(frozen) >= max(rest)
    assert [row[0] for row in result.rows] == sorted(result.costs, key=result.costs.get)
    assert "original's decisions kept" in result.summary


def test_costs_are_written_as_picture_data_and_table(teacher, tmp_path):
    result = kept(teacher, 0.5)
    assert result.write(tmp_path / "costs.png").stat().st_size > 1000
    facts = json.loads(result.write(tmp_path / "costs.json").read_text())
    assert facts["costs"] == result.costs
    table = result.write(tmp_path / "costs.txt").read_text()
    assert all(name in table for name in result.costs)


def test_keep_on_the_command_line(tmp_path):
    from click.testing import CliRunner

    from normswap.cli.app import app

    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = (torch.rand(40, 40, 3, generator=draw) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    spec = ["python:test_keeping:small", "--image-size", "32"]
    argv = ["convert", *spec, "--to", "gn", "--calibrate", str(folder), "--keep", "90"]
    argv += ["-o", str(out), "--costs", str(tmp_path / "costs.txt")]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    assert "original's decisions kept" in result.output
    assert (tmp_path / "costs.txt").read_text().count("\n") > 3
    plan = json.loads((out / "normswap.json").read_text())["plans"][0]
    assert all(entry["cost"] is not None for entry in plan["entries"])
    wrong = CliRunner().invoke(app, ["convert", *spec, "--to", "gn", "--keep", "90", "-o", "x"])
    assert wrong.exit_code == 2
    assert "--keep goes with --calibrate IMAGES" in wrong.output


def small():
    return trained()


def test_a_target_that_is_exact_needs_no_search(teacher):
    result = kept(teacher, 0.99, "brn")
    assert result.plan.counts() == {"brn": 5}
    assert not result.costs


def test_the_model_stays_where_it_cannot_be_done(teacher):
    model = copy.deepcopy(teacher)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(normswap.NormSwapError):
        normswap.convert(
            model, "gn", example_inputs=images(2, 0), keep=0.9, images=torch.zeros(32, 5, 16, 16)
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 95, "images": 1}, "at most 1. Try keep=0.95"),
        ({"keep": True, "images": 1}, "keep"),
        ({"keep": 0.9}, "images: got None"),
        ({"images": 1}, "images without keep"),
        ({"keep": 0.9, "images": 1, "seconds": 0}, "seconds"),
    ],
)
def test_requests_that_mean_nothing(options, match):
    with pytest.raises(PlanError, match=match):
        normswap.convert(Net(), "gn", example_inputs=images(2, 0), **options)


def test_halves_share_no_class_and_are_as_large_as_that_allows():
    first = _first_half([3] * 5 + [1] * 4 + [7] * 2 + [9])
    assert first.tolist() == [True] * 5 + [False] * 4 + [False] * 2 + [True]


@pytest.mark.parametrize("count", [1, 2, 3, 9, 17])
def test_every_image_judges_once_whatever_their_number(teacher, count):
    x = images(count, 1)
    same = x[:1].repeat(count, 1, 1, 1)  # one class: the halves have to share it
    for given, number in ((x, count), (same, count), ([x], count), ([x, same], 2 * count)):
        assert kept(teacher, 0.5, images=given).images == number


def test_where_time_is_short_the_search_does_not_end_with_nothing_in_hand(teacher, monkeypatch):
    monkeypatch.setattr(keeping, "_LOST", 1e-6)  # the first guess is every layer
    now, tried = [0.0], []
    probe = keeping._Chooser._tried

    def late(chooser, order, count, folds):
        now[0] += 1000.0
        tried.append(count)
        return probe(chooser, order, count, folds)

    monkeypatch.setattr(keeping._Chooser, "_tried", late)
    result = kept(teacher, 0.8, seconds=100, clock=lambda: now[0])
    assert tried[0] == 5
    assert 1 < len(tried) <= 4
    assert result.bound >= 0.8
    assert result.plan.counts().get("gn", 0) > 0


def test_the_search_goes_by_what_was_lost_before():
    costs = [0.001 * (k + 1) ** 2 for k in range(40)]  # the root grows evenly with the count
    guess = _Guess(costs, keep=0.9)
    images = 10**6  # no margin to speak of
    first = guess.between(1, 40, images)
    assert first == 4  # 0.75 · √0.016 < 0.1 < 0.75 · √0.025
    guess.learn(first, 0.02)  # a fifth of what may be lost
    assert guess.between(first + 1, 40, images) == pytest.approx(20, abs=1)
    guess.learn(20, 0.0)
    assert guess.between(21, 40, images) == 40
    guess.learn(40, 0.9)
    assert guess.between(21, 39, images) == 21
    assert _Guess([float("inf")], 0.9).between(0, 1, 100) == 0
