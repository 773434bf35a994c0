"""CBN as it is by default: the gradient through past batches, and a sampled compensation."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import LayerError
from normswap.layers import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    load_training_state,
    training_state,
)
from normswap.layers.batch_statistics import batch_moments
from normswap.layers.producers import Call, fold_weight
from normswap.layers.variance_slope import sampling_step, variance_slope

PRODUCERS = {
    "plain": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 12, 11)),
    "pointwise": (nn.Conv2d(3, 4, 1), (2, 3, 12, 11)),
    "pointwise of a large map": (nn.Conv2d(3, 4, 1), (2, 3, 40, 30)),
    "pointwise strided": (nn.Conv2d(3, 4, 1, stride=2), (2, 3, 21, 24)),
    "plain of a large map": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 40, 30)),
    "strided": (nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 3, 48, 24)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 3, 12, 13)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 12, 13)),
    "same": (nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(2, 1)), (2, 3, 24, 26)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 12, 11)),
    "depthwise": (nn.Conv2d(4, 4, 5, groups=4, padding=2), (2, 4, 12, 11)),
    "depthwise strided": (nn.Conv2d(4, 4, 3, groups=4, stride=2), (2, 4, 24, 24)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 7, 8)),
    "1d": (nn.Conv1d(3, 4, 3), (2, 3, 60)),
    "3d": (nn.Conv3d(3, 4, 3, padding=1), (2, 3, 10, 10, 9)),
    "linear": (nn.Linear(5, 4), (80, 5)),
}
NORMS = {2: CrossIterationBatchNorm1d, 3: CrossIterationBatchNorm1d}
NORMS |= {4: CrossIterationBatchNorm2d, 5: CrossIterationBatchNorm3d}
EXACT = ("depthwise strided", "transposed", "linear")


def producer_and_batch(name, dtype=torch.float64):
    torch.manual_seed(0)
    producer, shape = PRODUCERS[name]
    producer.reset_parameters()  # they were made before the seed
    return copy.deepcopy(producer).to(dtype), torch.randn(shape, dtype=dtype) + 0.3


def wired(producer, **arguments):
    channels = getattr(producer, "out_features", None) or producer.out_channels
    rank = 2 if isinstance(producer, nn.Linear) else producer.weight.dim()
    norm = NORMS[rank](channels, **arguments).to(producer.weight.dtype)
    norm.attach(producer)
    return nn.Sequential(producer, norm)


def nudge(module, scale=0.05):
    with torch.no_grad():
        module.weight.add_(scale * torch.randn_like(module.weight))


def test_what_the_default_is():
    norm = CrossIterationBatchNorm2d(4)
    assert (norm.through_history, norm.sampling, norm.window) == (True, 2, 8)
    assert not CrossIterationBatchNorm2d(4, compensate=False).through_history
    assert "through_history=True, sampling=2" in repr(norm)


@pytest.mark.parametrize("bad", [{"sampling": 0}, {"sampling": 1.5}, {"history_dtype": torch.int8}])
def test_bad_arguments(bad):
    with pytest.raises(LayerError, match="need"):
        CrossIterationBatchNorm2d(4, **bad)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", PRODUCERS)
def test_a_sampled_slope_has_the_batchs_own_length_along_the_weight(name, channels_last):
    producer, x = producer_and_batch(name)
    if channels_last:
        if x.dim() != 4:
            pytest.skip("no such format")
        producer, x = (t.to(memory_format=torch.channels_last) for t in (producer, x))
    with torch.no_grad():
        y = producer(x)
        weight = fold_weight(producer, producer.weight).flatten(0, 1)
        moments = batch_moments(y)
        slopes = []
        for sampling in (1, 2):
            slope = torch.empty(weight.shape, dtype=weight.dtype)
            along = variance_slope(
                producer, Call(x, y.shape), y, moments, None, sampling=sampling, out=slope
            )
            torch.testing.assert_close((slope * weight).sum(1), along)
            torch.testing.assert_close(along, 2 * moments[1])
            slopes.append(slope)
    exact, sampled = slopes
    assert (sampling_step(producer, y.shape, 2) == 1) == (name in EXACT)
    if name in EXACT:
        assert torch.equal(exact, sampled)
    else:
        assert not torch.equal(exact, sampled)
        # an estimate of the same thing
        assert torch.cosine_similarity(exact.flatten(), sampled.flatten(), 0) > 0.8


def test_small_maps_are_not_sampled():
    conv = nn.Conv2d(3, 4, 3)
    assert sampling_step(conv, torch.Size((2, 4, 7, 7)), 2) == 2
    assert sampling_step(conv, torch.Size((1, 4, 7, 7)), 2) == 1
    assert sampling_step(conv, torch.Size((2, 4, 56, 56)), 1) == 1


def test_large_maps_are_sampled_more_sparsely():
    conv = nn.Conv2d(3, 4, 3)
    maps = {size: torch.Size((2, 4, size, size)) for size in (7, 14, 28, 56)}
    steps = {size: sampling_step(conv, shape, 2) for size, shape in maps.items()}
    assert steps == {7: 2, 14: 3, 28: 4, 56: 8}
    assert sampling_step(conv, torch.Size((2, 4, 28, 28)), 6) == 6
    assert sampling_step(conv, torch.Size((2, 4, 28, 5)), 2) == 3
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    assert [sampling_step(depthwise, shape, 2) for shape in maps.values()] == [2, 2, 2, 8]
    strided = nn.Conv2d(4, 4, 3, groups=4, stride=2)
    assert [sampling_step(strided, shape, 2) for shape in maps.values()] == [1, 1, 4, 8]
    # one position of each is the least
    assert sampling_step(conv, torch.Size((5000, 4, 5, 5)), 2) == 5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", PRODUCERS)
def test_weights_that_stand_still_make_it_naive(name):
    producer, _ = producer_and_batch(name)
    model = wired(producer, window=4)
    naive = type(model[1])(model[1].num_features, window=4, compensate=False).double()
    for _ in range(6):
        x = torch.randn(PRODUCERS[name][1], dtype=torch.float64)
        y = model(x)
        producer._forward_hooks, hooks = {}, producer._forward_hooks
        torch.testing.assert_close(y, naive(producer(x)))
        producer._forward_hooks = hooks


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCERS)
def test_scaling_the_weights_has_no_gradient(name, half):
    """BatchNorm's scale invariance, whatever was left out of the maps."""
    producer, _ = producer_and_batch(name)
    model = wired(producer, window=4, eps=1e-12, history_dtype=half)
    for _ in range(5):
        model.zero_grad()
        y = model(torch.randn(PRODUCERS[name][1], dtype=torch.float64))
        (y * torch.randn_like(y)).sum().backward()
    radial = float((producer.weight.grad * producer.weight.detach()).sum().abs())
    # a slope in bfloat16 is rounded to a part in 256
    assert radial < (1e-8 if half is None else 1e-2) * float(producer.weight.grad.norm() + 1)


