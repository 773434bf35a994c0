"""What every layer must survive: compilers, copies, checkpointing, other processes."""

import copy
import io
import pickle

import pytest
import torch
from layer_blocks import NORMS, Block, batches, block, train_in_process
from torch import nn
from torch.utils.checkpoint import checkpoint

from normswap import layers
from normswap.errors import LayerError
from normswap.layers import (
    FilterResponseNorm2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    fuse,
    fused_classes,
)

WITHOUT_GRAPH_BREAK = {"frn", "brn", "frozen"}


def train(model, batches, run=None):
    """Outputs and gradients of a few steps of SGD."""
    run = model if run is None else run
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for x in batches:
        optimizer.zero_grad()
        y = run(x)
        y.square().mean().backward()
        optimizer.step()
        seen += [y.detach(), *(p.grad.clone() for p in model.parameters())]
    return seen, {name: b.clone() for name, b in model.named_buffers()}


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    torch.testing.assert_close(ours[1], theirs[1], **tolerance)


@pytest.mark.parametrize("name", NORMS)
def test_compiled_training_is_eager_training(name):
    torch._dynamo.reset()
    model = block(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name in WITHOUT_GRAPH_BREAK)
    ours = train(model, batches(), compiled)
    assert_same(ours, train(block(name), batches()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_compiled_eval_is_one_graph(name):
    torch._dynamo.reset()
    model = block(name)
    train(model, batches(2))
    model.eval()
    x = batches(1)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_export_with_a_dynamic_batch(name, strict):
    model = block(name).eval()
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        model, (torch.randn(2, 3, 6, 6),), dynamic_shapes=dynamic, strict=strict
    )
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_exported_frn_multiplies_instead_of_raising_to_a_power():
    model = FilterResponseNorm2d(4).eval()
    program = torch.export.export(model, (torch.randn(2, 4, 6, 6),)).run_decompositions()
    targets = " ".join(str(node.target) for node in program.graph.nodes)
    assert "pow" not in targets
    assert "batch_norm" not in targets


@pytest.mark.parametrize("name", NORMS)
def test_meta_device(name):
    with torch.device("meta"):
        model = Block(NORMS[name]())
    x = torch.empty(2, 3, 6, 6, device="meta")
    assert model(x).shape == (2, 2, 6, 6)
    assert model.eval()(x).shape == (2, 2, 6, 6)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_alike(name, duplicate):
    model = block(name)
    train(model, batches(2))
    if duplicate == "deepcopy":
        twin = copy.deepcopy(model)
    elif duplicate == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert_same(train(twin, batches()), train(model, batches()), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = block(name)

    def run(x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    ours = train(model, batches(5), run)
    assert_same(ours, train(block(name), batches(5)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NORMS)
def test_checkpointing_of_several_forwards_before_one_backward(name):
    def losses(model, run):
        for _ in range(3):
            model.zero_grad()
            sum(run(x).square().mean() for x in batches(3)).backward()
        return [p.grad for p in model.parameters()]

    plain, checked = block(name), block(name)
    expected = losses(plain, plain)
    ours = losses(checked, lambda x: checkpoint(checked, x, use_reentrant=False))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_checkpointing_of_the_same_batch_twice_before_one_backward(name):
    x = batches(1)[0]

    def gradients(model, run):
        run(batches(2)[1])
        (run(x).square().mean() + 2 * run(x).mean()).backward()
        return [p.grad for p in model.parameters()]

    plain, checked = block(name), block(name)
    expected = gradients(plain, plain)
    ours = gradients(checked, lambda x: checkpoint(checked, x, use_reentrant=False))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_repeated_forward_records_no_input():
    model = block("cbn")
    x = batches(1)[0]
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert not model.norm._link._inbox
    assert model.norm.iteration == 1


@pytest.mark.parametrize("name", NORMS)
def test_functional_call(name):
    model, twin = block(name), block(name)
    other = {name: p + 0.1 for name, p in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            parameter.copy_(other[key])
    for x in batches(3):
        torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), twin(x))


def test_functorch_differentiates_frn():
    layer = FilterResponseNorm2d(4)
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, 4, 5, 5)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_float64_and_devices_and_dtypes_of_the_constructor(name):
    kind = type(NORMS[name]())
    arguments = {"compensate": False} if "cbn" in name else {}
    layer = kind(4, device="cpu", dtype=torch.float64, **arguments)
    assert layer.weight.dtype == torch.float64
    assert layer(torch.randn(2, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64
    assert kind(4, affine=False, **arguments).weight is None
    layer.reset_parameters()
    assert "4" in repr(layer)


# frozen


@pytest.mark.parametrize(
    ("kind", "batch_norm", "shape"),
    [
        (FrozenBatchNorm1d, nn.BatchNorm1d, (5, 3)),
        (FrozenBatchNorm1d, nn.BatchNorm1d, (5, 3, 4)),
        (FrozenBatchNorm2d, nn.BatchNorm2d, (2, 3, 4, 4)),
        (FrozenBatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 4, 4)),
    ],
)
def test_frozen_is_batch_norm_in_eval_for_good(kind, batch_norm, shape):
    twin, layer = batch_norm(3), kind(3)
    for _ in range(3):
        twin(2 * torch.randn(shape) + 1)
    twin.eval()
    layer.load_state_dict(twin.state_dict(), strict=True)
    x = torch.randn(shape)
    assert torch.equal(layer.train()(x), twin(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    batch_norm(3).load_state_dict(layer.state_dict(), strict=True)
    without_counter = {k: v for k, v in twin.state_dict().items() if "tracked" not in k}
    kind(3).load_state_dict(without_counter, strict=True)
    assert len(without_counter) == 4
    assert not any(p.requires_grad for p in kind(3, trainable=False).parameters())


# fused


class Half(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("kind", fused_classes, ids=lambda kind: kind.__name__)
def test_fused_layers_drop_and_activate(kind):
    torch.manual_seed(0)
    arguments = (2, 4) if kind is nn.GroupNorm else (4,)
    norm = kind(*arguments, compensate=False) if "Cross" in kind.__name__ else kind(*arguments)
    rank = next((rank for rank in (1, 3) if f"{rank}d" in kind.__name__), 2)
    x = torch.randn(2, 4, *[5] * rank)
    keys = list(norm.state_dict())
    expected = torch.sigmoid(copy.deepcopy(norm)(x) / 2)
    fused = fuse(norm, Half(), nn.Sigmoid())
    assert fused is norm
    assert list(fused.state_dict()) == keys
    assert isinstance(fused, kind)
    assert [name for name, _ in fused.named_children()] == ["drop", "act"]
    pickled = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    torch.testing.assert_close(fused(x), expected)
    torch.testing.assert_close(pickled(x), expected)
    fresh = fused_classes[kind](*arguments, act=nn.ReLU())
    assert (fresh.eval()(x) >= 0).all()


def test_fuse_refuses_what_it_does_not_know():
    with pytest.raises(LayerError, match="BatchNorm2d"):
        fuse(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())


def test_the_public_names():
    assert layers.__all__ == sorted(layers.__all__, key=str)
    assert all(hasattr(layers, name) for name in layers.__all__)


# two processes


def test_two_processes_agree_on_gradients(tmp_path):
    names = list(NORMS)
    torch.multiprocessing.spawn(
        train_in_process, (tmp_path / "rendezvous", tmp_path, names), nprocs=2
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in names:
        torch.testing.assert_close(first[name], second[name])
        assert all(torch.isfinite(g).all() for g in first[name])
