"""The last batches that a normaliser keeps, and the loan of them to a backward.

A ring of fixed size, written in place. The batch of this forward has its place in it, beside those
it is averaged with, so that nothing is put together first. A backward that needs the entries of
its forward takes a loan: should a later forward overwrite one of them first, the loan gets a copy
of its own.

Shapes: n entries, k = n + 1 with the present batch, G groups, C channels, F the weights of one
channel.
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
from normswap.layers.batch_statistics import vector_kernels_for

_SMALL = 1 << 17
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
    """Entries of the history as they were.

    Attributes:
        offset, variance: (n, C), as in :class:`Batch`.
    """

    offset: Tensor
    variance: Tensor


class Present(NamedTuple):
    """The window: past entries, and a row among them for the present batch.

    Attributes:
        here: the present batch's row.
        offset, base: (k, C), as in :class:`Batch`; undefined for the present batch.
        patches: (k, G, F), ∂mean/∂w.
        slopes: ∂variance/∂w in pieces of (C, F, rows).
        gap: before which piece the present batch's row is, if it is in none.
        slots: where in the ring the past entries are.
    """

    here: int
    offset: Tensor
    base: Tensor
    patches: Tensor
    slopes: list[Tensor]
    gap: int | None
    slots: tuple[int, ...]


class Loan:
    """The slopes and patches of some entries for as long as somebody holds this."""

    def __init__(self, ring: Tensor, patches: Tensor, slots: Sequence[int], weight: Tensor) -> None:
        self.ring, self.slots = ring, tuple(slots)
        self._patches = patches
        self._weight, self._version = weakref.ref(weight), _version(weight)
        self._kept: dict[int, Tensor] = {}
        self._lost = False

    def slopes(self) -> list[Tensor]:
        """(C, F) of each entry.

        Raises:
            LayerError: one was overwritten after the weights had moved on.
        """
        self._check()
        kept = self._kept
        rows = self.ring.unbind(0)
        return [kept[slot] if slot in kept else rows[slot] for slot in self.slots]

    def patches(self) -> Tensor:
        """(k, G, F) of the window.

        Raises:
            LayerError: as for slopes.
        """
        self._check()
        return self._patches

    def _check(self) -> None:
        if self._lost:
            raise LayerError(
                "CrossIterationBatchNorm.backward",
                got="a history that later forwards have overwritten",
                need="the history as it was in the forward",
                hint="one backward for each forward, before the weights change",
            )

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
        if not self._kept:
            self._patches = self._patches.clone()
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
        self.filled = 0
        self._rows: Tensor | None = None
        self._patches: Tensor | None = None
        self._ring: Tensor | None = None
        self._forget_what_is_passing()

    def _forget_what_is_passing(self) -> None:
        self._loans: list[weakref.ref[Loan]] = []
        self._repeatable: deque[Loan] = deque(maxlen=_REPEATABLE)
        self._seen: tuple[int, int] | None = None
        self._forget_views()

    def _forget_views(self) -> None:
        self._kind: tuple[Any, ...] | None = None
        self._views: dict[tuple[int, int], Tensor] = {}

    @property
    def has_slopes(self) -> bool:
        """Whether the entries know how their variance depends on the weights."""
        return self.filled > 0 and self._ring is not None

    @property
    def here(self) -> int:
        """The row of the present batch: behind the others where all slots are taken by them."""
        return self.position if self.slots > self.size else self.size

    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept = [t for t in (self._rows, self._patches, self._ring) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def prepare(
        self, like: Tensor, folded: tuple[int, int, int] | None, dtype: torch.dtype
    ) -> None:
        """Make room for batches of this kind; what does not fit any more is forgotten.

        Args:
            like: (C,), a statistic, which gives device and dtype.
            folded: (G, C/G, F), or None without compensation.
            dtype: what slopes are kept in.
        """
        kind = (like.device, like.dtype, like.shape, folded, dtype)
        if kind == self._kind:
            return
        self._move(like.device)
        if self._fits(like, folded, dtype):
            self._kind = kind
            return
        self.position = self.filled = 0
        self._forget_views()
        with torch.inference_mode(False):
            self._rows = like.new_zeros((self.size + 1, 3, *like.shape))
            self._ring = self._patches = None
            if folded is not None:
                groups, per_group, taps = folded
                self._patches = like.new_zeros((self.size + 1, groups, taps))
                self._ring = like.new_empty((self.slots, groups * per_group, taps), dtype=dtype)
        self._kind = kind

    def _fits(self, like: Tensor, folded: tuple[int, int, int] | None, dtype: torch.dtype) -> bool:
        rows, ring, patches = self._rows, self._ring, self._patches
        if rows is None or rows.dtype != like.dtype or rows.shape[2:] != like.shape:
            return False
        if folded is None or ring is None or patches is None:
            return folded is None and ring is None
        groups, per_group, taps = folded
        return (
            ring.dtype == dtype
            and ring.shape[1:] == (groups * per_group, taps)
            and patches.shape[1:] == (groups, taps)
        )

    def past(self) -> Past | None:
        """All entries, or None if there are none."""
        if self.filled == 0:
            return None
        assert self._rows is not None  # there are entries
        runs = _window(self.position, self.filled, self.size, self.slots).runs
        rows = torch.cat([self._rows[start:end] for start, end in runs])
        return Past(rows[:, 0], rows[:, 1])

    def place(self) -> Tensor:
        """(G, F) to write the present batch's patch into, before anything else is asked."""
        assert self._patches is not None  # prepare() was told of slopes
        self._rescue()
        return self._patches[self.here]

    def present(self) -> Present:
        """The window with the present batch in its place."""
        assert self._rows is not None  # prepare() was told of slopes
        assert self._patches is not None
        assert self._ring is not None
        window = _window(self.position, self.filled, self.size, self.slots)
        rows, patches = self._rows, self._patches
        runs = window.runs
        gap: int | None = window.gap
        if self.filled < self.size:
            rows, patches = rows[window.rows], patches[window.rows]
        elif self.slots > self.size and self._ring.numel() < _SMALL:
            runs, gap = [(0, self.slots)], None  # one product in place of two
        slopes = [self._view(run) for run in runs]
        return Present(window.here, rows[:, 0], rows[:, 2], patches, slopes, gap, window.slots)

    def _view(self, run: tuple[int, int]) -> Tensor:
        if run not in self._views:
            assert self._ring is not None  # there are entries
            self._views[run] = self._ring[run[0] : run[1]].permute(1, 2, 0)
        return self._views[run]

    def lend(self, present: Present, weight: Tensor) -> Loan:
        """Lend slopes and patches to the backward of a forward with this ``weight``."""
        assert self._ring is not None  # a window has slopes
        loan = Loan(self._ring, present.patches, present.slots, weight)
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
        """(C, F) to write the present batch's slope into."""
        assert self._ring is not None  # prepare() was told of slopes
        return self._ring[self.position]

    def _rescue(self) -> None:
        if not self._loans:
            return
        copies: list[Tensor] = []
        alive = [(ref, loan) for ref in self._loans if (loan := ref()) is not None]
        for _, loan in alive:
            if loan.ring is self._ring:
                loan.rescue(self.position, copies)
        self._loans = [ref for ref, _ in alive]

    def forget_values(self, mean: Tensor, variance: Tensor) -> None:
        """What has just been entered may not be finite, as its moments are, and must harm nobody.

        It does not count then, but whoever multiplies it by 0 must not meet a NaN.
        """
        assert self._patches is not None
        room, patch = self.room(), self._patches[self.here]
        kernels = vector_kernels_for(mean)
        if kernels is not None and kernels.forget(room, patch, mean, variance):
            return
        finite = torch.isfinite(mean + variance)
        room.copy_(torch.where(finite.unsqueeze(1), room, 0.0).nan_to_num_())
        patch.nan_to_num_(posinf=0.0, neginf=0.0)

    def push(self, batch: Batch) -> None:
        """Put ``batch`` in the place of the oldest entry; its slope and patch are there already."""
        if self.size == 0:
            return
        assert self._rows is not None  # prepare() has been called
        torch.stack(batch, out=self._rows[self.position])
        if self._patches is not None and self.here != self.position:
            self._patches[self.position].copy_(self._patches[self.here])
        self.position = (self.position + 1) % self.slots
        self.filled = min(self.filled + 1, self.size)

    def state(self) -> dict[str, Tensor | int]:
        """Plain data, ready for a training checkpoint; the oldest entry first."""
        state: dict[str, Tensor | int] = {"position": self.position}
        if self.filled == 0 or self._rows is None:
            return state
        slots = list(_slots_in_order(self.position, self.filled, self.slots))
        state["rows"] = self._rows[slots]
        if self._ring is not None and self._patches is not None:
            state["patches"] = self._patches[slots]
            state["slopes"] = self._ring[slots]
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
        self._forget_what_is_passing()
        self.position, self.filled = int(state["position"]), 0
        self._rows = self._patches = self._ring = None
        rows, patches, slopes = (state.get(name) for name in ("rows", "patches", "slopes"))
        if not isinstance(rows, Tensor) or self.size == 0:
            return
        self.filled = min(len(rows), self.size)
        slots = list(_slots_in_order(self.position, self.filled, self.slots))
        self._rows = _placed(rows, slots, self.size + 1)
        if isinstance(patches, Tensor) and isinstance(slopes, Tensor):
            self._patches = _placed(patches, slots, self.size + 1)
            self._ring = _placed(slopes, slots, self.slots)

    def _move(self, device: torch.device) -> None:
        if self._rows is None or self._rows.device == device:
            return
        self._rows = self._rows.to(device)
        self._patches = None if self._patches is None else self._patches.to(device)
        self._ring = None if self._ring is None else self._ring.to(device)
        self._forget_views()

    def __getstate__(self) -> dict[str, Any]:
        twin = copy.copy(self.__dict__)
        for name in ("_views", "_kind", "_loans", "_repeatable", "_seen"):
            del twin[name]
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_what_is_passing()


