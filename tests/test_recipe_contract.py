"""A normaliser is one layer and one recipe: here both stand outside of the package."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from traps import randomise

import normswap
from normswap.drift import measure_drift, predicted_drift
from normswap.graph.norms import BatchNormState, state_of
from normswap.graph.vocabulary import REPLACEABLE
from normswap.recipes import RECIPES, base, recipe_of
from normswap.targets import TARGETS


class Shift(nn.Module):
    """γ·(x − mean of the sample's channel) + β: a normaliser that leaves the variance alone."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        view = (1, -1, *[1] * (x.dim() - 2))
        centred = x - x.mean(tuple(range(2, x.dim())), keepdim=True)
        return centred * self.weight.view(view) + self.bias.view(view)


@pytest.fixture
def toy():
    @dataclass(frozen=True)
    class Toy(base.Recipe):
        target: ClassVar[str] = "toy"
        fallback: ClassVar[str] = "frozen"
        per_sample: ClassVar[bool] = True
        layers: ClassVar[tuple[type[nn.Module], ...]] = (Shift,)

        gain: float = 1.0

        def refusal(self, site: normswap.Site, model: nn.Module) -> str | None:
            del model
            return base.needs_a_map(site)

        def build(
            self, norm: nn.Module, *, rank: int, init: str, activation: str | None = None
        ) -> nn.Module:
            del rank, activation
            state, new = state_of(norm), Shift(state_of(norm).channels)
            matched = base.Affine(
                self.gain * state.weight / (state.var + state.eps).sqrt(), state.bias
            )
            return base.take_over(norm, base.set_affine(norm, new, matched, init))

        def drift(self, state: BatchNormState) -> float:
            del state
            return 0.25

        def standardise(self, layer: nn.Module, x: Tensor) -> Tensor:
            del layer
            return x - x.mean((2, 3), keepdim=True)

    yield Toy
    del RECIPES["toy"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        randomise(nn.BatchNorm2d(8)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(8),
    ).eval()


def test_it_goes_every_way_that_the_others_go(toy, tmp_path):
    x = torch.randn(4, 3, 12, 12)
    teacher, model = net(), net()
    result = normswap.convert(model, "toy(gain=0.5)", example_inputs=x)
    assert result.plan.counts() == {"toy": 1, "frozen": 1}
    assert result.plan.entries[0].recipe == toy(gain=0.5)
    assert "toy(gain=0.5)" in str(result.plan)
    again = normswap.Plan.from_json(json.loads(json.dumps(result.plan.to_json())))
    assert again == result.plan
    assert isinstance(recipe_of(model[1]), toy)
    assert isinstance(recipe_of(Shift(3)), toy)
    assert predicted_drift(model[1], teacher[1]) == 0.25
    before = measure_drift(model, teacher, x)
    report = normswap.calibrate(model, teacher, x, steps=0)
    assert report.after.sites[0].alone < before.sites[0].alone
    normswap.save(model, tmp_path / "out")
    loaded = normswap.load(tmp_path / "out", into=net())
    assert torch.equal(loaded(x), model(x))
    assert normswap.export_onnx(model, tmp_path / "m.onnx", example_inputs=x).passed


def test_a_per_sample_recipe_that_foretells_nothing_is_not_called_exact(toy):
    class Silent(toy):
        target: ClassVar[str] = "silent"
        drift = base.Recipe.drift

    try:
        model = net()
        normswap.convert(model, "silent", example_inputs=torch.randn(2, 3, 12, 12))
        assert recipe_of(model[1]).target == "silent"
        assert predicted_drift(model[1], net()[1]) is None
    finally:
        del RECIPES["silent"]


def test_what_the_recipes_say_of_themselves_agrees_with_what_they_build():
    x = torch.randn(2, 3, 12, 12)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), randomise(nn.BatchNorm2d(8)), nn.ReLU()).eval()
    assert set(TARGETS) == set(RECIPES)
    for name, recipe in RECIPES.items():
        assert recipe().takes <= set(REPLACEABLE), name
        if name == "bn":
            continue
        model = copy.deepcopy(body)
        plan = normswap.plan(model, name, example_inputs=x)
        made = normswap.convert(model, plan).model[1]
        assert recipe_of(made).target == name
        assert (plan.entries[0].producer is not None) == recipe.wired
        if not recipe.per_sample:  # eval mode is the BatchNorm that was replaced
            assert torch.equal(model(x), body(x))
            assert recipe_of(made).drift(state_of(body[1])) == 0
        else:
            inner = torch.randn(2, 8, 5, 5)
            standard = recipe_of(made).standardise(made, inner)
            assert standard is not None, f"{name} needs a standardise of its own"
            affine = standard * made.weight.view(8, 1, 1) + made.bias.view(8, 1, 1)
            floor = getattr(made, "tau", torch.full((8,), -torch.inf)).view(8, 1, 1)
            torch.testing.assert_close(torch.maximum(affine, floor), made(inner))
            assert recipe_of(made).drift(state_of(body[1])) != 0, f"{name} is not exact"
        for _ in range(2):
            model.train()(x)
        model.eval()
        assert (model(x[:1]) - model(x)[:1]).abs().max() < 1e-5, name  # no sample sees another
