"""CrossIterationBatchNorm: the formula, its history, its wiring."""

import copy
import gc
import io
import math
import pickle
import weakref

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from normswap.errors import LayerError
from normswap.layers import (
    BatchRenorm2d,
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    load_training_state,
    training_state,
)

NORMS = {
    1: CrossIterationBatchNorm1d,
    2: CrossIterationBatchNorm2d,
    3: CrossIterationBatchNorm3d,
}


def wired(producer, norm, **attach):
    norm.attach(producer, **attach)
    return nn.Sequential(producer, norm)


def nudge(model, scale=0.1):
    """Move the weights, as an optimizer would."""
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def linear_map(producer):
    """(input, weight) to the output without bias, channels on axis 1."""

    def run(x, weight):
        y = torch.func.functional_call(producer, {"weight": weight}, (x,))
        shape = (1, -1, *([1] * (y.dim() - 2)))
        return y if producer.bias is None else y - producer.bias.view(shape)

    return run


@pytest.mark.parametrize("rule", ["max", "drop"])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_five_iterations_match_the_paper(rank, bias, compensate, rule):
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{rank}d")(2, 3, 2, padding=1, bias=bias).double()
    exact = {"through_history": False, "sampling": 1}
    norm = NORMS[rank](3, window=3, compensate=compensate, variance_rule=rule, **exact).double()
    model = wired(conv, norm)
    paper = reference.CrossIteration(linear_map(conv), 3, norm.eps, rule, compensate)
    for _ in range(5):
        x = torch.randn(2, 2, *[4] * rank, dtype=torch.float64, requires_grad=True)
        (wide_x, weight) = reference.wide(x, conv.weight)
        shift = reference.wide(conv.bias)[0] if bias else None
        expected = paper.step(wide_x, weight, shift)
        y = model(x)
        torch.testing.assert_close(y, expected)
        upstream = torch.randn_like(y)
        model.zero_grad()
        y.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(x.grad, wide_x.grad)
        torch.testing.assert_close(conv.weight.grad, weight.grad)
        # large steps, so that predicted variances below zero occur
        nudge(model, 0.5)


def test_the_rules_differ_where_a_predicted_variance_is_negative():
    torch.manual_seed(0)
    outputs = []
    for rule in ("max", "drop"):
        torch.manual_seed(0)
        model = wired(
            nn.Conv2d(2, 4, 1), CrossIterationBatchNorm2d(4, window=3, variance_rule=rule)
        )
        for _ in range(4):
            y = model(torch.randn(2, 2, 3, 3))
            nudge(model, 3.0)
        outputs.append(y)
    assert not torch.allclose(*outputs)


