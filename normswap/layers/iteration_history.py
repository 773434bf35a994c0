"""The last batches that a normaliser keeps, and the loan of them to a backward.

A ring of fixed size, written in place. A backward that needs the entries of its forward takes a
loan: should a later forward overwrite one of them first, the loan gets a copy of its own.

Shapes: n entries, G groups, C channels, F the weights of one channel.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.errors import LayerError

_REPEATABLE = 4
"""How many forwards without gradients keep what a reentrant checkpoint may come back for."""


class Batch(NamedTuple):
    """What one batch leaves behind, in the statistics' dtype.

    Attributes:
        offset: (C,), the mean less the producer's bias, where the layer follows one.
        variance: (C,), biased.
        base: (C,), ``⟨slope, w⟩ − variance`` under the weights of its time.
    """

    offset: Tensor
    variance: Tensor
    base: Tensor


class Past(NamedTuple):
    """Entries of the history, the oldest first.

    Attributes:
        offset, variance, base: (n, C), as in :class:`Batch`.
        patches: (G, F) of each, ∂mean/∂w; empty without compensation.
        slopes: ∂variance/∂w in pieces of (C, F, n), views of the ring; empty likewise.
        slots: where in the ring they are.
    """

    offset: Tensor
    variance: Tensor
    base: Tensor
    patches: list[Tensor]
    slopes: list[Tensor]
    slots: tuple[int, ...]


class Loan:
    """The slopes of some entries for as long as somebody holds this."""

    def __init__(self, ring: Tensor, slots: Sequence[int], weight: Tensor) -> None:
        self.ring, self.slots = ring, tuple(slots)
        self._weight, self._version = weakref.ref(weight), _version(weight)
        self._kept: dict[int, Tensor] = {}
        self._lost = False

    def slopes(self) -> list[Tensor]:
        """(C, F) of each entry.

        Raises:
            LayerError: one was overwritten after the weights had moved on.
        """
        if self._lost:
            raise LayerError(
                "CrossIterationBatchNorm.backward",
                got="a history that later forwards have overwritten",
                need="the history as it was in the forward",
                hint="one backward for each forward, before the weights change",
            )
        return [self._kept[slot] if slot in self._kept else self.ring[slot] for slot in self.slots]

    def rescue(self, slot: int, copies: list[Tensor]) -> None:
        """Prepare for ``slot`` to be overwritten; ``copies`` shares one copy among loans."""
        if slot not in self.slots or slot in self._kept or self._lost:
            return
        weight = self._weight()
        if weight is None or _version(weight) != self._version:
            # weights that have changed since make this backward an error in autograd too, so no
            # copy is spent on it: after each step of an optimizer that would be the usual case
            self._lost = True
            return
        if not copies:
            copies.append(self.ring[slot].clone())
        self._kept[slot] = copies[0]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class History:
    """A ring of the last ``size`` batches.

    Args:
        size: how many batches are remembered.
        lends: whether slopes are lent; the batch that has just left must then stay for a while.
    """

    def __init__(self, size: int, lends: bool = False) -> None:
        self.size = size
        self.slots = size + 1 if lends and size > 0 else size
        self.position = 0
        self._rows: deque[Tensor] = deque(maxlen=size)
        self._patches: deque[Tensor] = deque(maxlen=size)
        self._ring: Tensor | None = None
        self._forget_what_is_passing()

    def _forget_what_is_passing(self) -> None:
        self._views: dict[tuple[int, int], Tensor] = {}
        self._loans: list[weakref.ref[Loan]] = []
        self._repeatable: deque[Loan] = deque(maxlen=_REPEATABLE)
        self._seen: tuple[int, int] | None = None

    @property
    def filled(self) -> int:
        """How many batches there are."""
        return len(self._rows)

    @property
    def has_slopes(self) -> bool:
        """Whether the entries know how their variance depends on the weights."""
        return len(self._patches) > 0

    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept = [*self._rows, *self._patches, *([] if self._ring is None else [self._ring])]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def prepare(self, like: Tensor, slope: tuple[int, int] | None, dtype: torch.dtype) -> None:
        """Make room for batches of this kind; what does not fit any more is forgotten.

        Args:
            like: (C,), a statistic, which gives device and dtype.
            slope: (C, F), or None without compensation.
            dtype: what slopes are kept in.
        """
        if self._rows and self._rows[0].device != like.device:
            self._move(like.device)
        fits = not self._rows or (
            self._rows[0].dtype == like.dtype and self._rows[0].shape[1:] == like.shape
        )
        ring = self._ring
        if slope is None:
            fits = fits and ring is None
        else:
            fits = fits and ring is not None and ring.dtype == dtype and ring.shape[1:] == slope
        if fits:
            return
        self._rows.clear()
        self._patches.clear()
        self._views.clear()
        self._ring = None if slope is None else like.new_empty((self.slots, *slope), dtype=dtype)
        self.position = 0

    def past(self) -> Past | None:
        """All entries, or None if there are none."""
        if not self._rows:
            return None
        offset, variance, base = torch.stack(tuple(self._rows)).unbind(1)
        if self._ring is None:
            return Past(offset, variance, base, [], [], ())
        slots, runs = _slots_in_order(self.position, self.filled, self.slots)
        pieces = [self._view(run) for run in runs]
        return Past(offset, variance, base, list(self._patches), pieces, slots)

    def _view(self, run: tuple[int, int]) -> Tensor:
        if run not in self._views:
            assert self._ring is not None  # there are entries
            self._views[run] = self._ring[run[0] : run[1]].permute(1, 2, 0)
        return self._views[run]

    def lend(self, slots: Sequence[int], weight: Tensor) -> Loan:
        """Lend the slopes in ``slots`` to the backward of a forward with this ``weight``."""
        assert self._ring is not None  # slots are those of a past with slopes
        loan = Loan(self._ring, slots, weight)
        self._loans.append(weakref.ref(loan))
        return loan

    def keep(self, loan: Loan) -> None:
        """Hold a loan that no graph holds."""
        self._repeatable.append(loan)

    def has_moved(self, weight: Tensor) -> bool:
        """Whether this weight is another than the last time, or was written to since."""
        seen, self._seen = self._seen, (weight.data_ptr(), _version(weight))
        return seen not in (None, self._seen)

    def room(self) -> Tensor:
        """(C, F) to write the next batch's slope into."""
        assert self._ring is not None  # prepare() was told of slopes
        copies: list[Tensor] = []
        alive = [(ref, loan) for ref in self._loans if (loan := ref()) is not None]
        for _, loan in alive:
            if loan.ring is self._ring:
                loan.rescue(self.position, copies)
        self._loans = [ref for ref, _ in alive]
        return self._ring[self.position]

    def push(self, batch: Batch, patch: Tensor | None) -> None:
        """Put ``batch`` in the place of the oldest entry; its slope is in its room already."""
        if self.size == 0:
            return
        self._rows.append(torch.stack(batch))
        if patch is not None:
            self._patches.append(patch)
            self.position = (self.position + 1) % self.slots

    def state(self) -> dict[str, Tensor | int]:
        """Plain data, ready for a training checkpoint."""
        state: dict[str, Tensor | int] = {"position": self.position}
        if self._rows:
            state["rows"] = torch.stack(tuple(self._rows))
        if self._ring is not None and self._patches:
            slots, _ = _slots_in_order(self.position, self.filled, self.slots)
            state["patches"] = torch.stack(tuple(self._patches))
            state["slopes"] = self._ring[list(slots)]
        return state

    def load(self, state: dict[str, Tensor | int]) -> None:
        """Take over what ``state`` returned, into the same slots.

        Raises:
            LayerError: the state is one of version 0.1, which kept something else.
        """
        if "slope" in state:
            raise LayerError(
                "load_training_state",
                got="a history as CrossIterationBatchNorm kept it in version 0.1",
                need="one of this version",
                hint="finishing that run with the version that began it",
            )
        rows, patches, slopes = (state.get(name) for name in ("rows", "patches", "slopes"))
        self._forget_what_is_passing()
        self.position = int(state["position"])
        self._rows = deque(rows.clone() if isinstance(rows, Tensor) else (), maxlen=self.size)
        self._patches = deque(
            patches.clone() if isinstance(patches, Tensor) else (), maxlen=self.size
        )
        self._ring = None
        if isinstance(slopes, Tensor):
            slots, _ = _slots_in_order(self.position, self.filled, self.slots)
            self._ring = slopes.new_empty(self.slots, *slopes.shape[1:])
            self._ring[list(slots)] = slopes

    def _move(self, device: torch.device) -> None:
        self._rows = deque((row.to(device) for row in self._rows), maxlen=self.size)
        self._patches = deque((patch.to(device) for patch in self._patches), maxlen=self.size)
        self._ring = None if self._ring is None else self._ring.to(device)
        self._views.clear()

    def __getstate__(self) -> dict[str, Any]:
        twin = copy.copy(self.__dict__)
        for name in ("_views", "_loans", "_repeatable", "_seen"):
            del twin[name]
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_what_is_passing()


@lru_cache(maxsize=1024)
def _slots_in_order(
    position: int, filled: int, slots: int
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The slots of the entries, the oldest first, and the runs of neighbours among them."""
    order = tuple((position - i) % slots for i in range(filled, 0, -1))
    runs: list[tuple[int, int]] = []
    for slot in order:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return order, runs
