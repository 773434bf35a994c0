"""What statistics go through between two looks at a batch, in Triton: (C,) vectors, a few rows.

Also what becomes of a slope whose batch is not finite.
"""

from __future__ import annotations

from normswap.layers.gpu.language import jit, tl

_ALL = ["mean", "variance", "running_mean", "running_var", "counter", "shift", "variances"]
_ROOMS = ["room", "patch"]
_OUTCOMES = ["window", "entries"]


@jit
def _is_finite(values):
    """X − x is 0 unless x is not finite."""
    return values - values == 0.0


@jit(do_not_specialize_on_alignment=_ALL)
def track(
    mean,
    variance,
    running_mean,
    running_var,
    counter,
    rate,
    correction,
    C,
    BLOCK_C: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Count one batch and take it into the running statistics, where it is finite.

    One program, as the others would need the counter that it changes.
    """
    if counter is not None:
        count = tl.load(counter) + 1
        if CUMULATIVE:
            rate = 1.0 / count.to(tl.float32)
        tl.store(counter, count)
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        inside = c < C
        new = tl.load(mean + c, mask=inside, other=0.0)
        spread = tl.load(variance + c, mask=inside, other=0.0)
        counts = inside & _is_finite(new + spread)
        old = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32)
        moved = old + rate * (new - old)
        tl.store(running_mean + c, moved.to(running_mean.dtype.element_ty), mask=counts)
        old = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float32)
        moved = old + rate * (spread * correction - old)
        tl.store(running_var + c, moved.to(running_var.dtype.element_ty), mask=counts)


@jit(do_not_specialize=["HERE"], do_not_specialize_on_alignment=_ALL + _OUTCOMES)
def join(
    mean,
    shift,
    variances,
    window,
    entries,
    HERE,
    K,
    C,
    shift_k,
    shift_c,
    variances_k,
    variances_c,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DROP: tl.constexpr,
):
    """The window of CBN: (3, C) μ̄, σ̄² and part, (3, K, C) shares, deviations and grows."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    c_inside = c < C
    inside = (k < K)[:, None] & c_inside[None, :]
    place = k[:, None] * shift_k + c[None, :] * shift_c
    moved = tl.load(shift + place, mask=inside, other=0.0)
    place = k[:, None] * variances_k + c[None, :] * variances_c
    spread = tl.load(variances + place, mask=inside, other=0.0)
    counts = _is_finite(moved + spread)
    if DROP:
        counts = counts & (spread >= 0.0)
    counts = (counts | (k == HERE)[:, None]) & inside
    part = 1.0 / tl.sum(counts.to(tl.float32), 0)
    moved = tl.where(counts, moved, 0.0)
    mean_shift = tl.sum(moved, 0) * part
    deviation = tl.where(counts, moved - mean_shift[None, :], 0.0)
    known = tl.maximum(spread, 0.0, propagate_nan=tl.PropagateNan.ALL)
    known = tl.where(counts, known, 0.0) + deviation * deviation
    centre = tl.load(mean + c, mask=c_inside, other=0.0)
    tl.store(window + c, centre + mean_shift, mask=c_inside)
    tl.store(window + C + c, tl.sum(known, 0) * part, mask=c_inside)
    tl.store(window + 2 * C + c, part, mask=c_inside)
    shares = tl.where(counts, part[None, :], 0.0)
    place = k[:, None] * C + c[None, :]
    tl.store(entries + place, shares, mask=inside)
    tl.store(entries + K * C + place, deviation, mask=inside)
    tl.store(entries + 2 * K * C + place, tl.where(spread > 0.0, shares, 0.0), mask=inside)


@jit(do_not_specialize_on_alignment=_ALL + _ROOMS)
def forget(
    room,
    patch,
    mean,
    variance,
    largest,
    ROOM,
    PATCH,
    F,
    BLOCK: tl.constexpr,
):
    """Make finite what is kept: (C, F) slopes, 0 where the batch was not finite, and a patch.

    Reads all and writes what has to change, which usually is nothing.
    """
    of_room = tl.cdiv(ROOM, BLOCK)
    if tl.program_id(0) < of_room:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < ROOM
        c = i // F
        own = tl.load(mean + c, mask=inside, other=0.0) + tl.load(
            variance + c, mask=inside, other=0.0
        )
        kept = tl.load(room + i, mask=inside, other=0.0).to(tl.float32)
        outcome = tl.where(kept > 0.0, largest, tl.where(kept < 0.0, -largest, 0.0))
        outcome = tl.where(_is_finite(own), outcome, 0.0)
        changes = inside & ((_is_finite(kept) & _is_finite(own)) == 0)
        tl.store(room + i, outcome.to(room.dtype.element_ty), mask=changes)
    else:
        i = (tl.program_id(0) - of_room) * BLOCK + tl.arange(0, BLOCK)
        inside = i < PATCH
        kept = tl.load(patch + i, mask=inside, other=0.0).to(tl.float32)
        changes = inside & (_is_finite(kept) == 0)
        tl.store(patch + i, tl.zeros([BLOCK], patch.dtype.element_ty), mask=changes)
