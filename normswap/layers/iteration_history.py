"""The last batches that a normaliser keeps, and the loan of them to a backward.

Rings of fixed size, written in place. The batch of this forward has its place in them, beside those
it is averaged with, so that nothing is put together first. Slopes are the large part of it: not
every batch need have one of its own, the others borrow the last one. A backward that needs the
entries of its forward takes a loan: should a later forward overwrite one of them first, the loan
gets a copy of its own.

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
        rest: (C,), ``variance − factor·⟨D, w⟩`` under the weights of its time, where it has a
            slope.
        factor: (C,), what a borrowed slope D is multiplied by; None for one of its own.
    """

    offset: Tensor
    variance: Tensor
    rest: Tensor | None = None
    factor: Tensor | None = None


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
        offset, rest, factor: (k, C), as in :class:`Batch`; undefined for the present batch.
        patches: (k, G, F), ∂mean/∂w.
        slopes: ∂variance/∂w in pieces of (C, F, some).
        owners: which of the slopes in all pieces each row has; any for the present batch, if it
            does not borrow.
    """

    here: int
    offset: Tensor
    rest: Tensor
    factor: Tensor
    patches: Tensor
    slopes: list[Tensor]
    owners: tuple[int, ...]


class Loan:
    """The slopes and patches of some entries for as long as somebody holds this.

    Attributes:
        owned: for each slope, the rows of the window that have it.
    """

    def __init__(self, ring: Tensor, patches: Tensor, layout: _Layout, weight: Tensor) -> None:
        self.ring, self.owned = ring, layout.owned
        self._layout = layout
        self._patches = patches
        self._weight, self._version = weakref.ref(weight), _version(weight)
        self._kept: dict[int, Tensor] = {}
        self._has_own_patches = False
        self._lost = False

    def slopes(self) -> list[Tensor]:
        """(C, F) each, as many as ``owned`` has.

        Raises:
            LayerError: one was overwritten after the weights had moved on.
        """
        self._check()
        kept = self._kept
        rows = self.ring.unbind(0)
        return [kept[slot] if slot in kept else rows[slot] for slot in self._layout.slopes]

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

    def rescue(self, row: int, slot: int | None, copies: list[Tensor]) -> None:
        """Prepare for ``row``, and the slope in ``slot``, to be overwritten.

        ``copies`` shares one copy of the slope among loans.
        """
        harms_patches = row in self._layout.past and not self._has_own_patches
        harms_slope = slot in self._layout.slopes and slot not in self._kept
        if self._lost or not (harms_patches or harms_slope):
            return
        weight = self._weight()
        if weight is None or _version(weight) != self._version:
            # weights that have changed since make this backward an error in autograd too, so no
            # copy is spent on it: after each step of an optimizer that would be the usual case
            self._lost = True
            return
        if harms_patches:
            self._patches, self._has_own_patches = self._patches.clone(), True
        if harms_slope and slot is not None:
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
        every: every how many-th batch has a slope of its own.
        phase: how many batches earlier than the first ``every`` it is the turn of the second.
    """

    def __init__(self, size: int, lends: bool = False, *, every: int = 1, phase: int = 0) -> None:
        self.size = size
        self._lends = lends and size > 0
        self._every, self._phase = every, phase % every
        self.count = 0
        self.filled = 0
        self._rows: Tensor | None = None
        self._patches: Tensor | None = None
        self._ring: Tensor | None = None
        self._forget_what_is_passing()

    def _forget_what_is_passing(self) -> None:
        self._loans: list[weakref.ref[Loan]] = []
        self._repeatable: deque[Loan] = deque(maxlen=_REPEATABLE)
        self._seen: tuple[int, int] | None = None
        self._known: tuple[tuple[int, int], _Layout] | None = None
        self._forget_views()

    def _forget_views(self) -> None:
        self._kind: tuple[Any, ...] | None = None
        self._views: dict[tuple[int, int], Tensor] = {}
        self._columns: tuple[Tensor, ...] | None = None

    @property
    def has_slopes(self) -> bool:
        """Whether the entries know how their variance depends on the weights."""
        return self.filled > 0 and self._ring is not None

    @property
    def borrows(self) -> bool:
        """Whether the present batch takes the slope of the last that had one of its own."""
        return not self._layout().writes

    def _layout(self) -> _Layout:
        if self._known is None or self._known[0] != (self.count, self.filled):
            lends, every = self._lends, self._every
            turn = _slots(self.size, lends) * _slopes(self.size, lends, every) * every
            # layouts repeat, and are remembered
            count = self.count if self.count < 2 * turn or turn == 0 else turn + self.count % turn
            layout = _layout(count, self.filled, self.size, lends, every, self._phase)
            self._known = (self.count, self.filled), layout
        return self._known[1]

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
        self.count = self.filled = 0
        self._forget_views()
        with torch.inference_mode(False):
            self._rows = like.new_ones((self.size + 1, 4, *like.shape))
            self._ring = self._patches = None
            if folded is not None:
                groups, per_group, taps = folded
                slopes = _slopes(self.size, self._lends, self._every)
                self._patches = like.new_zeros((self.size + 1, groups, taps))
                self._ring = like.new_empty((slopes, groups * per_group, taps), dtype=dtype)
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
        rows = torch.cat([self._rows[start:end] for start, end in _runs(self._layout().past)])
        return Past(rows[:, 0], rows[:, 1])

    def place(self) -> Tensor:
        """(G, F) to write the present batch's patch into, before anything else is asked."""
        assert self._patches is not None  # prepare() was told of slopes
        self._rescue()
        return self._patches[self._layout().place]

    def present(self) -> Present:
        """The window with the present batch in its place."""
        assert self._rows is not None  # prepare() was told of slopes
        assert self._patches is not None
        assert self._ring is not None
        layout = self._layout()
        runs, owners = layout.runs, layout.owners
        if self.filled < self.size:
            columns = self._rows[layout.rows].unbind(1)
            patches = self._patches[layout.rows]
        else:
            if self._columns is None:
                self._columns = self._rows.unbind(1)
            columns, patches = self._columns, self._patches
            if self._ring.numel() < _SMALL:
                # one product in place of two
                runs, owners = [(0, len(self._ring))], layout.places
        offset, _, rest, factor = columns
        slopes = [self._view(run) for run in runs]
        return Present(layout.here, offset, rest, factor, patches, slopes, owners)

    def _view(self, run: tuple[int, int]) -> Tensor:
        if run not in self._views:
            assert self._ring is not None  # there are entries
            self._views[run] = self._ring[run[0] : run[1]].permute(1, 2, 0)
        return self._views[run]

    def lend(self, present: Present, weight: Tensor) -> Loan:
        """Lend slopes and patches to the backward of a forward with this ``weight``."""
        assert self._ring is not None  # a window has slopes
        loan = Loan(self._ring, present.patches, self._layout(), weight)
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
        """(C, F) to write the present batch's slope into, unless it borrows."""
        assert self._ring is not None  # prepare() was told of slopes
        return self._ring[self._layout().room]

    def _rescue(self) -> None:
        if not self._loans:
            return
        layout = self._layout()
        slot = layout.room if layout.writes else None
        copies: list[Tensor] = []
        alive = [(ref, loan) for ref in self._loans if (loan := ref()) is not None]
        for _, loan in alive:
            if loan.ring is self._ring:
                loan.rescue(layout.place, slot, copies)
        self._loans = [ref for ref, _ in alive]

    def forget_values(self, mean: Tensor, variance: Tensor) -> None:
        """What has just been entered may not be finite, as its moments are, and must harm nobody.

        It does not count then, but whoever multiplies it by 0 must not meet a NaN.
        """
        assert self._patches is not None
        patch = self._patches[self._layout().place]
        if not self.borrows:
            room = self.room()
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
        layout = self._layout()
        row = self._rows[layout.row]
        known = [value for value in batch if value is not None]
        torch.stack(known, out=row[: len(known)])
        if batch.rest is not None and batch.factor is None:
            row[3].fill_(1.0)
        if self._patches is not None and layout.place != layout.row:
            self._patches[layout.row].copy_(self._patches[layout.place])
        self.count += 1
        self.filled = min(self.filled + 1, self.size)

    def state(self) -> dict[str, Tensor | int]:
        """Plain data, ready for a training checkpoint; the oldest entry first."""
        state: dict[str, Tensor | int] = {
            "count": self.count,
            "phase": self._phase,
            "every": self._every,
        }
        if self.filled == 0 or self._rows is None:
            return state
        layout = self._layout()
        rows, slopes = list(layout.past), list(layout.aged)
        state["rows"] = self._rows[rows]
        if self._ring is not None and self._patches is not None:
            state["patches"] = self._patches[rows]
            state["slopes"] = self._ring[slopes]
        return state

    def load(self, state: dict[str, Tensor | int]) -> None:
        """Take over what ``state`` returned, into the same slots.

        Raises:
            LayerError: the state is one of version 0.1, which kept something else.
        """
        if "count" not in state:
            raise LayerError(
                "load_training_state",
                got="a history as CrossIterationBatchNorm kept it in version 0.1",
                need="one of this version",
                hint="finishing that run with the version that began it",
            )
        self._forget_what_is_passing()
        self.count, self.filled = int(state["count"]), 0
        self._phase = int(state["phase"]) % self._every
        self._rows = self._patches = self._ring = None
        rows, patches, slopes = (state.get(name) for name in ("rows", "patches", "slopes"))
        if not isinstance(rows, Tensor) or self.size == 0 or state["every"] != self._every:
            return  # a history whose slopes belong to other batches begins anew
        self.filled = min(len(rows), self.size)
        layout = self._layout()
        self._rows = _placed(rows, layout.past, self.size + 1)
        if isinstance(patches, Tensor) and isinstance(slopes, Tensor):
            self._patches = _placed(patches, layout.past, self.size + 1)
            capacity = _slopes(self.size, self._lends, self._every)
            self._ring = _placed(slopes, layout.aged, capacity)

    def _move(self, device: torch.device) -> None:
        if self._rows is None or self._rows.device == device:
            return
        self._rows = self._rows.to(device)
        self._patches = None if self._patches is None else self._patches.to(device)
        self._ring = None if self._ring is None else self._ring.to(device)
        self._forget_views()

    def __getstate__(self) -> dict[str, Any]:
        twin = copy.copy(self.__dict__)
        for name in ("_views", "_kind", "_loans", "_repeatable", "_seen", "_known", "_columns"):
            del twin[name]
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_what_is_passing()