def test_means_are_exact_and_variances_near_where_the_slope_is_sampled():
    producer, _ = producer_and_batch("plain of a large map")
    model = wired(producer, window=4)
    batches = [torch.randn(2, 3, 40, 30, dtype=torch.float64) + i for i in range(4)]
    for x in batches[:-1]:
        model(x)
        nudge(producer, 0.01)
    _, window, _ = model[1]._window_statistics(producer(batches[-1]).detach())
    today = [producer(x) for x in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in today])
    torch.testing.assert_close(window.mean, means.mean(0))
    variances = torch.stack([y.var((0, 2, 3), unbiased=False) for y in today])
    expected = variances.mean(0) + means.var(0, unbiased=False)
    torch.testing.assert_close(window.variance, expected, rtol=5e-2, atol=0.0)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "new", "reentrant"])
@pytest.mark.parametrize("forwards", [1, 2, 4])
def test_several_forwards_before_one_backward(forwards, checkpointing):
    """Later forwards overwrite what the backwards of earlier ones need."""
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 12, 12, dtype=torch.float64) for _ in range(12)]
    upstream = torch.randn(2, 4, 10, 10, dtype=torch.float64)
    found = []
    for at_once in (1, forwards):
        torch.manual_seed(1)
        model = wired(nn.Conv2d(3, 4, 3).double(), window=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def run(x, model=model):
            if checkpointing is None:
                return model(x)
            return checkpoint(model, x.requires_grad_(), use_reentrant=checkpointing)

        gradients = []
        for start in range(0, len(batches), 4):
            optimizer.zero_grad()
            for first in range(start, start + 4, at_once):
                losses = [(run(x) * upstream).sum() for x in batches[first : first + at_once]]
                torch.stack(losses).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            optimizer.step()
        found.append(gradients)
    torch.testing.assert_close(found[0], found[1])


def test_a_backward_after_the_history_is_gone_is_refused():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(3, 4, 3), window=3)
    x = torch.randn(2, 3, 12, 12)
    for _ in range(3):
        late = model(x).sum()
    nudge(model[0])
    for _ in range(3):
        model(x)
    with pytest.raises(LayerError, match="overwritten"):
        late.backward()