def _placed(entries: Tensor, slots: list[int], size: int) -> Tensor:
    """The latest of ``entries`` in these slots of a ring."""
    ring = entries.new_zeros(size, *entries.shape[1:])
    ring[slots] = entries[-len(slots) :]
    return ring


def _slots_in_order(position: int, filled: int, slots: int) -> tuple[int, ...]:
    """The slots of the entries, the oldest first."""
    return tuple((position - i) % slots for i in range(filled, 0, -1))


class _Window(NamedTuple):
    """Where the entries and the present batch are.

    Attributes:
        slots: of the entries, as they lie in memory.
        runs: of neighbours among them, from one to before another.
        gap: the first run that lies behind the present batch.
        rows: all that are in use.
        here: the present batch's among them.
    """

    slots: tuple[int, ...]
    runs: list[tuple[int, int]]
    gap: int
    rows: list[int]
    here: int


@lru_cache(maxsize=1024)
def _window(position: int, filled: int, size: int, slots: int) -> _Window:
    order = tuple(sorted(_slots_in_order(position, filled, slots)))
    runs: list[tuple[int, int]] = []
    for slot in order:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    place = position if slots > size else size
    rows = sorted({*order, place})
    gap = sum(start < place for start, _ in runs)
    return _Window(order, runs, gap, rows, rows.index(place))