def test_gradcheck_with_the_history_held():
    from normswap.layers.iteration_window import _NormaliseAcrossIterations
    from normswap.layers.iteration_window import average as _average

    torch.manual_seed(0)
    past = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3, 2), (3,), (3,))
    )

    def call(x, weight, bias):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        window, _ = _average(
            mean.detach(), variance.detach(), past[0] - mean.detach(), past[1], "drop"
        )
        return _NormaliseAcrossIterations.apply(x, weight, bias, *window, 1e-5)

    def plain(x, weight, bias):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        window, _ = _average(mean, variance, past[0] - mean, past[1], "drop")
        return F.batch_norm(
            x, window.mean.detach(), window.variance.detach(), weight, bias, False, 0.0, 1e-5
        )

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    upstream = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(call(x, weight, bias), (x, weight, bias), upstream),
        torch.autograd.grad(_differentiable(x, weight, bias, past), (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(call(x, weight, bias), plain(x, weight, bias))


def _differentiable(x, weight, bias, past):
    from normswap.layers.iteration_window import average as _average

    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    window, _ = _average(mean, variance, past[0] - mean, past[1], "drop")
    shape = (1, -1, 1, 1)
    scale = weight / torch.sqrt(window.variance + 1e-5)
    return (x - window.mean.view(shape)) * scale.view(shape) + bias.view(shape)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_window_of_one_is_batch_norm(rank):
    norm = NORMS[rank](3, window=1)
    twin = getattr(nn, f"BatchNorm{rank}d")(3)
    model = wired(getattr(nn, f"Conv{rank}d")(2, 3, 2), norm)
    for _ in range(3):
        x = torch.randn(2, 2, *[4] * rank)
        y = model[0](x)
        ours, theirs = y.detach().requires_grad_(), y.detach().requires_grad_()
        upstream = torch.randn_like(y)
        a, b = norm(ours), twin(theirs)
        a.backward(upstream)
        b.backward(upstream)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)


def test_frozen_weights_make_it_naive():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    ours = wired(conv, CrossIterationBatchNorm2d(4, window=4))
    naive = CrossIterationBatchNorm2d(4, window=4, compensate=False)
    for _ in range(6):
        x = torch.randn(2, 3, 7, 7)
        torch.testing.assert_close(ours(x), naive(conv(x)), rtol=1e-4, atol=1e-5)


def test_the_compensated_mean_is_that_of_the_stored_batch_under_todays_weights():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    norm = CrossIterationBatchNorm2d(4, window=3).double()
    model = wired(conv, norm)
    batches = [torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    model(batches[0])
    nudge(model, 1.0)
    model(batches[1])
    nudge(model, 1.0)
    _, window, _ = norm._window_statistics(conv(batches[2]).detach())
    today = torch.stack([conv(x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(window.mean, today)


def test_a_mean_far_from_zero_costs_no_digits():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.bias.fill_(1e3)
    wide_conv = copy.deepcopy(conv).double()
    model = wired(conv, CrossIterationBatchNorm2d(3, window=3))
    wide = wired(wide_conv, CrossIterationBatchNorm2d(3, window=3).double())
    for _ in range(4):
        # multiples of 1/16: exact in float32 beside the bias, so only the layer can lose digits
        with torch.no_grad():
            conv.weight.copy_((conv.weight * 4).round() / 4)
            wide_conv.weight.copy_(conv.weight)
        x = (torch.randn(2, 2, 4, 4) * 4).round() / 4
        torch.testing.assert_close(model(x).double(), wide(x.double()), rtol=1e-3, atol=1e-3)
        nudge(model, 0.3)


def test_burn_in_is_batch_norm_and_then_the_window_fills():
    torch.manual_seed(0)
    norm, twin = CrossIterationBatchNorm2d(3, window=4, burn_in=2), nn.BatchNorm2d(3)
    model = wired(nn.Conv2d(2, 3, 1), norm)
    same = []
    for _ in range(5):
        x = torch.randn(2, 2, 3, 3)
        same.append(torch.allclose(model(x), twin(model[0](x)), atol=1e-5))
    assert same == [True, True, True, False, False]
    assert norm._history.filled == 3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_eval_is_batch_norm_to_the_bit_and_state_dicts_go_both_ways(rank):
    norm, twin = NORMS[rank](3), getattr(nn, f"BatchNorm{rank}d")(3)
    model = wired(getattr(nn, f"Conv{rank}d")(2, 3, 1), norm)
    model(torch.randn(2, 2, *[4] * rank))
    twin.load_state_dict(norm.state_dict(), strict=True)
    norm.load_state_dict(twin.state_dict(), strict=True)
    assert norm.state_dict().keys() == twin.state_dict().keys()
    assert sorted(model.state_dict())[:2] == ["0.bias", "0.weight"]
    y = model[0](torch.randn(2, 2, *[4] * rank))
    assert torch.equal(norm.eval()(y), twin.eval()(y))


def test_momentum_none_is_a_cumulative_average():
    norm, twin = (
        CrossIterationBatchNorm2d(2, momentum=None, compensate=False),
        nn.BatchNorm2d(2, momentum=None),
    )
    for batch in torch.randn(4, 3, 2, 4, 4):
        norm(batch)
        twin(batch)
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)


def test_one_element_per_channel():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3, window=4))
    for _ in range(4):
        y = model(torch.randn(1, 2, 1, 1))
        y.sum().backward()
    assert y.abs().min() > 0
    assert torch.isfinite(y).all()
    assert torch.isfinite(model[1].running_var).all()


def test_nan_reaches_the_output_but_stays_nowhere():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3, window=3))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 2, 3, 3)
    model(x)
    twin(x)
    bad = x.clone()
    bad[0, 0, 0, 0] = math.nan
    assert torch.isnan(model(bad)).all()
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    # the bad entry takes a place in the window but has no part in it
    torch.testing.assert_close(model(x), twin(x))


