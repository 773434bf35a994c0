"""BatchNorms of other authors: recognised by what they compute, declared, or at least named."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import traps
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

import normswap
from normswap import convert, plan, walk
from normswap.errors import PlanError, SwapError, WalkError
from normswap.graph import foreign, norms


class Buffers(nn.Module):
    """DETR's and maskrcnn-benchmark's frozen BN: four buffers and some arithmetic."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.hidden = [eps]
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        weight, bias, mean, var = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.hidden[0]).rsqrt()
        return x * scale + (bias - mean * scale)


class NoEps(Buffers):
    def __init__(self, channels):
        super().__init__(channels, 0.0)


class Activated(nn.Module):
    """ABN: one module for the norm and its activation, which is a word."""

    def __init__(self, channels, activation="leaky_relu", eps=1e-3):
        super().__init__()
        self.activation, self.eps, self.momentum = activation, eps, 0.07
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        if self.activation == "relu":
            return F.relu(x, inplace=True)
        return F.leaky_relu(x, 0.02) if self.activation == "leaky_relu" else x


class WithChild(Activated):
    """The activation is a child, behind a dropout."""

    def __init__(self, channels):
        super().__init__(channels, "none")
        self.dropped, self.act = nn.Dropout(0.3), nn.PReLU(channels)

    def forward(self, x):
        return self.act(self.dropped(super().forward(x)))


class Synchronised(nn.BatchNorm2d):
    def forward(self, x):
        shape = x.shape
        x = x.reshape(shape[0], shape[1], -1)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        ).reshape(shape)