def _placed(entries: Tensor, slots: Sequence[int], size: int) -> Tensor:
    """The latest of ``entries`` in these slots of a ring."""
    ring = entries.new_zeros(size, *entries.shape[1:])
    ring[list(slots)] = entries[-len(slots) :]
    return ring


class _Layout(NamedTuple):
    """Where the entries and the present batch are, when it is the turn of one batch.

    Attributes:
        past: rows of the entries, the oldest first.
        row: where the present batch will be an entry.
        place: where its patch is written meanwhile.
        rows: all that are in use, as they lie in memory.
        here: ``place`` among them.
        slopes: slots of the slopes in use, as they lie in memory.
        aged: the same, the oldest first.
        runs: of neighbours among them, from one to before another.
        owners: for each of ``rows``, which of ``slopes`` it has; 0 for one that will have its own.
        places: likewise, the slot of it.
        owned: for each of ``slopes``, the rows of the window that have it.
        writes: whether the present batch gets a slope of its own.
        room: the slot for it.
    """

    past: tuple[int, ...]
    row: int
    place: int
    rows: list[int]
    here: int
    slopes: tuple[int, ...]
    aged: tuple[int, ...]
    runs: list[tuple[int, int]]
    owners: tuple[int, ...]
    places: tuple[int, ...]
    owned: tuple[tuple[int, ...], ...]
    writes: bool
    room: int