def test_empty_batch_changes_nothing():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3))
    model(torch.randn(2, 2, 3, 3))
    before = training_state(model)["1"]
    x = torch.randn(0, 2, 3, 3, requires_grad=True)
    model(x).sum().backward()
    after = training_state(model)["1"]
    assert before.keys() == after.keys()
    assert before["iteration"] == after["iteration"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_in_float32(dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    model = wired(conv, CrossIterationBatchNorm2d(4, window=3))
    reference_model = copy.deepcopy(model)
    for _ in range(4):
        x = 300 * torch.randn(2, 3, 8, 8)
        with torch.autocast("cpu", dtype):
            y = model(x)
        expected = reference_model(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
        y.float().square().sum().backward()
    assert conv.weight.grad is not None
    assert all(
        ring.dtype == torch.float32
        for ring in training_state(model)["1"].values()
        if isinstance(ring, torch.Tensor)
    )


def test_model_in_bfloat16():
    model = wired(nn.Conv2d(3, 4, 3), CrossIterationBatchNorm2d(4, window=3)).bfloat16()
    for _ in range(3):
        y = model(torch.randn(2, 3, 6, 6, dtype=torch.bfloat16))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


def test_channels_last_is_kept_and_changes_nothing():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(4, 6, 3, padding=1, groups=2), CrossIterationBatchNorm2d(6, window=3))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for _ in range(4):
        x = torch.randn(2, 4, 5, 5)
        y = last(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)
        delta = 0.1 * torch.randn_like(model[0].weight)
        with torch.no_grad():
            model[0].weight.add_(delta)
            last[0].weight.add_(delta)


# wiring


def test_training_without_a_producer_is_refused_and_naive_needs_none():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(LayerError, match="before attach"):
        CrossIterationBatchNorm2d(3)(x)
    CrossIterationBatchNorm2d(3).eval()(x)
    CrossIterationBatchNorm2d(3, compensate=False)(x)


def test_an_input_that_the_producer_did_not_make_is_refused():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3))
    with pytest.raises(LayerError, match="has not made"):
        model[1](torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("producer", "message"),
    [(nn.ReLU(), "no convolution"), (nn.Conv2d(2, 5, 1), "5 channels")],
)
def test_attach_refuses(producer, message):
    with pytest.raises(LayerError, match=message):
        CrossIterationBatchNorm2d(3).attach(producer)


@pytest.mark.parametrize(
    "arguments",
    [{"window": 0}, {"burn_in": -1}, {"variance_rule": "x"}, {"track_running_stats": False}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(LayerError, match="need"):
        CrossIterationBatchNorm2d(3, **arguments)


def _copies():
    def pickled(model):
        return pickle.loads(pickle.dumps(model))

    def saved(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return [copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("duplicate", _copies(), ids=["deepcopy", "pickle", "torch.save"])
def test_copies_are_wired_to_themselves(duplicate):
    torch.manual_seed(0)
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3, window=3))
    x = torch.randn(2, 2, 4, 4)
    model(x)
    pending = model[0](x)
    twin = duplicate(model)
    assert not twin[1]._link._inbox
    del pending
    assert twin[1].producer is twin[0]
    assert model[1].producer is model[0]
    nudge(twin, 1.0)
    # the copy follows its own weights and its own history
    assert not torch.allclose(model(x), twin(x))
    assert twin[1]._history.filled == model[1]._history.filled == 2
    twin[1].detach()
    assert not twin[0]._forward_hooks
    assert model[0]._forward_hooks
    model(x)
    assert len(list(model.children())) == 2
    assert not list(model[1].children())


def test_detach_leaves_no_trace():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3))
    model(torch.randn(2, 2, 4, 4))
    model[1].detach()
    assert model[1].producer is None
    assert not model[0]._forward_hooks
    assert model[1]._history.filled == 0


def test_attaching_again_replaces_the_producer():
    first, second = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    norm = CrossIterationBatchNorm2d(3)
    norm.attach(first)
    norm.attach(second)
    assert not first._forward_hooks
    norm(second(torch.randn(2, 2, 3, 3)))