def test_only_a_backward_that_is_outstanding_costs_a_copy():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(3, 4, 3), window=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loans = []
    for _ in range(6):
        optimizer.zero_grad()
        y = model(torch.randn(2, 3, 12, 12))
        loans.extend(ref() for ref in model[1]._history._loans)
        y.square().sum().backward()
        optimizer.step()
    assert len(loans) > 3
    assert not any(loan._kept for loan in loans)


def test_a_frozen_producer_needs_no_slope():
    torch.manual_seed(0)
    model = wired(nn.Conv2d(3, 4, 3).requires_grad_(False), window=4)
    trained = wired(copy.deepcopy(model[0]).requires_grad_(), window=4)
    trained[0]._forward_hooks.popitem(last=False)
    naive = CrossIterationBatchNorm2d(4, window=4, compensate=False)
    for _ in range(5):
        x = torch.randn(2, 3, 12, 12)
        y = model(x)
        y.sum().backward()
        trained(x)
        torch.testing.assert_close(y, naive(model[0](x)))
    assert "slopes" not in training_state(model)["1"]
    assert model[1].history_bytes() < 0.2 * trained[1].history_bytes()


def test_a_frozen_bias_alone_or_a_trained_bias_alone():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    model = wired(conv, window=4)
    for _ in range(5):
        x = torch.randn(2, 3, 12, 12)
        conv.bias.grad = None
        y = model(x)
        (y * torch.randn_like(y)).sum().backward()
        with torch.no_grad():
            conv.bias.add_(1.0)  # moves every batch of the window alike
    assert y.mean().abs() < 0.5
    assert conv.bias.grad.abs().max() < 1e-4


def test_a_frozen_weight_that_moves_all_the_same_is_followed():
    """A momentum encoder: no gradient, and another weight in every step."""
    torch.manual_seed(0)
    # the first batch of one is the second of the other, so that turns would differ
    model = wired(nn.Conv2d(3, 4, 3).requires_grad_(False), window=3, sampling=1)
    twin = wired(copy.deepcopy(model[0]).requires_grad_(), window=3, sampling=1)
    twin[0]._forward_hooks.popitem(last=False)
    for step in range(6):
        x = torch.randn(2, 3, 12, 12)
        ours, theirs = model(x), twin(x)
        if step > 3:
            torch.testing.assert_close(ours, theirs)
        nudge(model[0])
        with torch.no_grad():
            twin[0].weight.copy_(model[0].weight)


def test_half_the_memory_for_the_history():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3)
    full = wired(conv, window=4)
    half = wired(copy.deepcopy(conv), window=4, history_dtype=torch.bfloat16)
    half[0]._forward_hooks.popitem(last=False)
    for _ in range(6):
        x = torch.randn(2, 16, 12, 12)
        torch.testing.assert_close(half(x), full(x), rtol=1e-3, atol=1e-3)
        nudge(conv, 0.01)
        with torch.no_grad():
            half[0].weight.copy_(conv.weight)
    assert half[1].history_bytes() < 0.6 * full[1].history_bytes()


def test_another_device_or_dtype_keeps_or_drops_the_history():
    model = wired(nn.Conv2d(3, 4, 3), window=3)
    model(torch.randn(2, 3, 12, 12))
    model.double()
    model(torch.randn(2, 3, 12, 12).double())
    assert model[1]._history.filled == 1


def test_turning_modes_by_hand_keeps_the_producer_followed():
    model = wired(nn.Conv2d(3, 4, 3), window=3)
    for module in model.modules():
        module.training = False
    assert not model[0]._forward_hooks
    model(torch.randn(2, 3, 12, 12))
    for module in copy.deepcopy(model).modules():
        module.training = True
    for module in model.modules():
        module.training = True
    model(torch.randn(2, 3, 12, 12))
    assert model[1]._history.filled == 1


# --- one slope for several batches ----------------------------------------------------------------


def slopes_in_a_window(window, sampling, turn=0, steps=40):
    """For each step of a run, whether the batch had a slope of its own."""
    model = wired(nn.Conv2d(3, 4, 3), window=window, sampling=sampling)
    model[1].stagger(turn)
    own = []
    for _ in range(steps):
        own.append(not model[1]._history.borrows)
        model(torch.randn(2, 3, 6, 6))
    return own


def test_one_batch_in_sampling_squared_has_a_slope_of_its_own_and_one_in_each_window():
    assert all(slopes_in_a_window(window=4, sampling=1))
    assert [i for i, own in enumerate(slopes_in_a_window(8, 2, steps=13)) if own] == [0, 4, 8, 12]
    assert [i for i, own in enumerate(slopes_in_a_window(3, 2, steps=10)) if own] == [0, 3, 6, 9]
    assert [i for i, own in enumerate(slopes_in_a_window(8, 2, 1, steps=13)) if own] == [
        0,
        3,
        7,
        11,
    ]