class Greek(nn.Module):
    """Keras' names, and parameters that hold the statistics."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.moving_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.moving_var = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x):
        mean, var = self.moving_mean, self.moving_var
        return F.batch_norm(x, mean, var, self.gamma, self.beta, eps=1e-6)


class Broadcast(nn.Module):
    """Holds everything in the form in which it is multiplied; trains γ and β."""

    def __init__(self, channels):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x):
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt() * self.weight + self.bias


FOREIGN = [Buffers, NoEps, Activated, WithChild, Synchronised, Greek, Broadcast]


def network(kind, channels=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), kind(channels), nn.Conv2d(channels, 4, 1))
    for name, tensor in [*model[1].named_parameters(), *model[1].named_buffers()]:
        if tensor.is_floating_point() and "act" not in name:
            low, high = (0.5, 2.0) if "var" in name or name == "s2" else (-1.0, 1.0)
            tensor.data.uniform_(low, high)
    return model.eval()


def images(rows=2):
    return torch.randn(rows, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("target", ["frozen", "brn", "cbn", "naive-cbn", "syncbn", "bn"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_exact_targets_are_exact_on_foreign_batchnorms(kind, target):
    model, x = network(kind), images()
    right = model(x)
    result = convert(model, target, example_inputs=x)
    assert set(result.replaced) == {"1"}
    assert result.kept == {}
    torch.testing.assert_close(result.model(x), right, rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(result.model))
    torch.testing.assert_close(again(x), right, rtol=1e-5, atol=1e-5)


def test_matched_group_norm_keeps_its_activation_and_its_flags():
    x = images()
    for kind, act in ((Activated, nn.LeakyReLU), (WithChild, nn.PReLU)):
        model = network(kind)
        slope = copy.deepcopy(model[1])
        norm = convert(model, "gn", example_inputs=x).model[1]
        assert isinstance(norm, nn.GroupNorm)
        assert type(norm.act) is act
        assert norm.eps == slope.eps
    frozen = convert(network(Buffers), "gn", example_inputs=x).model[1]
    assert not frozen.weight.requires_grad


@pytest.mark.parametrize("target", ["gn", "frn", "frozen"])
def test_parameters_in_another_form_go_on_being_trained(target):
    with torch.no_grad():
        norm = convert(network(Broadcast), target, example_inputs=images()).model[1]
    assert norm.weight.shape == (8,)
    assert norm.weight.requires_grad
    assert norm.bias.requires_grad


def test_the_relu_inside_becomes_a_tlu():
    model, x = network(lambda c: Activated(c, "relu")), images()
    site = walk(model, x).sites[0]
    assert (site.activation.op, site.activation.fused, site.producer.name) == ("relu", True, "0")
    norm = convert(model, "frn", example_inputs=x).model[1]
    assert norm.tau.shape == (8,)
    assert isinstance(norm.act, nn.Identity)


def test_momentum_and_eps_are_what_the_class_says():
    x = images()
    norm = convert(network(Activated), "bn", example_inputs=x).model[1]
    assert (norm.momentum, norm.eps) == (0.07, 1e-3)
    assert convert(network(Greek), "bn", example_inputs=x).model[1].eps == 1e-6


@pytest.mark.parametrize("target", ["bn", "brn", "cbn", "syncbn", "gn", "gbn"])
@pytest.mark.parametrize("kind", [NoEps, lambda c: FrozenBatchNorm2d(c, eps=0.0)])
def test_no_eps_becomes_one_that_torch_can_train_with(kind, target):
    x = images(4)
    model = convert(network(kind), target, example_inputs=x).model
    assert 0 < model[1].eps < 1e-37
    assert model.train()(x).isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_other_ranks_carry_their_activation_too(rank):
    shape = (4, 5, *([4] * rank))
    model = nn.Sequential(Activated(5)).eval()
    x = torch.randn(shape)
    right = model(x)
    for target in ("frozen", "brn", "naive-cbn"):
        twin = convert(copy.deepcopy(model), target, example_inputs=x).model
        torch.testing.assert_close(twin(x), right, rtol=1e-5, atol=1e-5)
    kept = plan(model, "bn", example_inputs=x).kept
    assert "2d maps only" in kept["0"]


def test_the_optimizer_follows_renamed_parameters():
    model, x = network(Greek), images()
    optimizer = torch.optim.SGD([{"params": model[1].parameters()}, {"params": []}], 0.1)
    optimizer.param_groups[1]["params"].extend([model[0].weight])
    norm = convert(model, "gn", example_inputs=x, optimizer=optimizer).model[1]
    assert norm.weight in set(optimizer.param_groups[0]["params"])
    assert norm.bias in set(optimizer.param_groups[0]["params"])


class Identity(Buffers):
    """Holds everything and uses nothing."""

    def forward(self, x):
        return x


class PerSample(Activated):
    def forward(self, x):
        return F.group_norm(x, 1, self.weight, self.bias)


class Elsewhere(Activated):
    """BatchNorm of something else than its input."""

    def forward(self, x):
        return super().forward(x.flip(1))


@pytest.mark.parametrize("kind", [Identity, PerSample, Elsewhere])
def test_what_only_looks_like_a_batchnorm_is_none(kind):
    module = kind(6)
    assert not norms.is_batchnorm(module)
    graph = walk(nn.Sequential(module), torch.zeros(2, 6, 4, 4))
    assert not graph.sites
    assert [o.name for o in graph.others] == (["0:batch_norm"] if kind is Elsewhere else [])


def test_an_instance_norm_with_statistics_is_no_batchnorm():
    assert not norms.is_batchnorm(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


def test_looking_at_a_foreign_module_leaves_no_trace():
    module = WithChild(4).train()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    held, rng = dict(vars(module)), torch.get_rng_state()
    assert norms.is_batchnorm(module)
    assert all(vars(module)[k] is v for k, v in held.items())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert module.training
    assert module.act.training


def test_models_on_meta_and_in_half_precision_are_recognised_too():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), Activated(8))
    assert len(walk(model, images())) == 1
    assert len(walk(network(Buffers).to(torch.bfloat16), images().to(torch.bfloat16))) == 1


# --- what cannot be replaced is named -------------------------------------------------------------


class OwnBuffers(nn.Module):
    """BigGAN's way: the block itself normalises, twice, by buffers of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        for index in (1, 2):
            self.register_buffer(f"mean{index}", torch.zeros(4))
            self.register_buffer(f"var{index}", torch.ones(4))

    def forward(self, x):
        x = self.bn(self.conv(x))
        for _ in range(2):
            x = F.batch_norm(x, self.mean1, self.var1)
        return torch.batch_norm(x, None, None, self.mean2, self.var2, False, 0.1, 1e-5, False)


class Listed(nn.Module):
    """BatchNorms that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.norms = [nn.BatchNorm2d(4), {"last": nn.BatchNorm2d(4)}]

    def forward(self, x):
        x = self.norms[0](self.bn(self.conv(x)))
        return self.norms[1]["last"](x)


class Bare(nn.Module):
    """The batch's own statistics, no buffers at all, in one of two branches."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(x)
        return F.batch_norm(x, None, None, training=True) + F.batch_norm(
            x, None, None, training=True
        )


