"""Habits of other people's models, one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap import convert, plan, walk
from normswap.errors import ParityError, PlanError, WalkError
from normswap.factories import Request
from normswap.factories.python_models import from_python
from normswap.running import evaluating


class Policy(nn.Module):
    """Takes a dictionary of observations as its one argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, observations):
        return self.bn(self.conv(observations["image"])) + observations["speed"]


def test_a_dictionary_that_is_the_argument_is_hinted_at():
    inputs = {"image": torch.zeros(1, 3, 8, 8), "speed": 1.0}
    with pytest.raises(WalkError, match=r"Try \(inputs,\) where the dictionary is the one"):
        walk(Policy(), inputs)
    assert len(walk(Policy(), (inputs,))) == 1


def test_groups_may_be_given_by_their_size():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    x = torch.zeros(1, 8, 4, 4)
    for target in ("gn(channels_per_group=4)", normswap.GroupNorm(channels_per_group=4)):
        result = convert(copy.deepcopy(model), target, example_inputs=x)
        assert [layer.num_groups for layer in result.model] == [2, 2]
        again = normswap.Plan.from_json(result.plan.to_json())
        assert [m.num_groups for m in convert(copy.deepcopy(model), again).model] == [2, 2]
    with pytest.raises(PlanError, match=r"channels_per_group=3 for 8.*channels_per_group=2 or 4"):
        plan(model, "gn(channels_per_group=3)", example_inputs=x)
    with pytest.raises(PlanError, match="either groups or channels_per_group"):
        normswap.GroupNorm(groups=2, channels_per_group=4)


@pytest.mark.parametrize("target", ["gn", "frn", "brn", "frozen", "bn"])
def test_a_pruned_batchnorm_has_as_many_channels_as_its_tensors(target):
    norm = nn.BatchNorm2d(8)
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[:5].detach()))
    norm.running_mean, norm.running_var = norm.running_mean[:5], norm.running_var[:5]
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    assert walk(model, x).sites[0].channels == 5
    right = model(x)
    found = convert(model, target, example_inputs=x).model(x)
    assert found.shape == right.shape
    if target in ("brn", "frozen", "bn"):
        torch.testing.assert_close(found, right)


class WithHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), head

    def forward(self, x):
        return self.head(self.bn(self.conv(x)))


def compiled_in_place():
    head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())
    head.compile()
    return head


HEADS = {
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())),
    "traced": lambda: torch.jit.trace(nn.Conv2d(4, 2, 1), torch.zeros(1, 4, 6, 6)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())),
    "compiled in place": compiled_in_place,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", HEADS)
def test_a_part_without_norms_may_be_scripted_or_compiled(kind):
    model = WithHead(HEADS[kind]()).eval()
    x = torch.randn(1, 3, 8, 8)
    result = convert(model, "gn", example_inputs=x)
    assert list(result.replaced) == ["bn"]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert result.model(x).shape == (1, 2, 6, 6)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_a_walk_leaves_scripted_and_compiled_parts_as_they_were(kind, training):
    model = nn.Sequential(WithHead(HEADS[kind]()), nn.Dropout()).train(training)
    before = [(m.training, *(t.clone() for t in m.buffers())) for m in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    walk(model, torch.randn(2, 3, 8, 8))
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    for module, (mode, *buffers) in zip(model.modules(), before, strict=True):
        assert module.training == mode
        assert all(map(torch.equal, module.buffers(), buffers))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_or_compiled_part_with_norms_is_refused():
    x = torch.randn(1, 3, 8, 8)
    inner = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()
    for head in (torch.jit.script(inner), torch.compile(inner)):
        with pytest.raises(WalkError, match=r"head: got a .*eager module"):
            walk(WithHead(head), x)


def test_a_batch_statistic_is_named_as_the_reason(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(2)
    )
    with pytest.raises(ParityError, match=r"got 1: a BatchNorm without running statistics"):
        normswap.export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6))


class Wrapper(nn.Module):
    """ultralytics' way: train() trains."""

    def __init__(self):
        super().__init__()
        self.small = nn.Linear(1, 1)
        self.model = WithHead(nn.Identity())

    def forward(self, x):
        return self.model(x)

    def train(self, trainer=None, **settings):
        raise AssertionError("a training run was started")


class Evaluates(Wrapper):
    def train(self, mode=True):
        return super(Wrapper, self).train(mode)

    def eval(self, data):
        raise AssertionError("an evaluation was started")


class Freezes(Wrapper):
    """Does more than torch's train(), and means the same."""

    def train(self, mode: bool = True):
        super(Wrapper, self).train(mode)
        self.model.bn.eval()
        return self


@pytest.mark.parametrize("kind", [Wrapper, Evaluates])
@pytest.mark.parametrize("inside", [False, True])
def test_methods_that_mean_something_else_are_never_called(kind, inside):
    model, x = kind(), torch.randn(1, 3, 8, 8)
    path = "model.model"
    if inside:
        model, path = nn.Sequential(model), "model.0.model"
    for attempt in (
        lambda: walk(model, x),
        lambda: convert(model, "gn", example_inputs=x),
        lambda: evaluating(model).__enter__(),
    ):
        with pytest.raises(WalkError, match=rf"a method of its own.*attribute model: {path}"):
            attempt()
    assert len(walk(model.model if not inside else model[0].model, x)) == 1


def test_a_factory_of_such_a_model_is_refused_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "yolo_like.py").write_text(
        "from torch import nn\n"
        "class Yolo(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = nn.Conv2d(3, 3, 1)\n"
        "    def train(self, data, epochs=3):\n"
        "        raise AssertionError\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WalkError, match=r"Yolo, whose train\(data, epochs=3\).*model\.net"):
        from_python(Request("python:yolo_like:Yolo", "yolo_like:Yolo"))


def test_a_method_that_does_more_is_fine():
    assert len(walk(Freezes(), torch.randn(1, 3, 8, 8))) == 1


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(F.relu(self.a(x))))


def test_a_shared_affine_parameter_is_noted():
    made = plan(Tied(), "gn", example_inputs=torch.randn(1, 3, 4, 4))
    notes = {entry.name: "; ".join(entry.notes) for entry in made}
    assert "its γ is also that of b" in notes["a"]
    assert "its γ is also that of a" in notes["b"]
    assert "also that of" not in notes["c"]


def test_what_opacus_does_not_take_is_noted():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    made = plan(model, "gn", example_inputs=x)
    assert any("FrozenBatchNorm(trainable=False)" in note for note in made.notes)
    for fallback in ("frozen(trainable=False)", "keep"):
        other = plan(model, "gn", example_inputs=x, fallback=fallback)
        assert not any("Opacus" in note for note in other.notes)
    assert not any("Opacus" in n for n in plan(model, "frozen", example_inputs=x).notes)
