"""CBN: statistics over the last iterations, brought to today's weights; BN in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from normswap import checks
from normswap.graph.norms import state_of
from normswap.graph.sites import Site
from normswap.layers import producer_problem
from normswap.recipes import base


@dataclass(frozen=True)
class CrossIterationBatchNorm(base.Tracked):
    """Cross-Iteration Batch Normalization; exactly BN in eval mode.

    Args:
        window: number of iterations k whose statistics are averaged, the current one included.
        burn_in: training iterations of plain BN before the window opens.
        variance_rule: ``"max"`` as in the paper, ``"drop"`` as in its reference implementation.
        through_history: let the gradient pass through past batches too, which the paper does not:
            without that, training at batch 2 is far worse.
        sampling: follow the variance from every how many-th row and column of a map, and from fewer
            of large maps, in one of as many batches as it leaves positions out of; 1 for all.
        half_history: keep the history in bfloat16, in little more than half the memory.

    Reference:
        Yao et al. 2020, Cross-Iteration Batch Normalization, arXiv 2002.05712, section 3.
    """

    target: ClassVar[str] = "cbn"
    fallback: ClassVar[str] = "brn"
    wired: ClassVar[bool] = True
    family: ClassVar[str] = "CrossIterationBatchNorm"
    layers: ClassVar[tuple[type[nn.Module], ...]] = base.ranks("CrossIterationBatchNorm")
    apart: ClassVar[str | None] = (
        "CBN: the window of past batches is each process's own and is not shared"
    )
    formerly: ClassVar[Mapping[str, Any]] = {"sampling": 1}
    compensate: ClassVar[bool] = True

    window: int = 8
    burn_in: int = 0
    variance_rule: Literal["max", "drop"] = "max"
    through_history: bool = True
    sampling: int = 2
    half_history: bool = False

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        yield "window", checks.whole(self.window, 1), "a positive integer"
        yield "burn_in", checks.whole(self.burn_in, 0), "an integer of at least 0"
        yield "variance_rule", self.variance_rule in ("max", "drop"), "'max' or 'drop'"
        yield "through_history", isinstance(self.through_history, bool), "True or False"
        yield "sampling", checks.whole(self.sampling, 1), "a positive integer"
        yield "half_history", isinstance(self.half_history, bool), "True or False"

    def refusal(self, site: Site, model: nn.Module) -> str | None:
        refusal = base.needs_running_statistics(site)
        if refusal is not None or not self.compensate:
            return refusal
        producer = site.producer
        refusal = base.needs_a_producer(site)
        if refusal is not None or producer is None:
            return refusal
        module = model.get_submodule(producer.name)
        problem = producer_problem(module, around=producer.around)
        if problem is None and not producer.plain and producer.kind != "Conv2dSame":
            problem = f"{producer.kind} does not run on its stored weight"
        return problem

    def settings(self, norm: nn.Module) -> dict[str, Any]:
        own = super().settings(norm)
        half = own.pop("half_history")
        own["history_dtype"] = torch.bfloat16 if half else None
        return {"compensate": self.compensate, **own}

    def wire(
        self, layer: Any, producer: nn.Module, *, norm: nn.Module, init: str
    ) -> Callable[[], None]:
        del norm, init
        layer.attach(producer)
        undo: Callable[[], None] = layer.detach
        return undo

    def stagger(self, layer: Any, number: int) -> None:
        layer.stagger(number)

    def let_go(self, layer: Any) -> None:
        layer.detach()

    def schedule(self, layer: Any) -> dict[str, int]:
        return {"burn_in": int(layer.burn_in)}

    def set_schedule(self, layer: Any, schedule: dict[str, int]) -> None:
        layer.burn_in = schedule["burn_in"]

    def fitted_schedule(self, layer: Any, iterations: int) -> dict[str, int]:
        longest = int(base.LONGEST_SCHEDULE * iterations)
        # at first weights move farther than the first-order prediction reaches
        if layer.burn_in > longest or (layer.burn_in == 0 and base.looks_fresh(state_of(layer))):
            return {"burn_in": longest}
        return self.schedule(layer)


@dataclass(frozen=True)
class NaiveCrossIterationBatchNorm(CrossIterationBatchNorm):
    """CBN without its Taylor compensation: known to be worse, needs no producer."""

    target: ClassVar[str] = "naive-cbn"
    fallback: ClassVar[str] = "keep"
    wired: ClassVar[bool] = False
    layers: ClassVar[tuple[type[nn.Module], ...]] = ()  # they are CBN's
    compensate: ClassVar[bool] = False

    through_history: bool = False
    sampling: int = 1

    def limits(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().limits()
        # what only compensation has a use for
        yield "through_history", self.through_history is False, "False: nothing is compensated"
        yield "sampling", self.sampling == 1, "1: nothing is compensated"
        yield "half_history", self.half_history is False, "False: nothing is compensated"