NAMED = {
    OwnBuffers: {":batch_norm": "mean1", ":batch_norm.2": "mean2"},
    Listed: {"norms[0]": "no submodule", "norms[1]['last']": "no submodule"},
    Bare: {":batch_norm": "calls batch_norm itself", ":batch_norm.2": "calls batch_norm itself"},
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("inside", [False, True])
def test_every_other_batch_norm_is_named_in_plan_and_kept(kind, inside):
    model, prefix = kind(), ""
    if inside:
        model, prefix = nn.Sequential(model), "0"
    result = convert(model, "gn", example_inputs=images())
    assert len(result.replaced) == 1
    assert len(result.kept) == len(NAMED[kind])
    for name, text in NAMED[kind].items():
        found = result.kept[prefix + name if name[0] == ":" else f"{prefix}.{name}".lstrip(".")]
        assert text in found
    again = normswap.Plan.from_json(result.plan.to_json())
    assert again == result.plan


def test_weights_that_are_normalised_are_not_named():
    trap = traps.TRAPS["weight normaliser"]
    assert walk(trap.build(), trap.inputs).others == ()

    class Halved(nn.Module):
        def forward(self, weight):
            return F.batch_norm(weight[None], None, None, training=True)[0]

    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", Halved())
    assert walk(nn.Sequential(conv, nn.BatchNorm2d(4)), images()).others == ()


def test_a_model_of_functional_norms_alone_is_told_so():
    class Only(nn.Module):
        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    made = plan(Only(), "gn", example_inputs=images())
    assert list(made.kept) == [":batch_norm"]
    assert "Only calls batch_norm itself" in str(made.idle)


# --- declared -------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Names of its own."""

    def __init__(self, channels):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("m", torch.zeros(channels))
        self.register_buffer("s2", torch.ones(channels))

    def forward(self, x):
        return F.silu(F.batch_norm(x, self.m, self.s2, self.g, self.b, eps=0.01))


class NeedsGPU(Odd):
    def forward(self, x):
        if not x.is_cuda:
            raise RuntimeError("no kernel for cpu")
        return x


@pytest.fixture
def declare(monkeypatch):
    monkeypatch.setattr(foreign, "_declared", {})
    yield lambda cls, **roles: normswap.register_batchnorm(cls, **roles)
    foreign._known.clear()


def test_a_declared_class_is_converted_with_its_activation(declare):
    x = images()
    assert list(plan(network(Odd), "gn", example_inputs=x).kept) == ["1:batch_norm"]
    declare(Odd, weight="g", bias="b", mean="m", var="s2")
    model = network(Odd)
    right = model(x)
    site = walk(model, x).sites[0]
    assert (site.name, site.activation.op, site.activation.fused) == ("1", "silu", True)
    result = convert(model, "frozen", example_inputs=x)
    torch.testing.assert_close(result.model(x), right, rtol=1e-5, atol=1e-5)
    assert result.model[1].eps == 0.01


def test_a_plan_for_a_declared_class_asks_for_the_declaration(declare):
    declare(Odd, weight="g", bias="b", mean="m", var="s2")
    made = plan(network(Odd), "gn", example_inputs=images())
    foreign._declared.clear()
    foreign._known.clear()
    with pytest.raises(SwapError, match=r"nobody has declared.*--batchnorm 'package.module:Odd"):
        convert(network(Odd), made)


def test_a_declaration_that_is_wrong_is_refused(declare):
    model, x = network(Odd), images()
    declare(Odd, weight="b", bias="g", mean="m", var="s2")
    with pytest.raises(WalkError, match=r"Odd: got a class that was declared .* something else"):
        walk(model, x)
    declare(Odd, weight="g", bias="b", mean="mu", var="s2")
    with pytest.raises(WalkError, match=r"no tensor of shape .C,. as 'mu'"):
        walk(model, x)
    declare(Odd, weight="g", bias="b", mean="m", var="s2", activation="relu")
    with pytest.raises(WalkError, match="something else"):
        walk(model, x)
    with pytest.raises(PlanError, match="a class that derives from"):
        normswap.register_batchnorm("Odd")


def test_what_runs_elsewhere_only_is_believed(declare):
    roles = {"weight": "g", "bias": "b", "mean": "m", "var": "s2"}
    declare(NeedsGPU, **roles)
    with pytest.raises(WalkError, match=r"no kernel for cpu.*ε is unknown"):
        norms.is_batchnorm(NeedsGPU(4))
    declare(NeedsGPU, **roles, eps=0.01, activation="relu")
    module = NeedsGPU(4)
    assert norms.is_batchnorm(module)
    assert norms.state_of(module).eps == 0.01
    assert isinstance(norms.fused_parts(module)[1], nn.ReLU)
