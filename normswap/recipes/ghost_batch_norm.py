"""GBN: batch statistics over parts of a large batch in training; BN in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from normswap import checks
from normswap.recipes import base


@dataclass(frozen=True)
class GhostBatchNorm(base.Tracked):
    """Ghost Batch Normalization; exactly BN in eval mode.

    Args:
        size: samples whose statistics are taken together.

    Reference:
        Hoffer, Hubara & Soudry 2017, Train longer, generalize better, arXiv 1705.08741,
        algorithm 1.
    """

    target: ClassVar[str] = "gbn"
    family: ClassVar[str] = "GhostBatchNorm"
    layers: ClassVar[tuple[type[nn.Module], ...]] = base.ranks("GhostBatchNorm")
    apart: ClassVar[str | None] = "GBN: each process splits its own batch"

    size: int = 32

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        yield "size", checks.whole(self.size, 1), "a positive integer"
