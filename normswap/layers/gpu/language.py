"""Triton's language, where there is Triton; elsewhere kernels are functions that nobody calls.

So every module of the package can be imported everywhere.
"""

from __future__ import annotations

from typing import Any

jit: Any
tl: Any

try:
    import triton
    import triton.language

    jit, tl = triton.jit, triton.language
except Exception:  # noqa: BLE001 - a Triton that does not start is none

    def _left_alone(function: Any = None, **options: Any) -> Any:  # noqa: ARG001
        return _left_alone if function is None else function

    jit, tl = _left_alone, None
