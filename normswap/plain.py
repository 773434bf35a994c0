"""Plain data: what every JSON reader takes. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def or_none(value: float) -> float | None:
    """A number; None for NaN."""
    return None if math.isnan(value) else value


def plain(value: Any) -> Any:
    """JSON's types alone: no NaN; tuples, paths, tensors and NumPy scalars are brought to them."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, str | int | type(None)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
