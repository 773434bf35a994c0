"""What version 0.1 wrote still loads, and means what it meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from version_0_1 import images, network

import normswap

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "output.safetensors")["output"]


@pytest.fixture(scope="module")
def written():
    return json.loads((FIXTURES / "plan.json").read_text())


def test_a_plan_loads_and_says_the_same_again(written):
    plan = normswap.Plan.from_json(written)
    assert plan.counts() == {"gn": 1, "frn": 2, "cbn": 1}
    again = json.loads(json.dumps(plan.to_json()))
    for old, new in zip(written["entries"], again["entries"], strict=True):
        assert old == {key: new[key] for key in old} | {k: old[k] for k in ("removal", "recipe")}
        assert old["recipe"].items() <= new["recipe"].items()  # which may say more by now
        removal = new["removal"] or {}
        assert (old["removal"] or {}) == {k: removal[k] for k in old["removal"] or {}}
    assert normswap.Plan.from_json(again) == plan


def test_a_cbn_of_then_goes_on_as_it_was(written):
    plan = normswap.Plan.from_json(written)
    (recipe,) = (e.recipe for e in plan.entries if e.becomes == "cbn")
    assert (recipe.through_history, recipe.sampling, recipe.half_history) == (False, 1, False)


def test_a_plan_converts_to_the_same_function(written, expected):
    plan = normswap.Plan.from_json(written)
    model = normswap.convert(network(), plan, example_inputs=images()).model
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    assert model.head[1].producer is model.head[0]


@pytest.mark.parametrize("fresh", [True, False])
def test_an_artefact_loads(expected, fresh):
    how = {"into": network()} if fresh else {"trust": "python:version_0_1:network"}
    model = normswap.load(FIXTURES / "artifact", **how)
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    assert model.head[1].producer is model.head[0]
    assert type(model.stem[1]) is torch.nn.GroupNorm