def test_no_activation_outlives_the_forward():
    memory = np.zeros((2, 2, 17, 19), dtype=np.float32)
    alive = weakref.ref(memory)
    x = torch.from_numpy(memory)
    del memory
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3))
    model(x)
    del x
    gc.collect()
    assert alive() is None


def test_a_producer_called_without_its_normaliser_keeps_one_input_at_most():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3))
    for _ in range(5):
        model[0](torch.randn(2, 2, 17, 19))
    assert len(model[1]._link._inbox) == 1
    model.eval()
    model[0](torch.randn(2, 2, 17, 19))
    assert not model[1]._link._inbox


def test_eval_forwards_record_nothing():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3)).eval()
    y = model[0](torch.randn(2, 2, 3, 3))
    assert not model[1]._link._inbox
    model[1](y)
    assert model[1].iteration == 0


def test_history_is_bounded_and_free_of_the_graph():
    conv = nn.Conv2d(8, 32, 3)
    model = wired(conv, CrossIterationBatchNorm2d(32, window=5))
    for _ in range(9):
        model(torch.randn(2, 8, 6, 6))
    rings = [v for v in training_state(model)["1"].values() if isinstance(v, torch.Tensor)]
    assert sum(ring.numel() for ring in rings) <= 1.1 * 4 * conv.weight.numel()
    assert not any(ring.requires_grad for ring in rings)


def test_one_producer_for_several_normalisers_and_calls_in_any_order():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 1)
    norms = [CrossIterationBatchNorm2d(3, window=3) for _ in range(2)]
    alone = copy.deepcopy(conv)
    single = CrossIterationBatchNorm2d(3, window=3)
    single.attach(alone)
    for norm in norms:
        norm.attach(conv)
    for _ in range(3):
        a, b = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
        first, second = conv(a), conv(b)
        norms[1](second)
        out = norms[0](first)
        torch.testing.assert_close(out, single(alone(a)))


def test_no_grad_training_forwards_count_as_in_batch_norm():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3, window=3))
    with torch.no_grad():
        model(torch.randn(2, 2, 4, 4))
    assert model[1]._history.filled == 1
    assert model[1].num_batches_tracked == 1


def test_a_frozen_producer_works():
    model = wired(nn.Conv2d(2, 3, 1).requires_grad_(False), CrossIterationBatchNorm2d(3))
    model(torch.randn(2, 2, 4, 4)).sum().backward()
    assert model[1].weight.grad is not None


def test_functional_call_follows_the_weights_it_is_given():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3, window=3))
    twin = copy.deepcopy(model)
    other = {"0.weight": torch.randn_like(model[0].weight)}
    with torch.no_grad():
        twin[0].weight.copy_(other["0.weight"])
    for _ in range(3):
        x = torch.randn(2, 2, 4, 4)
        torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), twin(x))


def test_gradient_accumulation_counts_each_forward():
    model = wired(nn.Conv2d(2, 3, 1), CrossIterationBatchNorm2d(3, window=8))
    for _ in range(3):
        model(torch.randn(2, 2, 4, 4)).sum().backward()
    assert model[1].iteration == model[1]._history.filled == 3


