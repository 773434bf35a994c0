"""Matrix products on the CPU by oneDNN, where torch has it.

Torch gives float32 products on the CPU to MKL, which is two to three times as slow as oneDNN on
processors that are not Intel's, and slower still where one side is small. What torch's own compiler
calls for a linear layer reaches oneDNN; without it the product is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.layers.tracing import must_be_plain

_SMALL = 1 << 20
"""Multiplications below which a call of oneDNN's costs more than the product."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, (M, K) with (N, K) to (M, N)."""
    linear = _by_onednn(a, b)
    found: Tensor = a @ b.t() if linear is None else linear(a, b, None, "none", [], "")
    return found


def _by_onednn(a: Tensor, b: Tensor) -> Any:
    same = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if not same or a.numel() * b.shape[0] < _SMALL or must_be_plain():
        return None
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    usable = there and bool(torch.backends.mkldnn.enabled)
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if usable else None
