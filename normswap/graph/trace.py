"""What one forward pass did, as data: calls, the values they made and read, and what views did."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normswap.graph.sites import CallSite, Other


@dataclass(eq=False)
class Call:
    """One operation that ran.

    Attributes:
        op: canonical name.
        inputs: values it read, in order.
        module: the norm, activation or producer module that ran, or None for a plain function.
        slot: the name under which an ``nn.Sequential`` called the module, if one did.
        site: where a ReLU was called.
        view: for a view, what it did to the axes.
        shape: shape of the first input.
        own_weight: a producer's operation ran on the module's own input and stored weight.
        on_weights: it read nothing but what the model stores: no activations.
        output: the value it made or changed, the first if there are several.
        output_shape: shape of that value.
    """

    op: str
    inputs: tuple[int, ...]
    module: nn.Module | None = None
    slot: str | None = None
    site: CallSite | None = None
    view: View | None = None
    shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    own_weight: bool = False
    on_weights: bool = False
    output: int | None = None


@dataclass(frozen=True)
class View:
    """What a view did to the axes: a permutation, or (None) a reshape between two shapes."""

    permutation: tuple[int, ...] | None
    before: tuple[int, ...]
    after: tuple[int, ...]

    def source_axis(self, axis: int) -> int | None:
        """The axis before the view that ``axis`` after it runs along, whole and alone."""
        if self.permutation is not None:
            return self.permutation[axis]
        outer, inner = _product(self.after[:axis]), _product(self.after[axis + 1 :])
        for candidate, size in enumerate(self.before):
            if (
                size == self.after[axis]
                and _product(self.before[:candidate]) == outer
                and _product(self.before[candidate + 1 :]) == inner
            ):
                return candidate
        return None


@dataclass(eq=False)
class Trace:
    """What one forward pass did. Values are numbers; ``made`` and ``used`` index calls by value.

    ``stray_norms`` are norms whose tensors went into a functional ``batch_norm`` outside of them,
    ``others`` the calls of ``batch_norm`` on activations that belong to no norm, each once.
    """

    calls: list[Call] = field(default_factory=list)
    made: dict[int, Call] = field(default_factory=dict)
    used: dict[int, list[Call]] = field(default_factory=dict)
    stray_norms: set[nn.Module] = field(default_factory=set)
    others: dict[Any, Other] = field(default_factory=dict)

    @functools.cached_property
    def by_module(self) -> dict[nn.Module, list[Call]]:
        """The calls of every recorded module, in order; to be read when the run is over."""
        found: dict[nn.Module, list[Call]] = defaultdict(list)
        for call in self.calls:
            if call.module is not None:
                found[call.module].append(call)
        return dict(found)

    def forget(self, start: int) -> list[Call]:
        """Take back the calls from index ``start`` on, and return them."""
        gone = self.calls[start:]
        del self.calls[start:]
        for call in gone:
            for number in call.inputs:
                self.used[number].remove(call)
        return gone


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