def test_training_resumes_to_the_bit(tmp_path):
    def fresh():
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 4, 3, padding=1)
        model = wired(conv, CrossIterationBatchNorm2d(4, window=4, burn_in=1))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def train(model, optimizer, batches):
        outputs = []
        for x in batches:
            y = model(x)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
            outputs.append(y.detach())
        return outputs

    torch.manual_seed(3)
    batches = [torch.randn(2, 2, 5, 5) for _ in range(9)]
    unbroken = train(*fresh(), batches)
    model, optimizer = fresh()
    train(model, optimizer, batches[:6])
    torch.save((model.state_dict(), training_state(model)), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    model, optimizer = fresh()
    model.load_state_dict(weights)
    load_training_state(model, state)
    for ours, expected in zip(train(model, optimizer, batches[6:]), unbroken[6:], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("broken_off_after", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"through_history": False, "variance_rule": "drop"}, {"compensate": False}, {"frozen": 1}],
    ids=["default", "paper", "naive", "frozen producer"],
)
def test_a_history_goes_on_in_the_same_places(arguments, broken_off_after):
    """Sums run over the places, so that only the same ones give the same bits."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1).requires_grad_("frozen" not in arguments)
    settings = {name: value for name, value in arguments.items() if name != "frozen"}
    model = wired(conv, CrossIterationBatchNorm2d(4, window=4, **settings))
    batches = torch.randn(10, 2, 2, 9, 9)
    for x in batches[:broken_off_after]:
        model(x)
    twin = wired(copy.deepcopy(conv), CrossIterationBatchNorm2d(4, window=4, **settings))
    twin[0]._forward_hooks.popitem(last=False)
    state = training_state(model)
    load_training_state(twin, copy.deepcopy(state))
    for name, value in training_state(twin)["1"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["1"][name]))
    # the oldest first
    newest = state["1"]["rows"][-1, 0]
    offset = conv(x).mean((0, 2, 3)) - conv.bias * ("compensate" not in arguments)
    torch.testing.assert_close(newest, offset, rtol=1e-4, atol=1e-5)
    for x in batches[broken_off_after:]:
        assert torch.equal(model(x), twin(x))


def test_training_state_of_another_model_is_refused():
    state = training_state(nn.Sequential(BatchRenorm2d(2)))
    with pytest.raises(LayerError, match="differ"):
        load_training_state(nn.Sequential(nn.ReLU(), BatchRenorm2d(2)), state)


def papers_statistics(past, weight, bias, apply):
    """μ̄ and σ̄² of the paper's section 3 in plain autograd, the history not detached."""
    means, seconds = [], []
    for x, then, then_bias in past:
        axes = [0, *range(2, apply(x, weight, bias).dim())]
        leaf = then.clone().requires_grad_()
        nu = apply(x, leaf, then_bias).square().mean(axes)
        # one row of the Taylor term per channel
        moved = []
        for channel in range(len(nu)):
            (slope,) = torch.autograd.grad(nu[channel], leaf, retain_graph=True)
            moved.append((slope * (weight - then)).sum())
        means.append(apply(x, weight, bias).mean(axes))
        seconds.append(nu.detach() + torch.stack(moved))
    return means, seconds


@pytest.mark.parametrize("kind", ["plain", "grouped", "transposed", "linear"])
def test_gradient_through_the_history_is_that_of_the_papers_formula(kind):
    torch.manual_seed(0)
    make = {
        "plain": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
        "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False),
        "linear": lambda: nn.Linear(5, 4, bias=False),
    }[kind]
    producer = make().double()
    shape = (4, 5) if kind == "linear" else (2, producer.in_channels, 7, 7)
    kind_of_norm = CrossIterationBatchNorm1d if kind == "linear" else CrossIterationBatchNorm2d
    channels = getattr(producer, "out_features", None) or producer.out_channels
    norm = kind_of_norm(channels, window=3, through_history=True, sampling=1).double()
    with torch.no_grad():
        norm.weight.normal_()
    norm.attach(producer)

    def apply(x, weight, bias):
        return torch.func.functional_call(producer, {"weight": weight}, (x,))

    past = []
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64) + 0.5
        past.append((x, producer.weight.detach().clone(), None))
        norm(producer(x))
        with torch.no_grad():
            producer.weight.add_(0.02 * torch.randn_like(producer.weight))

    x = torch.randn(shape, dtype=torch.float64)
    upstream = torch.randn_like(apply(x, producer.weight, None))
    weight = producer.weight.detach().clone().requires_grad_()
    hooks = producer._forward_hooks.copy()
    producer._forward_hooks.clear()
    y = apply(x, weight, None)
    axes = [0, *range(2, y.dim())]
    means, seconds = papers_statistics(past, weight, None, apply)
    means, seconds = [y.mean(axes), *means], [y.square().mean(axes), *seconds]
    mean = torch.stack(means).mean(0)
    nu = torch.stack(
        [torch.maximum(s, m.square()) for s, m in zip(seconds, means, strict=True)]
    ).mean(0)
    column = (1, -1, *[1] * (y.dim() - 2))
    scale = torch.rsqrt(nu - mean.square() + norm.eps) * norm.weight.detach()
    expected = (y - mean.view(column)) * scale.view(column) + norm.bias.detach().view(column)
    expected.backward(upstream)
    producer._forward_hooks.update(hooks)

    producer.weight.grad = None
    found = norm(producer(x))
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(producer.weight.grad, weight.grad, rtol=1e-8, atol=1e-9)


