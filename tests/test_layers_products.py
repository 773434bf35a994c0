"""Matrix products: oneDNN's and torch's own are the same."""

from __future__ import annotations

import pytest
import torch

from normswap.layers.products import product


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (64, 300, 98), (4, 33, 512), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_product_whatever_the_layout(
    sizes: tuple[int, int, int], transposed: tuple[bool, bool], dtype: torch.dtype
) -> None:
    m, n, k = sizes
    made = torch.Generator().manual_seed(0)
    factors = []
    for rows, turned in zip((m, n), transposed, strict=True):
        shape = (k, rows) if turned else (rows, k)
        factor = torch.randn(shape, generator=made, dtype=dtype)
        factors.append(factor.t() if turned else factor)
    a, b = factors
    found = product(a, b)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), a.double() @ b.double().t(), rtol=1e-5, atol=1e-4)


def test_does_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(6, 5), torch.randn(4, 5)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(product(a, b), a @ b.t())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(product(a, b), a @ b.t())


def test_of_nothing_is_nothing() -> None:
    assert product(torch.zeros(0, 3), torch.zeros(2, 3)).shape == (0, 2)
    assert torch.equal(product(torch.zeros(2, 0), torch.zeros(3, 0)), torch.zeros(2, 3))
