"""What examining a file brings to light."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.onnx.file.parity import Case
from normswap.onnx.proving.trials import Trial


@dataclass(frozen=True)
class Evidence:
    """Cases, and the trial that failed first, so that it can be looked into."""

    cases: list[Case]
    failing: Trial | None = None
    notes: tuple[str, ...] = ()
