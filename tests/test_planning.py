from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from traps import TRAPS, built

import normswap
from normswap.errors import NormSwapError, PlanError
from normswap.recipes import recipe_for
from normswap.recipes.group_norm import nearest_groups
from normswap.targets import TARGETS


def net(channels=8, **kwargs):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels, **kwargs), nn.ReLU()
    )


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_has_a_plan_that_survives_json(name, target):
    plan = normswap.plan(built(name), target, example_inputs=TRAPS[name].inputs)
    assert normswap.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert {e.name for e in plan} == set(TRAPS[name].answers)
    for entry in plan:
        assert entry.becomes == target or entry.reason
    assert str(plan).count("\n") >= len(plan)


@pytest.mark.parametrize("name", TRAPS)
def test_frn_takes_the_relu_exactly_where_it_may(name):
    plan = normswap.plan(built(name), "frn", example_inputs=TRAPS[name].inputs)
    for entry in plan:
        if entry.becomes == "frn":
            how = entry.removal.how if entry.removal else None
            assert how == TRAPS[name].answers[entry.name].relu


@pytest.mark.parametrize("name", TRAPS)
def test_cbn_is_wired_exactly_where_it_may(name):
    plan = normswap.plan(built(name), "cbn", example_inputs=TRAPS[name].inputs)
    for entry in plan:
        answer = TRAPS[name].answers[entry.name]
        wired = answer.producer is not None if answer.cbn is None else answer.cbn
        if answer.calls == 0:
            assert entry.becomes == "keep"
        else:
            assert (entry.becomes, entry.producer) == (
                ("cbn", answer.producer) if wired else ("brn", None)
            )


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (32, 16), (40, 20), (72, 24), (24, 12), (7, 1), (1, 1), (480, 32), (2, 1), (96, 32)],
)
def test_default_groups_divide_and_leave_two_channels(channels, groups):
    assert nearest_groups(channels) == groups
    entry = normswap.plan(net(channels), "gn", example_inputs=X).entries[0]
    assert entry.recipe["groups"] == groups


def test_groups_that_do_not_divide_are_an_error_with_the_divisors():
    with pytest.raises(PlanError, match=r"1: got groups=32 for 20 channels; .*groups=10 or 20"):
        normswap.plan(net(20), normswap.GroupNorm(groups=32), example_inputs=X)


def test_groups_follow_the_statistics_of_a_trained_norm_and_the_paper_without():
    model = net(64)
    assert normswap.plan(model, "gn", example_inputs=X).entries[0].recipe["groups"] == 32
    model[1].running_mean.normal_()
    trained = normswap.plan(model, "gn", example_inputs=X).entries[0].recipe["groups"]
    paper = normswap.plan(model, normswap.GroupNorm(groups=None), example_inputs=X)
    assert trained < 32
    assert paper.entries[0].recipe["groups"] == 32


def test_automatic_groups_keep_a_quiet_channel_away_from_a_loud_one():
    model = net(8)
    model[1].running_var.copy_(torch.tensor([1.0, 1, 1, 1, 1e4, 1e4, 1e4, 1e4]))
    entry = normswap.plan(model, normswap.GroupNorm(groups="auto"), example_inputs=X).entries[0]
    assert entry.recipe["groups"] in (2, 4)