def _slots(size: int, lends: bool) -> int:
    """Rows that entries take turns in."""
    return size + 1 if lends else size


def _slopes(size: int, lends: bool, every: int) -> int:
    """Slots for slopes: what ``size`` entries can have, and one more where they are lent."""
    return 0 if size == 0 else -(-(size - 1) // every) + 1 + int(lends)


@lru_cache(maxsize=1024)
def _layout(count: int, filled: int, size: int, lends: bool, every: int, phase: int) -> _Layout:
    slots, capacity = _slots(size, lends), _slopes(size, lends, every)

    def slope_of(batch: int) -> int:
        return (batch + phase) // every % capacity

    entries = range(count - filled, count)
    past = tuple(batch % slots for batch in entries)
    row = count % slots if slots else 0
    place = row if lends else size
    rows = sorted({*past, place})
    writes = filled == 0 or (count + phase) % every == 0
    aged = tuple(dict.fromkeys(slope_of(batch) for batch in entries))
    slopes = tuple(sorted(aged))
    has = dict(zip(past, (slopes.index(slope_of(batch)) for batch in entries), strict=True))
    owned = tuple(
        tuple(i for i, at in enumerate(rows) if has.get(at) == slope)
        for slope in range(len(slopes))
    )
    if not writes:
        has[place] = slopes.index(slope_of(count))
    owners = tuple(has.get(at, 0) for at in rows)
    return _Layout(
        past=past,
        row=row,
        place=place,
        rows=rows,
        here=rows.index(place),
        slopes=slopes,
        aged=aged,
        runs=_runs(slopes),
        owners=owners,
        places=tuple(slopes[owner] for owner in owners) if slopes else (),
        owned=owned,
        writes=writes,
        room=slope_of(count) if capacity else 0,
    )


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Of neighbours among them, from one to before another."""
    runs: list[tuple[int, int]] = []
    for place in sorted(places):
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
