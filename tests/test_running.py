"""Running a model leaves it as it was; example inputs have the form of the model's task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from normswap import running
from normswap.provenance import remember


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())


def test_modes_come_back_one_by_one_also_after_an_error():
    model = net().train()
    model[1].eval()
    before = [m.training for m in model.modules()]
    with running.evaluating(model):
        assert not any(m.training for m in model.modules())
    with pytest.raises(TypeError), running.evaluating(model):
        running.call(model, {"no": 1})
    assert [m.training for m in model.modules()] == before


def test_models_come_home():
    model = net()
    with running.placed("meta", nn.Identity()) as where:
        assert where.type == "meta"
    with running.placed(None, model) as where:
        assert where == torch.device("cpu")
    assert model[0].weight.device.type == "cpu"


def test_what_was_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        batch = {"x": torch.ones(2, 3, 8, 8), "n": 3}
    moved = running.moved(batch, torch.device("cpu"))
    assert not moved["x"].is_inference()
    assert moved["n"] == 3
    net()(moved["x"]).sum().backward()


def draw():
    return torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("task", "kind", "shapes"),
    [
        ("image", torch.Tensor, [(2, 3, 8, 8)]),
        ("video", torch.Tensor, [(2, 3, 8, 8)]),
        ("detection", list, [(3, 8, 8)] * 2),
        ("flow", tuple, [(2, 3, 8, 8)] * 2),
    ],
)
def test_example_inputs_have_the_form_of_the_task(task, kind, shapes):
    found = running.example_inputs(net().double(), draw, task)
    assert isinstance(found, kind)
    assert [tuple(t.shape) for t in running.leaves(found)] == shapes
    assert all(t.dtype == torch.float64 for t in running.leaves(found))


class Flow(nn.Module):
    """Takes two batches, as an optical-flow model does."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, first, second):
        return self.body(first - second)


class Boxes(nn.Module):
    """Takes a list of images, as a detector does."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, images):
        return self.body(torch.stack(images))


@pytest.mark.parametrize(("make", "task"), [(Flow, "flow"), (Boxes, "detection"), (net, "image")])
def test_a_plan_runs_a_model_from_a_source_as_its_task_wants(make, task):
    model = make()
    remember(model, source={"task": task}, preprocessing={"input_size": [3, 12, 12]})
    assert normswap.plan(model, "gn").counts() == {"gn": 1}
    assert len(normswap.convert(model, "gn").replaced) == 1