@pytest.mark.parametrize("target", ["gn", "ln", "in", "frn"])
def test_small_maps_and_vectors_take_the_fallback(target):
    small = torch.zeros(2, 3, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    for inputs, why in ((small, "1x1"), (torch.zeros(2, 3, 1, 3), "1x3")):
        entry = normswap.plan(model, target, example_inputs=inputs).entries[0]
        assert entry.becomes == "frozen"
        assert why in entry.reason
    assert normswap.plan(model, target, example_inputs=torch.zeros(2, 3, 2, 2)).kept == {}
    kept = normswap.plan(model, target, example_inputs=small, fallback="keep")
    assert "1x1" in kept.kept["1"]
    vector = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    entry = normswap.plan(vector, target, example_inputs=torch.zeros(2, 3)).entries[0]
    assert entry.becomes == "frozen"
    assert "(N, C)" in entry.reason


def test_frn_with_learnable_eps_takes_small_maps():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    recipe = normswap.FilterResponseNorm(learnable_eps="auto")
    entry = normswap.plan(model, recipe, example_inputs=torch.zeros(2, 3, 1, 1)).entries[0]
    assert entry.becomes == "frn"
    assert entry.recipe["learnable_eps"] is True
    assert (
        normswap.plan(model, recipe, example_inputs=X).entries[0].recipe["learnable_eps"] is False
    )


def test_fallback_error_and_fallback_recipe():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    small = torch.zeros(2, 3, 1, 1)
    with pytest.raises(PlanError, match="1x1"):
        normswap.plan(model, "gn", example_inputs=small, fallback="error")
    recipe = normswap.BatchRenorm(r_max=2.0)
    entry = normswap.plan(model, "gn", example_inputs=small, fallback=recipe).entries[0]
    assert entry.recipe["r_max"] == 2.0


@pytest.mark.parametrize("target", ["brn", "cbn", "frozen", "naive-cbn"])
def test_targets_with_statistics_refuse_a_norm_without(target):
    model = net(track_running_stats=False)
    assert "no running statistics" in normswap.plan(model, target, example_inputs=X).kept["1"]
    entry = normswap.plan(model, "gn", example_inputs=X).entries[0]
    assert "copied" in " ".join(entry.notes)


def test_mapping_gives_each_pattern_its_recipe():
    model = nn.Sequential(net(), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))
    rules = {"0.*": "gn", "*": normswap.BatchRenorm(r_max=2)}
    plan = normswap.plan(model, rules, example_inputs=X)
    assert [e.becomes for e in plan] == ["gn", "brn"]
    only = normswap.plan(model, {"1.*": "gn"}, example_inputs=X)
    assert "no pattern" in only.kept["0.1"]


def test_include_and_exclude():
    model = nn.Sequential(net(), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))
    plan = normswap.plan(model, "gn", example_inputs=X, include="0.*")
    assert plan.kept == {"1.1": "not included"}
    plan = normswap.plan(model, "gn", example_inputs=X, exclude=["1.1"])
    assert plan.kept == {"1.1": "excluded"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "layer9.*"}, r"include: got 'layer9.\*'.*none of 1"),
        ({"exclude": "0"}, "exclude: got '0'"),
        ({"init": "clever"}, "init: got 'clever'"),
        ({"fallback": "none"}, "fallback: got 'none'"),
        ({"target": "group"}, "target: got 'group'"),
        ({"target": {"x.*": "gn"}}, "target: got 'x"),
    ],
)
def test_bad_requests_say_what_is_wrong(arguments, message):
    arguments = {"target": "gn", **arguments}
    with pytest.raises(PlanError, match=message):
        normswap.plan(net(), example_inputs=X, **arguments)


def test_no_inputs_and_no_norms():
    with pytest.raises(PlanError, match="example_inputs"):
        normswap.plan(net(), "gn")
    with pytest.raises(PlanError, match="no BatchNorm"):
        normswap.plan(nn.Conv2d(3, 3, 1), "gn", example_inputs=X)


def test_planning_changes_nothing():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for target in TARGETS:
        normswap.plan(model, target, example_inputs=X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(plan_format=99),
        lambda d: d.pop("entries"),
        lambda d: d["entries"][0].pop("names"),
        lambda d: d["entries"][0].update(surprise=1),
        lambda d: d.update(entries=3),
        lambda d: d["entries"].append(None),
        lambda d: d["entries"].append(d["entries"][0]),
        lambda d: d["entries"][0].update(becomes="gn"),
        lambda d: d["entries"][0].update(recipe="frn"),
        lambda d: d["entries"][0].update(rank=7),
        lambda d: d["entries"][0].update(rank="2"),
    ],
)
def test_a_damaged_plan_is_one_clear_error(damage):
    data = normswap.plan(net(), "frn", example_inputs=X).to_json()
    damage(data)
    with pytest.raises(PlanError, match="plan: got"):
        normswap.Plan.from_json(data)


def test_a_converted_model_is_told_from_one_without_batchnorm():
    model = normswap.convert(net(), "gn", example_inputs=X).model
    with pytest.raises(PlanError, match="converted already, to gn"):
        normswap.plan(model, "frn", example_inputs=X)


def test_every_target_has_a_recipe_and_every_recipe_a_name():
    for name in TARGETS:
        assert recipe_for(name).target == name
    with pytest.raises(NormSwapError, match="frn"):
        recipe_for("frm")
