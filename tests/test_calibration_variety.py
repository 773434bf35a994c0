"""Images made from images, by which what is solved from few fits others too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.calibration import moments_alone
from normswap.calibration.steady import Moments
from normswap.calibration.variety import _KINDS, varied


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count, seed=0, size=(12, 16), channels=3):
    return torch.randn(count, channels, *size, generator=drawn(seed))


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (32, 48)])
def test_every_kind_keeps_the_form_and_differs_from_what_was_given(kind, channels, size):
    x = images(6, size=size, channels=channels)
    before = x.clone()
    made = kind(x, drawn(1))
    assert made.shape == x.shape
    assert made.isfinite().all()
    assert torch.equal(x, before)
    assert torch.equal(made, kind(x, drawn(1)))
    if size != (1, 1):
        assert not torch.equal(made, x)
    assert kind(x.double(), drawn(1)).dtype == torch.float64


def test_what_was_given_comes_first_and_each_kind_is_made_of_as_many():
    batches = [images(4, 1), images(4, 2), images(4, 3)]
    found = list(varied(batches, 8, drawn()))
    assert all(a is b for a, b in zip(found, batches, strict=False))
    assert len(found) == 3 + 2 * len(_KINDS)


@pytest.mark.parametrize(
    "batch",
    [
        (images(2), images(2)),
        {"x": images(2)},
        [images(1)[0]],
        torch.randn(2, 8),
        torch.ones(2, 3, 4, 4, dtype=torch.int64),
    ],
)
def test_what_is_no_batch_of_images_is_left_as_it_is(batch):
    assert list(varied([batch], 8, drawn())) == [batch]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_moments_are_of_the_images_and_of_those_made_from_them():
    teacher, x = network(), images(6)
    model = normswap.convert(copy.deepcopy(teacher), "gn", example_inputs=x).model
    found = moments_alone(model, teacher, [x], drawn())["1"]
    with torch.no_grad():
        seen = teacher[0](x)
    assert len(found.mean) == 6 * (1 + len(_KINDS))
    torch.testing.assert_close(found.mean[:6], seen.mean((2, 3)))
    torch.testing.assert_close(found.square[:6], seen.square().mean((2, 3)))
    both = found + Moments(found.mean[:2], found.square[:2])
    assert len(both.mean) == len(found.mean) + 2


def test_layers_that_share_nothing_need_no_images(monkeypatch):
    teacher, x = network(), images(6)
    model = normswap.convert(copy.deepcopy(teacher), "frn", example_inputs=x).model
    monkeypatch.delattr("normswap.calibration.closed_form.varied")
    assert moments_alone(model, teacher, [x], drawn()) == {}