def test_converted_layers_take_turns():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(8)]
    x = torch.randn(2, 3, 8, 8)
    model = normswap.convert(nn.Sequential(*blocks), "cbn", example_inputs=x).model.train()
    layers = [module for module in model.modules() if isinstance(module, CrossIterationBatchNorm2d)]
    model(x)
    for _ in range(8):
        assert sum(not layer._history.borrows for layer in layers) == 2
        model(x)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("window", [2, 4, 8])
def test_the_gradient_is_that_of_what_was_computed(window, turn):
    """In every step, whoever borrows from whom: the derivative along a direction by differences."""
    torch.manual_seed(0)
    model = wired(nn.Conv2d(3, 4, 3), window=window).double()
    model[1].stagger(turn)
    upstream = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for _ in range(2 * window + 3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        way = torch.randn_like(model[0].weight)
        sides = []
        for step in (-1e-6, 1e-6):
            twin = copy.deepcopy(model)
            with torch.no_grad():
                twin[0].weight.add_(way, alpha=step)
                sides.append((twin(x) * upstream).sum())
        model.zero_grad()
        (model(x) * upstream).sum().backward()
        expected = (sides[1] - sides[0]) / 2e-6
        torch.testing.assert_close(
            (model[0].weight.grad * way).sum(), expected, rtol=1e-5, atol=1e-6
        )
        nudge(model[0], 0.02)


@pytest.mark.parametrize("turn", range(3))
def test_a_history_with_turns_goes_on_where_it_stopped(turn):
    torch.manual_seed(0)
    model = wired(nn.Conv2d(3, 4, 3), window=4)
    model[1].stagger(turn)
    batches = torch.randn(14, 2, 3, 8, 8)
    for at, x in enumerate(batches):
        twin = wired(copy.deepcopy(model[0]), window=4)
        twin[0]._forward_hooks.popitem(last=False)
        load_training_state(twin, training_state(model))
        for later in batches[at:]:
            assert torch.equal(copy.deepcopy(model)(later), copy.deepcopy(twin)(later))
        model(x)
        nudge(model[0])


@pytest.mark.parametrize("steps", range(9, 15))
def test_a_smaller_window_takes_over_the_latest_batches_and_their_slopes(steps):
    torch.manual_seed(0)
    model, small = (wired(nn.Conv2d(3, 4, 3), window=n) for n in (8, 5))
    for _ in range(steps):
        nudge(model[0])
        with torch.no_grad():
            small[0].load_state_dict(model[0].state_dict())
        x = torch.randn(2, 3, 8, 8)
        model(x)
        small(x)
    fresh = wired(copy.deepcopy(small[0]), window=5)
    fresh[0]._forward_hooks.popitem(last=False)
    load_training_state(fresh, training_state(model))
    x = torch.randn(2, 3, 8, 8)
    nudge(small[0])
    with torch.no_grad():
        fresh[0].load_state_dict(small[0].state_dict())
    torch.testing.assert_close(fresh(x), small(x))


def test_a_history_of_other_turns_begins_anew():
    torch.manual_seed(0)
    model, twin = (wired(nn.Conv2d(3, 4, 3), window=4, sampling=n) for n in (1, 2))
    for _ in range(5):
        model(torch.randn(2, 3, 8, 8))
    load_training_state(twin, training_state(model))
    x = torch.randn(2, 3, 8, 8)
    plain = nn.functional.batch_norm(twin[0](x), None, None, training=True)
    torch.testing.assert_close(twin(x), plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_bad_or_empty_batch_harms_nobody_who_borrows(bad):
    """Whether it had a slope of its own or took another's."""
    for at in range(2, 8):
        torch.manual_seed(0)
        model = wired(nn.Conv2d(3, 4, 3), window=4)
        for step in range(16):
            x = torch.full((2, 3, 8, 8), bad) if step == at else torch.randn(2, 3, 8, 8)
            model.zero_grad()
            y = model(x)
            if step == at:
                continue
            y.square().mean().backward()
            assert torch.isfinite(y).all()
            assert torch.isfinite(model[0].weight.grad).all()
            nudge(model[0], 0.01)


def test_a_history_of_fewer_slopes_takes_less_memory():
    sizes = []
    for sampling in (1, 2):
        model = wired(nn.Conv2d(16, 32, 3), window=8, sampling=sampling)
        for _ in range(9):
            model(torch.randn(2, 16, 8, 8))
        sizes.append(model[1].history_bytes())
    assert sizes[1] < 0.6 * sizes[0]
