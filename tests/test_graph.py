from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import traps
from torch import nn
from traps import TRAPS, built

from normswap.errors import WalkError
from normswap.graph import walk


@pytest.mark.parametrize("name", TRAPS)
def test_walker_gives_the_answer_written_beside_the_trap(name):
    trap = TRAPS[name]
    graph = walk(built(name), trap.inputs)
    assert {site.name for site in graph} == set(trap.answers)
    for expected_name, answer in trap.answers.items():
        site = graph[expected_name]
        assert (site.producer.name if site.producer else None) == answer.producer
        assert site.no_producer == answer.no_producer
        assert site.calls == answer.calls
        assert site.names == (answer.names or (expected_name,))
        activation = site.activation
        assert (activation.op if activation else None) == answer.activation
        if activation is not None:
            assert activation.name == answer.act_name
            # "tied" has an open call per ReLU, but its two calls stand on different lines
            open_ways = [r.how for r in activation.removals if r.obstacle is None]
            assert (open_ways[0] if open_ways else None) == answer.relu


def _state(model):
    return {
        "attributes": [dict(vars(m)) for m in model.modules()],
        "containers": [
            {k: dict(v) for k, v in vars(m).items() if isinstance(v, dict)} for m in model.modules()
        ],
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
    }


def _assert_same(before, after):
    assert before["modes"] == after["modes"]
    for old, new in zip(before["attributes"], after["attributes"], strict=True):
        assert old.keys() == new.keys()
        assert all(old[k] is new[k] for k in old)
    for old, new in zip(before["containers"], after["containers"], strict=True):
        assert {k: list(v) for k, v in old.items()} == {k: list(v) for k, v in new.items()}
    assert all(torch.equal(v, after["tensors"][k]) for k, v in before["tensors"].items())


class Caching(nn.Module):
    """Writes to itself while it runs; runs on the meta device, or (``values``) only on its own."""

    def __init__(self, values, fails=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.cache = {}
        self.log = []
        self.values, self.fails = values, fails

    def forward(self, x):
        x = self.bn(self.conv(x))
        self.cache["x"] = x
        self.log.append(1)
        self.last = x
        if self.values and x.mean().item() > 1e9:
            return x
        if self.fails:
            raise RuntimeError("broken model")
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_walking_leaves_no_trace(values, fails, training):
    model = Caching(values, fails).train(training)
    model.bn.train(not training)
    before, rng = _state(model), torch.get_rng_state()
    if fails:
        with pytest.raises(WalkError, match="broken model"):
            walk(model, torch.randn(2, 3, 8, 8))
        torch.set_rng_state(rng)
    else:
        inputs = torch.zeros(2, 3, 8, 8)
        assert walk(model, inputs).device == ("cpu" if values else "meta")
    _assert_same(before, _state(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert not hasattr(model, "last")
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_model_on_the_meta_device_can_be_walked():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    site = walk(model, torch.zeros(1, 3, 8, 8)).sites[0]
    assert site.spatial == (6, 6)
    assert site.producer.name == "0"


def test_inputs_may_be_positional_keywords_or_a_list():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, images, shift=0):
            x = torch.stack(images) if isinstance(images, list) else images
            return self.bn(x) + shift

    x = torch.zeros(3, 4, 4)
    for inputs in (x[None], (x[None], 1), {"images": x[None], "shift": 2}, [x, x]):
        assert walk(Model(), inputs).sites[0].spatial == (4, 4)


class Foreign(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_unknown_batchnorm_is_refused_unless_excluded():
    model = nn.Sequential(nn.BatchNorm2d(3), Foreign(3))
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(WalkError, match=r"1: got Foreign.*exclude='1'"):
        walk(model, x)
    assert [s.name for s in walk(model, x, exclude="1")] == ["0"]


def test_patched_instance_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].forward = lambda x: x
    with pytest.raises(WalkError, match="forward of its own"):
        walk(model, torch.zeros(2, 3, 4, 4))


def test_lazy_batchnorm_is_refused_with_advice():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(WalkError, match="one forward pass"):
        walk(model, torch.zeros(2, 3, 4, 4))


def test_wrapped_models_are_refused_with_the_right_advice():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(WalkError, match=r"OptimizedModule.*torch\.compile the result"):
        walk(torch.compile(model), torch.zeros(2, 3, 4, 4))
    with pytest.raises(WalkError, match="DataParallel"):
        walk(nn.DataParallel(model), torch.zeros(2, 3, 4, 4))


def test_functional_use_of_a_batchnorms_tensors_is_noted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.batch_norm(x, self.bn.running_mean, self.bn.running_var)

    site = walk(Model(), torch.zeros(2, 3, 4, 4)).sites[0]
    assert site.calls == 0
    assert "outside of the module" in site.notes[0]


def test_smallest_map_of_several_calls_is_reported():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x).mean() + self.bn(F.max_pool2d(x, 4)).mean()

    site = walk(Pyramid(), torch.zeros(1, 3, 8, 8)).sites[0]
    assert site.spatial == (2, 2)
    assert site.elements == 4
    assert site.no_producer == "calls disagree"


def test_checkpointed_blocks_are_seen_through():
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.reentrant = reentrant

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=self.reentrant)

    for reentrant in (True, False):
        site = walk(Model(reentrant), torch.zeros(1, 3, 8, 8)).sites[0]
        assert site.producer.name == "block.0"
        assert site.activation.op == "relu"


def test_custom_autograd_function_counts_as_a_use():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.bn(x)
            return F.relu(x) + Double.apply(x)

    assert walk(Model(), torch.zeros(1, 3, 4, 4)).sites[0].activation is None


def test_walk_is_deterministic_and_order_is_data_flow():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.BatchNorm2d(3)
            self.first = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.last(self.first(x))

    model = Backwards()
    graph = walk(model, torch.zeros(1, 3, 4, 4))
    assert [s.name for s in graph] == ["first", "last"]
    assert graph == walk(copy.deepcopy(model), torch.zeros(1, 3, 4, 4))
    assert graph["last"].no_producer == "batch_norm"


def test_an_output_object_counts_as_a_use():
    site = walk(traps.Named(), torch.zeros(2, 3, 8, 8)).sites[0]
    assert site.activation is None


class RealOnly(nn.Module):
    """Needs values to run; in training its ReLU also serves another tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        if x.mean().item() > 1e9:
            return x
        y = self.relu(self.bn(self.conv(x)))
        return self.relu(y - 1) if self.training else y


def test_training_is_looked_at_where_values_are_needed_too():
    site = walk(RealOnly(), torch.zeros(2, 3, 8, 8)).sites[0]
    assert [r.obstacle is None for r in site.activation.removals] == [False, True]


def test_a_hook_that_may_change_the_input_hides_the_producer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].register_forward_pre_hook(lambda module, inputs: inputs)
    assert "hook" in walk(model, torch.zeros(2, 3, 8, 8)).sites[0].no_producer


def test_nested_attributes_python_rng_and_gradient_flags_come_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def train(self, mode=True):
            self.bn.weight.requires_grad_(False)
            return super().train(mode)

        def forward(this, x):  # noqa: N805 - not everybody says self
            random.random()
            this.seen["shapes"].append(x.shape)
            return F.relu(this.bn(x))

    model = Model()
    model.seen = {"shapes": []}
    state = random.getstate()
    site = walk(model, torch.zeros(2, 3, 4, 4)).sites[0]
    assert site.activation.removals[0].obstacle is None
    assert model.seen == {"shapes": []}
    assert random.getstate() == state
    assert model.bn.weight.requires_grad
