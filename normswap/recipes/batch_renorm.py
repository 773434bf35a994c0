"""BRN: batch statistics in training, corrected towards the running ones; BN in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from normswap import checks
from normswap.graph.norms import state_of
from normswap.recipes import base

_PAPER_RUN = 130_000  # steps of the paper's run, section 4
_PAPER_SCHEDULE = {"warmup": 5_000, "r_ramp": 35_000, "d_ramp": 20_000}


@dataclass(frozen=True)
class BatchRenorm(base.Tracked):
    """Batch Renormalization; exactly BN in eval mode.

    Args:
        r_max: bound of the scale correction r, 1 or more.
        d_max: bound of the shift correction d, 0 or more.
        momentum: share of the newest batch in the running statistics.
        warmup: training iterations of plain BN before r and d open.
        r_ramp: iterations over which r's bound grows from 1 to ``r_max``.
        d_ramp: iterations over which d's bound grows from 0 to ``d_max``.

    Reference:
        Ioffe 2017, Batch Renormalization, arXiv 1702.03275, algorithm 1.
    """

    target: ClassVar[str] = "brn"
    family: ClassVar[str] = "BatchRenorm"
    layers: ClassVar[tuple[type[nn.Module], ...]] = base.ranks("BatchRenorm")
    apart: ClassVar[str | None] = "BRN: the correction r, d comes from each process's own batch"

    r_max: float = 3.0
    d_max: float = 5.0
    momentum: float = 0.01
    warmup: int = 0
    r_ramp: int = 0
    d_ramp: int = 0

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        yield "r_max", checks.number(self.r_max, 1), "a number of at least 1"
        yield "d_max", checks.number(self.d_max, 0), "a number of at least 0"
        yield "momentum", checks.number(self.momentum, 0, 1), "a number from 0 to 1"
        for name in ("warmup", "r_ramp", "d_ramp"):
            yield name, checks.whole(getattr(self, name), 0), "an integer of at least 0"

    def schedule(self, layer: nn.Module) -> dict[str, int]:
        return {name: int(getattr(layer, name)) for name in _PAPER_SCHEDULE}

    def set_schedule(self, layer: Any, schedule: dict[str, int]) -> None:
        layer.set_schedule(**schedule)

    def fitted_schedule(self, layer: Any, iterations: int) -> dict[str, int]:
        own = self.schedule(layer)
        length = own["warmup"] + max(own["r_ramp"], own["d_ramp"])
        if length == 0 and base.looks_fresh(state_of(layer)):
            return {k: round(v * iterations / _PAPER_RUN) for k, v in _PAPER_SCHEDULE.items()}
        longest = base.LONGEST_SCHEDULE * iterations
        if length <= longest or int(layer.iteration) >= length:  # it fits, or is over
            return own
        return {name: int(value * longest / length) for name, value in own.items()}
