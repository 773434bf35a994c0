"""Legitimate models that look like no library's: nothing is lost, or it is refused in one line."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import normswap
from normswap import convert, plan
from normswap.errors import PlanError, SwapError, WalkError
from normswap.recipes import FilterResponseNorm


class Block(nn.Module):
    """conv, bn, and whatever a subclass does with it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.bn.weight.uniform_(0.5, 1.5)
            self.bn.bias.normal_()
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def images(rows=2):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    return {n: type(m) for n, m in model.named_modules()}, copy.deepcopy(model.state_dict())


def unchanged(model, before):
    types, state = snapshot(model)
    return types == before[0] and all(torch.equal(state[k], v) for k, v in before[1].items())


class InPlaceSum(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x.mean(1, keepdim=True)
        return F.relu(y)


class DecoratedInPlaceSum(InPlaceSum):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


@dataclass(slots=True)
class Slotted:
    normal: torch.Tensor
    active: torch.Tensor


class SlottedOutput(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return Slotted(y, F.relu(y))


class Mapped(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) + torch.vmap(lambda t: 2 * t)(y)


def value(output):
    return output.normal + output.active if isinstance(output, Slotted) else output


@pytest.mark.parametrize("kind", [InPlaceSum, DecoratedInPlaceSum, SlottedOutput, Mapped])
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
def test_a_relu_is_taken_only_where_nothing_else_sees_its_input(kind, inference):
    x = images()
    with torch.inference_mode(inference):
        taken = convert(kind().eval(), "frn", example_inputs=x).model
        left = convert(kind().eval(), FilterResponseNorm(tlu=False), example_inputs=x).model
    with torch.no_grad():
        torch.testing.assert_close(value(taken(x)), value(left(x)), rtol=0, atol=0)


@pytest.mark.parametrize("target", ["gn", "frn", "brn"])
def test_what_is_converted_in_inference_mode_can_be_trained(target):
    model = Block()
    with torch.inference_mode():
        convert(model, target, example_inputs=images())
    model.train()(images()).sum().backward()
    assert model.bn.weight.grad is not None


class Hidden(Block):
    def __init__(self):
        super().__init__()
        self.queue = deque([self.bn])

    def forward(self, x):
        return F.relu(self.queue[0](self.conv(x)))


class Curious(Block):
    def forward(self, x):
        return super().forward(x) * self.bn.running_var.mean()


def test_a_batchnorm_that_would_go_on_running_is_refused():
    model = Hidden().eval()
    before = snapshot(model)
    with pytest.raises(WalkError, match="still runs after it was replaced"):
        convert(model, "gn", example_inputs=images())
    assert unchanged(model, before)


def test_code_that_looks_into_its_batchnorm_keeps_it_or_is_refused():
    model = Curious().eval()
    before, right = snapshot(model), model(images())
    with pytest.raises(WalkError, match="running_var"):
        convert(model, "gn", example_inputs=images())
    assert unchanged(model, before)
    assert torch.equal(convert(model, "frozen", example_inputs=images()).model(images()), right)


@pytest.mark.parametrize("target", ["brn", "frozen", "gn"])
def test_full_backward_hooks_go_on_firing(target):
    model, seen = Block(), []
    model.bn.register_full_backward_hook(lambda *_: seen.append(1))
    convert(model, target, example_inputs=images()).model.train()(images()).sum().backward()
    assert seen == [1]


def test_computed_parameters_are_refused():
    pruned, parametrized = Block(), Block()
    prune.l1_unstructured(pruned.bn, "weight", 0.5)
    parametrize.register_parametrization(parametrized.bn, "weight", nn.Softplus())
    for model in (pruned, parametrized):
        with pytest.raises(WalkError, match="weight is computed"):
            convert(model, "brn", example_inputs=images())
    prune.remove(pruned.bn, "weight")
    convert(pruned, "brn", example_inputs=images())


class Decorated(nn.BatchNorm2d):
    """Children by the names of timm's, and BatchNorm's own forward, which runs neither."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()


@pytest.mark.parametrize("target", ["frozen", "brn", "bn"])
def test_children_that_do_not_run_are_no_activation(target):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Decorated(8)).eval()
    right = model(images())
    assert torch.equal(convert(model, target, example_inputs=images()).model(images()), right)


class TwoRanks(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.SyncBatchNorm(3)

    def forward(self, x):
        return self.bn(x).mean() + self.bn(x.mean((2, 3))).mean()


@pytest.mark.parametrize("target", ["gn", "frn", "frozen", "bn"])
def test_a_norm_that_takes_maps_and_vectors_stays(target):
    model = TwoRanks().eval()
    result = convert(model, target, example_inputs=images())
    assert "different numbers of dimensions" in result.kept["bn"]
    model(images())


def test_a_syncbn_that_never_ran_is_no_batchnorm2d():
    model = nn.ModuleDict({"used": Block(), "spare": nn.SyncBatchNorm(4)})
    model.forward = lambda x: model["used"](x)
    assert "never ran" in convert(model, "bn", example_inputs=images()).kept["spare"]


def test_lazy_modules_are_refused_and_stay_lazy():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(WalkError, match="uninitialised LazyLinear"):
        plan(model, "gn", example_inputs=images())
    assert model(images()).shape == (2, 4)
    plan(model, "gn", example_inputs=images())


@pytest.mark.parametrize("target", ["frn", "gn", "brn"])
def test_traced_graphs_convert_and_copy(target):
    model = torch.fx.symbolic_trace(Block().eval())
    converted = convert(model, target, example_inputs=images()).model
    again = copy.deepcopy(converted)
    converted.recompile()
    assert torch.equal(again(images()), converted(images()))
    if target == "frn":
        assert isinstance(converted.bn, normswap.layers.FilterResponseNorm2d)
        assert converted(images()).min() == 0


def test_what_is_no_eager_module_is_refused():
    compiled = Block()
    compiled.compile()
    with pytest.raises(WalkError, match="original model"):
        convert(compiled, "gn", example_inputs=images())
    with pytest.raises(WalkError, match="got a str"):
        convert("resnet18", "gn", example_inputs=images())


def test_a_frozen_model_stays_frozen():
    model = Block().requires_grad_(False)
    converted = convert(model, "frn", example_inputs=images()).model
    assert isinstance(converted.bn, normswap.layers.FilterResponseNorm2d)
    assert not any(p.requires_grad for p in converted.parameters())


def test_a_plan_is_not_settled_twice():
    model = Block()
    made = plan(model, "gn", example_inputs=images())
    for options in ({"include": "*"}, {"exclude": "x"}, {"fallback": "brn"}, {"init": "copy"}):
        with pytest.raises(PlanError, match="settled"):
            convert(model, made, **options)
    convert(model, made, example_inputs=images())


def test_a_failed_check_undoes_the_swap_with_its_optimizer():
    model = Curious().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises((WalkError, SwapError)):
        convert(model, "frn", example_inputs=images(), optimizer=optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held


def test_what_does_not_come_along_is_said():
    model = Block()
    model.bn.register_state_dict_post_hook(lambda *_: None)
    model.bn.register_parameter("bias", None)
    (entry,) = plan(model, "gn", example_inputs=images()).entries
    assert any("state-dict hooks" in note for note in entry.notes)
    assert any("no β" in note for note in entry.notes)


def test_quantisation_aware_convolutions_become_exact_targets_or_are_refused():
    """torch.ao folds the norm that they hold into their weight: they read its statistics."""
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    def build():
        torch.manual_seed(0)
        return nn.Sequential(ConvBn2d(3, 8, 3, qconfig=get_default_qat_qconfig("fbgemm"))).eval()

    x = images()
    for target in ("frozen", "brn"):
        model = build()
        right = model(x)
        result = convert(model, target, example_inputs=x)
        assert list(result.replaced) == ["0.bn"]
        torch.testing.assert_close(result.model(x), right)
    with pytest.raises(WalkError, match="has no attribute 'running_var'"):
        convert(build(), "gn", example_inputs=x)
