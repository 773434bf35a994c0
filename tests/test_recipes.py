"""Moment matching against its definition, by brute force over populations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from traps import randomise

import normswap
from normswap.graph.norms import state_of
from normswap.recipes import recipe_for
from normswap.recipes.matching import group_moments, match_groups


def standardised(mean, var, shape, seed=0):
    """A batch whose every sample has, per channel, exactly the given mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    axes = tuple(range(2, x.ndim))
    x = x - x.mean(axes, keepdim=True)
    x = x / x.var(axes, unbiased=False, keepdim=True).sqrt()
    size = (1, -1, *([1] * (x.ndim - 2)))
    return x * var.view(size).sqrt() + mean.view(size)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "recipe",
    [
        normswap.GroupNorm(groups=1),
        normswap.GroupNorm(groups=4),
        normswap.GroupNorm(groups=8),
        normswap.LayerNorm(),
        normswap.InstanceNorm(),
        normswap.FilterResponseNorm(),
        normswap.FilterResponseNorm(learnable_eps=True),
    ],
)
def test_match_is_exact_where_samples_have_the_population_statistics(recipe, rank):
    bn = randomise(getattr(nn, f"BatchNorm{rank}d")(8).double()).eval()
    x = standardised(bn.running_mean, bn.running_var, (3, 8, *([4] * rank)))
    expected = bn(x)
    model = normswap.convert(nn.Sequential(bn), recipe, example_inputs=x).model
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)


def test_group_moments_are_the_pooled_moments():
    mean = torch.tensor([1.0, 3.0, -2.0, 0.5], dtype=torch.float64)
    var = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=torch.float64)
    x = standardised(mean, var, (1, 4, 1000))
    for groups in (1, 2, 4):
        pooled = x.view(groups, -1)
        centre, spread = group_moments(mean, var, groups)
        per_group = 4 // groups
        assert torch.allclose(centre.view(groups, per_group)[:, 0], pooled.mean(1))
        assert torch.allclose(spread.view(groups, per_group)[:, 0], pooled.var(1, unbiased=False))


def test_copy_and_reset():
    for init in ("copy", "reset"):
        bn = randomise(nn.BatchNorm2d(8))
        expected = (bn.weight.clone(), bn.bias.clone())
        if init == "reset":
            expected = (torch.ones(8), torch.zeros(8))
        x = torch.randn(2, 8, 4, 4)
        new = normswap.convert(nn.Sequential(bn), "gn", example_inputs=x, init=init).model[0]
        assert torch.equal(new.weight, expected[0])
        assert torch.equal(new.bias, expected[1])


@pytest.mark.parametrize("target", ["gn", "ln", "in", "frn"])
def test_dead_channels_do_not_explode(target):
    bn = randomise(nn.BatchNorm2d(8))
    bn.running_var[2] = 0.0
    bn.running_mean[2] = 0.0
    bn.running_var[3] = 1e-30
    x = standardised(bn.running_mean.double(), bn.running_var.double(), (2, 8, 6, 6)).float()
    expected = bn.eval()(x)
    model = normswap.convert(nn.Sequential(bn), target, example_inputs=x).model
    noisy = x + 1e-3 * torch.randn_like(x)
    assert (model(x) - expected).abs().max() < 1e-3
    assert (model(noisy)[:, 4:] - expected[:, 4:]).abs().max() < 0.1
    assert model[0].weight.abs().max() < 1e3


def test_missing_affine_is_created_and_said():
    bn = randomise(nn.BatchNorm2d(8, affine=False)).eval().double()
    x = standardised(bn.running_mean, bn.running_var, (2, 8, 6, 6))
    expected = bn(x)
    result = normswap.convert(nn.Sequential(bn), "gn", example_inputs=x)
    assert torch.allclose(result.model(x), expected, atol=1e-10)
    assert "created" in result.plan.entries[0].notes[0]
    assert result.model[0].weight.requires_grad


def test_bias_none_is_kept_or_created():
    bn = randomise(nn.BatchNorm2d(8))
    bn.register_parameter("bias", None)
    x = torch.randn(2, 8, 6, 6)
    expected = bn.eval()(x)
    for target in ("brn", "frozen", "naive-cbn"):
        model = nn.Sequential(bn)
        new = normswap.convert(model, target, example_inputs=x).model
        assert new[0].bias is None
        assert torch.equal(new(x), expected)
    new = normswap.convert(nn.Sequential(bn), "gn", example_inputs=x).model
    assert new[0].bias is not None


