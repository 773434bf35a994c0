import copy

import pytest
import torch
from test_calibration_closed_form import Net, images, trained
from torch import nn

import normswap
from normswap.calibration.unseen import _made_like, _patches, _white, scaled
from normswap.errors import PlanError, SwapError


@pytest.fixture(scope="module")
def teacher():
    return trained()


def plan(model, target="gn", init="steady"):
    return normswap.plan(model, target, example_inputs=images(2, 0), init=init)


def test_the_plan_says_which_producers_are_scaled(teacher):
    found = {entry.name: entry.scaled for entry in plan(teacher)}
    # bn4's input goes elsewhere too, bn5's convolution runs twice
    assert found == {"bn1": "stem", "bn2": "depth", "bn3": "up", "bn4": None, "bn5": None}
    assert "stem is scaled by channel" in str(plan(teacher))
    for target in ("frn", "brn", "in", "gn(channels_per_group=1)", "frozen"):
        assert all(entry.scaled is None for entry in plan(teacher, target))
    for init in ("match", "copy", "reset"):
        assert all(entry.scaled is None for entry in plan(teacher, init=init))
    assert {entry.init for entry in plan(teacher)} == {"match"}
    assert all(entry.scaled is None for entry in plan(Net()))  # nothing was trained


@torch.no_grad()
def interrupted(model, teacher, x):
    with scaled(model, plan(model), x):
        assert torch.allclose(model(x), teacher(x), rtol=1e-5, atol=1e-5)
        assert not torch.equal(model.stem.weight, teacher.stem.weight)
        raise KeyboardInterrupt


def test_the_rewritten_network_is_the_same_function_and_comes_back(teacher):
    model, x = copy.deepcopy(teacher), images(8, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, teacher, x)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("target", ["ln", "gn(groups=2)", "gn(groups=4)"])
def test_statistics_differ_less_between_samples_and_the_output_less_from_the_original(
    teacher, target
):
    model, x = copy.deepcopy(teacher), images(64, 9)
    matched = plan(teacher, target, init="match")
    plain = normswap.apply_plan(copy.deepcopy(teacher), matched).model
    ours = normswap.convert(model, target, example_inputs=x[:2], init="steady").model
    with torch.no_grad():
        truth = teacher(x)
        errors = [(m.eval()(x) - truth).square().mean() for m in (plain, ours)]
    assert errors[1] < errors[0]
    assert type(ours.bn1) is nn.GroupNorm
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_the_same_model_comes_out_twice_whatever_the_values_fed(teacher):
    made = []
    for x in (images(2, 0), images(2, 7)):
        model = copy.deepcopy(teacher)
        normswap.convert(model, "gn", example_inputs=x, init="steady")
        made.append(model.state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_what_is_frozen_or_tied_is_not_scaled(teacher):
    model = copy.deepcopy(teacher)
    model.stem.weight.requires_grad_(False)
    model.bn2.weight = model.bn3.weight = nn.Parameter(torch.ones(8))
    model.bn3 = copy.deepcopy(teacher).bn3
    model.head.extra = model.bn2.weight  # γ that somebody else holds too
    found = {entry.name: entry.scaled for entry in plan(model)}
    assert found["bn1"] is None
    assert found["bn2"] is None
    assert found["bn3"] == "up"


def test_a_passage_begins_at_the_original_and_a_plan_may_be_read_again(teacher):
    x = images(8, 5)
    found = normswap.Plan.from_json(plan(teacher).to_json())
    assert found == plan(teacher)
    model = normswap.convert(copy.deepcopy(teacher), found, example_inputs=x).model.eval()
    with torch.no_grad():
        normswap.Passage(model, steps=10)
        assert torch.allclose(model(x), teacher(x), rtol=1e-4, atol=1e-4)


def test_a_plan_that_is_applied_has_its_steady_scales_or_says_what_it_lacks(teacher):
    x = images(8, 5)
    model = copy.deepcopy(teacher)
    with pytest.raises(PlanError, match="need what the model is called with"):
        normswap.apply_plan(model, plan(teacher))
    assert torch.equal(model.stem.weight, teacher.stem.weight)
    assert type(model.bn1) is nn.BatchNorm2d
    found = normswap.apply_plan(model, plan(teacher), example_inputs=x[:2]).model
    wanted = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=x[:2], init="steady")
    state = wanted.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert not torch.equal(found.stem.weight, teacher.stem.weight)


def test_a_plan_that_names_another_module_is_refused_and_nothing_moves(teacher):
    data = plan(teacher).to_json()
    data["entries"][0]["scaled"] = "head"
    model = copy.deepcopy(teacher)
    with pytest.raises(SwapError, match="8 channels that the plan was made for"):
        normswap.convert(model, normswap.Plan.from_json(data), example_inputs=images(2, 0))
    assert torch.equal(model.stem.weight, teacher.stem.weight)
    assert torch.equal(model.bn1.running_var, teacher.bn1.running_var)


def test_made_samples_have_the_form_of_the_inputs():
    draw = torch.Generator().manual_seed(0)
    for made in (_white, _patches):
        for shape in ((1, 2, 9), (2, 3, 8, 8), (1, 1, 4, 4, 4)):
            batch = _made_like(torch.zeros(shape), made, draw, 2)
            assert batch.shape == (128, *shape[1:])
            assert batch.isfinite().all()
        listed = _made_like([torch.zeros(3, 8, 8)], made, draw, 2)
        assert len(listed) == 128
        assert listed[0].shape == (3, 8, 8)
        assert len(_made_like((torch.zeros(1, 3, 8, 8),), made, draw, 2)) == 1
        assert _made_like(torch.zeros(1, 3, 224, 50), made, draw, 2).shape[1:] == (3, 112, 50)
        assert _made_like(torch.zeros(1, 3, 224, 50), made, draw, 1).shape[1:] == (3, 224, 50)
        for other in (torch.zeros(1, 3), torch.zeros(1, 3, 8, dtype=torch.long), {}, None, "x"):
            assert _made_like(other, made, draw, 2) is None


def test_a_model_of_one_size_gets_its_scales_from_samples_of_that_size():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 62 * 62, 2),
    )  # fmt: skip
    x = torch.randn(4, 3, 64, 64)
    net.train()(x)
    net.eval()
    before = net[0].weight.clone()
    found = normswap.convert(net, "gn(groups=2)", example_inputs=x[:1], init="steady")
    assert [entry.scaled for entry in found.plan] == ["0"]
    assert not torch.equal(net[0].weight, before)


def test_a_finished_plan_is_carried_out_or_says_what_it_lacks(teacher):
    x = images(2, 0)
    models = [copy.deepcopy(teacher) for _ in range(2)]
    with pytest.raises(PlanError, match="example_inputs"):
        normswap.convert(models[0], plan(teacher))
    normswap.convert(models[0], plan(teacher), example_inputs=x)
    normswap.convert(models[1], "gn", example_inputs=x, init="steady")
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, y):
        return self.bn(self.conv(x + y))


def test_what_takes_no_made_up_samples_is_said_to_be_matched(caplog):
    x = images(2, 0)
    model = Two()
    for _ in range(20):
        model.train()(x, x)
    before = model.conv.weight.clone()
    normswap.convert(model.eval(), "gn", example_inputs=(x, x), init="steady")
    assert "bn: matched without steady scales" in caplog.text
    assert torch.equal(model.conv.weight, before)