def test_scaling_the_weights_has_no_gradient_through_the_history():
    """BatchNorm's scale invariance, which a detached history breaks."""
    radial = {}
    for through in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, bias=False).double()
        norm = CrossIterationBatchNorm2d(4, eps=1e-12, window=4, through_history=through).double()
        norm.attach(conv)
        for _ in range(4):
            conv.weight.grad = None
            y = norm(conv(torch.randn(2, 3, 6, 6, dtype=torch.float64)))
            (y * torch.randn_like(y)).sum().backward()
        radial[through] = float((conv.weight.grad * conv.weight.detach()).sum().abs())
    assert radial[True] < 1e-8
    assert radial[False] > 0.1


def test_gradient_through_the_history_reaches_the_bias_and_survives_checkpointing():
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for wrap in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3)
        norm = CrossIterationBatchNorm2d(4, window=3, through_history=True)
        norm.attach(conv)
        block = nn.Sequential(conv, norm)
        for _ in range(3):
            x = torch.randn(2, 3, 6, 6)
            y = checkpoint(block, x, use_reentrant=False) if wrap else block(x)
            conv.zero_grad()
            (y * torch.randn_like(y)).sum().backward()
        gradients.append((conv.weight.grad, conv.bias.grad))
    # a bias moves every batch of the window alike, so the mean takes it out
    assert gradients[0][1].abs().max() < 1e-4
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)


def test_gradient_through_a_history_that_does_not_follow_the_weights_is_refused():
    with pytest.raises(LayerError, match="compensate"):
        CrossIterationBatchNorm2d(4, compensate=False, through_history=True)


def test_an_operation_between_the_producer_and_the_layer_is_noticed():
    conv = nn.Conv2d(3, 4, 3)
    norm = CrossIterationBatchNorm2d(4, window=4)
    norm.attach(conv)
    x = torch.randn(4, 3, 8, 8)
    norm(conv(x).contiguous(memory_format=torch.channels_last))  # a copy is no other tensor
    norm.reset_history()
    with pytest.raises(LayerError, match="has not made"):
        norm(conv(x).relu())


class HoldsItsNorm(nn.Conv2d):
    """A convolution that carries its norm, as detectron2's do."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = CrossIterationBatchNorm2d(self.out_channels, window=3)
        self.norm.attach(self)

    def forward(self, x):
        return self.norm(super().forward(x)).relu()


def test_inside_its_convolution_it_computes_what_it_does_behind_it():
    torch.manual_seed(0)
    inside = HoldsItsNorm(2, 3, 3)
    behind = wired(nn.Conv2d(2, 3, 3), CrossIterationBatchNorm2d(3, window=3))
    behind[0].load_state_dict(inside.state_dict(), strict=False)
    models = {inside: inside.parameters(), behind: behind.parameters()}
    optimizers = [torch.optim.SGD(parameters, 0.1) for parameters in models.values()]
    for _ in range(5):
        x = torch.randn(2, 2, 6, 6)
        found, right = inside(x), behind(x).relu()
        torch.testing.assert_close(found, right)
        for output, optimizer in zip((found, right), optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
    twin = copy.deepcopy(inside)
    assert twin.norm.producer is twin
    torch.testing.assert_close(twin.eval()(x), inside.eval()(x))
    inside.norm.detach()
    assert not inside._forward_pre_hooks


def test_whoever_restores_a_producers_hooks_leaves_one():
    """The walker puts hooks back that the layer took off in eval mode, and asks nobody."""
    model = wired(nn.Conv2d(2, 3, 3), CrossIterationBatchNorm2d(3)).train()
    hooks = dict(model[0]._forward_hooks)
    model.eval()
    assert not model[0]._forward_hooks
    model[0]._forward_hooks.update(hooks)
    model.train()
    assert len(model[0]._forward_hooks) == 1
    model[1].detach()
    assert not model[0]._forward_hooks