@pytest.mark.parametrize("target", ["gn", "ln", "in", "frn", "brn", "naive-cbn", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_dtype_mode_and_gradient_flags_carry_over(target, dtype, training):
    bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2).to(dtype).train(training)
    bn.weight.requires_grad_(False)
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    new = normswap.convert(nn.Sequential(bn), target, example_inputs=x).model[0]
    assert new.weight.dtype == dtype
    assert not new.weight.requires_grad
    assert new.bias.requires_grad
    assert new.training is training
    assert target == "frn" or new.eps == 1e-3
    assert new(x).dtype == dtype


def test_eps_stays_small_against_the_statistics():
    bn = randomise(nn.BatchNorm2d(8))
    state = state_of(bn)
    power = state.var + state.mean**2
    for recipe in (normswap.FilterResponseNorm(), normswap.FilterResponseNorm(learnable_eps=True)):
        new = normswap.convert(
            nn.Sequential(randomise(nn.BatchNorm2d(8))),
            recipe,
            example_inputs=torch.randn(1, 8, 4, 4),
        ).model[0]
        eps = new.eps + (new.eps_l.abs() if new.eps_l is not None else 0)
        assert (eps <= 1e-3 * power).all()


def test_momentum_is_kept_by_cbn_changed_by_brn_and_restored_by_bn():
    x = torch.randn(2, 8, 4, 4)
    model = nn.Sequential(nn.BatchNorm2d(8, momentum=0.3))
    assert normswap.convert(model, "brn", example_inputs=x).model[0].momentum == 0.01
    assert normswap.convert(model, "naive-cbn", example_inputs=x).model[0].momentum == 0.3
    normswap.convert(model, "frozen", example_inputs=x)
    back = normswap.convert(model, "bn", example_inputs=x).model[0]
    assert type(back) is nn.BatchNorm2d
    assert back.momentum == 0.3


def test_recipes_do_not_touch_the_norm_they_replace():
    for name in ("gn", "ln", "in", "frn", "brn", "cbn", "naive-cbn", "syncbn", "frozen"):
        bn = randomise(nn.BatchNorm2d(8))
        before = {k: v.clone() for k, v in bn.state_dict().items()}
        recipe = recipe_for(name)
        site = normswap.walk(nn.Sequential(bn), torch.randn(1, 8, 4, 4)).sites[0]
        recipe.settle(site, bn).build(bn, rank=2, init="match")
        assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())
        assert type(bn) is nn.BatchNorm2d


def test_match_groups_rejects_nothing_finite():
    bn = randomise(nn.BatchNorm2d(8)).double()
    for groups in (1, 2, 4, 8):
        affine = match_groups(state_of(bn), groups, 1e-5)
        assert affine.weight.isfinite().all()
        assert affine.bias.isfinite().all()


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_one_broken_statistic_leaves_the_rest_of_its_group_alone(broken):
    bn = randomise(nn.BatchNorm2d(8))
    sound = match_groups(state_of(bn), 1, 1e-5)
    bn.running_var[3] = broken
    found = match_groups(state_of(bn), 1, 1e-5)
    others = torch.arange(8) != 3
    assert found.weight[3] == 0
    assert found.bias[3] == bn.bias[3]
    assert torch.allclose(found.weight[others], sound.weight[others], rtol=0.3)


@pytest.mark.parametrize("variance", [1e-3, 1e-5, 1e-6, 1e-8, 1e-9, 1e-11])
def test_a_quiet_channel_does_not_shout_what_its_loud_group_does(variance):
    """Its output is off by no more than its own spread, or a tenth of the group's."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(8).double().eval()
    bn.running_var[0] = variance
    scale = bn.running_var.sqrt().view(1, -1, 1, 1)
    loudness = 1 + 0.3 * torch.randn(256, 8, 1, 1, dtype=torch.float64)
    means = 0.4 * torch.randn(256, 8, 1, 1, dtype=torch.float64)
    x = scale * (loudness * torch.randn(256, 8, 6, 6, dtype=torch.float64) + means)
    model = normswap.convert(
        nn.Sequential(bn), normswap.GroupNorm(groups=2), example_inputs=x[:2]
    ).model
    right = (x / (bn.running_var + bn.eps).sqrt().view(1, -1, 1, 1))[:, 0]
    error = (model(x)[:, 0] - right).square().mean().sqrt()
    assert error < max(10 * right.std(), 0.1)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (normswap.GroupNorm, {"groups": 0}),
        (normswap.GroupNorm, {"groups": 2.0}),
        (normswap.GroupNorm, {"groups": True}),
        (normswap.GroupNorm, {"groups": "x"}),
        (normswap.GroupNorm, {"max_groups": 0}),
        (normswap.GroupNorm, {"eps": -1.0}),
        (normswap.LayerNorm, {"eps": float("nan")}),
        (normswap.InstanceNorm, {"eps": float("inf")}),
        (normswap.FilterResponseNorm, {"eps": -1.0}),
        (normswap.FilterResponseNorm, {"tlu": "yes"}),
        (normswap.BatchRenorm, {"momentum": 2}),
        (normswap.BatchRenorm, {"r_max": 0.5}),
        (normswap.CrossIterationBatchNorm, {"window": 2.5}),
        (normswap.CrossIterationBatchNorm, {"variance_rule": "min"}),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_at_once(recipe, options):
    (name,) = options
    with pytest.raises(normswap.errors.PlanError, match=name):
        recipe(**options)
