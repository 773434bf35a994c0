"""Batch Renormalization's arithmetic in Triton; see :mod:`normswap.layers.gpu.batch_renorm`.

A tile has channels down and positions across. A part is some samples' share of some positions; a
program walks through one part of some channels. ``scratch`` holds (parts, C) means, (parts, C) sums
of squares about them, the running mean and variance as they were, and the rate of the update:
the second kernel changes the running statistics while others of its programs still need them.
The positions and strides come divided by STEP, so that Triton knows how wide its accesses may be.
"""

from __future__ import annotations

from normswap.layers.gpu.language import jit, tl

_VECTORS = ["scratch", "statistics", "weight", "bias", "running_mean", "running_var", "counter"]
_OUTCOMES = ["sums", "grad_weight", "grad_bias"]


@jit
def _channels(program, C, BLOCK_C: tl.constexpr):
    c = (program % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@jit
def _vector(pointer, c, c_inside, absent):
    if pointer is not None:
        return tl.load(pointer + c, mask=c_inside, other=0.0).to(tl.float32)
    return tl.full(c.shape, absent, tl.float32)


@jit
def _clamped(values, low, high):
    """A NaN stays one."""
    values = tl.maximum(values, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(values, high, propagate_nan=tl.PropagateNan.ALL)


@jit
def _parts(scratch, c, c_inside, C, PARTS, BLOCK_P: tl.constexpr):
    """A (parts, C) matrix's part of this tile."""
    part = tl.arange(0, BLOCK_P)
    inside = (part < PARTS)[:, None] & c_inside[None, :]
    return tl.load(scratch + part[:, None] * C + c[None, :], mask=inside, other=0.0)


@jit
def _elements(part, N, S, SAMPLES, LENGTH, ROW_PARTS):
    """How many elements of a channel a part has; 0 for one that does not exist."""
    samples = tl.minimum(N - part // ROW_PARTS * SAMPLES, SAMPLES)
    positions = tl.minimum(S - part % ROW_PARTS * LENGTH, LENGTH)
    return (tl.maximum(samples, 0) * positions).to(tl.float32)


@jit(do_not_specialize_on_alignment=_VECTORS)
def moments(
    x,
    scratch,
    running_mean,
    running_var,
    counter,
    rate,
    N,
    C,
    SAMPLES,
    LENGTH,
    ROW_PARTS,
    PARTS,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Mean and sum of squares about it of each part, and the running statistics as they are."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    c, c_inside = _channels(tl.program_id(0), C, BLOCK_C)
    part = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    n_first = part // ROW_PARTS * SAMPLES
    n_last = tl.minimum(n_first + SAMPLES, N)
    first = part % ROW_PARTS * LENGTH
    reach = tl.minimum(LENGTH, S - first)
    s = tl.arange(0, BLOCK_S)
    place = c[:, None] * stride_c + s[None, :] * stride_s
    sample = x + (n_first.to(tl.int64) * stride_n + first.to(tl.int64) * stride_s)
    # sums about the mean of the first tile: about zero they would lose digits
    inside = c_inside[:, None] & (s < reach)[None, :]
    wide = tl.load(sample + place, mask=inside, other=0.0).to(tl.float32)
    about = tl.sum(wide, 1) / tl.minimum(reach, BLOCK_S)
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    square = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for _ in range(n_first, n_last):
        for begin in range(0, reach, BLOCK_S):
            inside = c_inside[:, None] & (begin + s < reach)[None, :]
            start = sample + begin * stride_s
            wide = tl.load(start + place, mask=inside, other=0.0).to(tl.float32)
            off = tl.where(inside, wide - about[:, None], 0.0)
            total += off
            square += off * off
        sample += stride_n
    elements = ((n_last - n_first) * reach).to(tl.float32)
    off = tl.sum(total, 1)
    tl.store(scratch + part * C + c, about + off / elements, mask=c_inside)
    spread = tl.sum(square, 1) - off * off / elements
    tl.store(scratch + (PARTS + part) * C + c, spread, mask=c_inside)
    old = scratch + 2 * PARTS * C
    once = c_inside & (part == 0)
    tl.store(old + c, tl.load(running_mean + c, mask=once, other=0.0).to(tl.float32), mask=once)
    tl.store(old + C + c, tl.load(running_var + c, mask=once, other=0.0).to(tl.float32), mask=once)
    if tl.program_id(0) == 0:
        if CUMULATIVE:
            rate = 1.0 / (tl.load(counter) + 1).to(tl.float32)
        tl.store(old + 2 * C, rate)


@jit(do_not_specialize_on_alignment=_VECTORS)
def renormalise(
    x,
    y,
    scratch,
    statistics,
    weight,
    bias,
    running_mean,
    running_var,
    counter,
    eps,
    r_low,
    r_high,
    d_high,
    N,
    C,
    SAMPLES,
    LENGTH,
    ROW_PARTS,
    PARTS,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The output, and once per channel (4, C) μ, 1/σ, r, d and the new running statistics."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    # backwards: what the kernel before read last is in the cache still
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c, c_inside = _channels(program, C, BLOCK_C)
    part = program // tl.cdiv(C, BLOCK_C)
    counts = _elements(tl.arange(0, BLOCK_P), N, S, SAMPLES, LENGTH, ROW_PARTS)[:, None]
    means = _parts(scratch, c, c_inside, C, PARTS, BLOCK_P)
    elements = (N * 1.0) * S
    mean = tl.sum(means * counts, 0) / elements
    off = means - mean[None, :]
    spread = _parts(scratch + PARTS * C, c, c_inside, C, PARTS, BLOCK_P) + counts * off * off
    variance = _clamped(tl.sum(spread, 0) / elements, 0.0, float("inf"))
    old = scratch + 2 * PARTS * C
    old_mean = tl.load(old + c, mask=c_inside, other=0.0)
    old_deviation = tl.sqrt(tl.load(old + C + c, mask=c_inside, other=0.0) + eps)
    deviation = tl.sqrt(variance + eps)
    r = _clamped(deviation / old_deviation, r_low, r_high)
    d = _clamped((mean - old_mean) / old_deviation, -d_high, d_high)
    if part == 0:
        tl.store(statistics + c, mean, mask=c_inside)
        tl.store(statistics + C + c, 1.0 / deviation, mask=c_inside)
        tl.store(statistics + 2 * C + c, r, mask=c_inside)
        tl.store(statistics + 3 * C + c, d, mask=c_inside)
        rate = tl.load(old + 2 * C)
        # a NaN must not stay; x − x is 0 unless x is not finite
        finite = c_inside & ((mean + variance) - (mean + variance) == 0.0)
        new = old_mean + rate * (mean - old_mean)
        tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=finite)
        new = old_deviation + rate * (deviation - old_deviation)
        new = tl.maximum(new * new - eps, 0.0)
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=finite)
    if counter is not None:
        if program == 0:
            tl.store(counter, tl.load(counter) + 1)
    gamma = _vector(weight, c, c_inside, 1.0)
    scale = ((gamma * r) / deviation)[:, None]
    shift = (gamma * d + _vector(bias, c, c_inside, 0.0))[:, None]
    n_first = part // ROW_PARTS * SAMPLES
    n_last = tl.minimum(n_first + SAMPLES, N)
    first = part % ROW_PARTS * LENGTH
    reach = tl.minimum(LENGTH, S - first)
    s = tl.arange(0, BLOCK_S)
    place = c[:, None] * stride_c + s[None, :] * stride_s
    sample = n_first.to(tl.int64) * stride_n + first.to(tl.int64) * stride_s
    for _ in range(n_first, n_last):
        for begin in range(0, reach, BLOCK_S):
            inside = c_inside[:, None] & (begin + s < reach)[None, :]
            start = sample + begin * stride_s
            wide = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
            outcome = (wide - mean[:, None]) * scale + shift
            tl.store(y + start + place, outcome.to(y.dtype.element_ty), mask=inside)
        sample += stride_n


@jit(do_not_specialize_on_alignment=_VECTORS + _OUTCOMES)
def backward_sums(
    x,
    grad,
    statistics,
    sums,
    N,
    C,
    SAMPLES,
    LENGTH,
    ROW_PARTS,
    PARTS,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Σ g and Σ g·(x − μ) of each part, as (2, parts, C)."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    c, c_inside = _channels(tl.program_id(0), C, BLOCK_C)
    part = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    mean = tl.load(statistics + c, mask=c_inside, other=0.0)[:, None]
    n_first = part // ROW_PARTS * SAMPLES
    n_last = tl.minimum(n_first + SAMPLES, N)
    first = part % ROW_PARTS * LENGTH
    reach = tl.minimum(LENGTH, S - first)
    s = tl.arange(0, BLOCK_S)
    place = c[:, None] * stride_c + s[None, :] * stride_s
    sample = n_first.to(tl.int64) * stride_n + first.to(tl.int64) * stride_s
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    dot = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for _ in range(n_first, n_last):
        for begin in range(0, reach, BLOCK_S):
            inside = c_inside[:, None] & (begin + s < reach)[None, :]
            start = sample + begin * stride_s
            wide = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + start + place, mask=inside, other=0.0).to(tl.float32)
            total += g
            dot += g * (wide - mean)
        sample += stride_n
    tl.store(sums + part * C + c, tl.sum(total, 1), mask=c_inside)
    tl.store(sums + (PARTS + part) * C + c, tl.sum(dot, 1), mask=c_inside)


@jit(do_not_specialize_on_alignment=_VECTORS + _OUTCOMES)
def backward(
    x,
    grad,
    grad_x,
    statistics,
    weight,
    sums,
    grad_weight,
    grad_bias,
    N,
    C,
    SAMPLES,
    LENGTH,
    ROW_PARTS,
    PARTS,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """∂x = γ·r/σ·(g − mean(g) − x̂·mean(g·x̂)), and once per channel ∂γ and ∂β."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c, c_inside = _channels(program, C, BLOCK_C)
    part = program // tl.cdiv(C, BLOCK_C)
    total = tl.sum(_parts(sums, c, c_inside, C, PARTS, BLOCK_P), 0)
    dot = tl.sum(_parts(sums + PARTS * C, c, c_inside, C, PARTS, BLOCK_P), 0)
    mean = tl.load(statistics + c, mask=c_inside, other=0.0)
    inverse = tl.load(statistics + C + c, mask=c_inside, other=0.0)
    r = tl.load(statistics + 2 * C + c, mask=c_inside, other=0.0)
    once = c_inside & (part == 0)
    if grad_weight is not None:
        d = tl.load(statistics + 3 * C + c, mask=c_inside, other=0.0)
        of_weight = dot * inverse * r + total * d
        tl.store(grad_weight + c, of_weight.to(grad_weight.dtype.element_ty), mask=once)
    if grad_bias is not None:
        tl.store(grad_bias + c, total.to(grad_bias.dtype.element_ty), mask=once)
    if grad_x is not None:
        elements = (N * 1.0) * S
        scale = _vector(weight, c, c_inside, 1.0) * r * inverse
        pull = (dot * inverse * inverse / elements)[:, None]
        lean = (total / elements)[:, None]
        n_first = part // ROW_PARTS * SAMPLES
        n_last = tl.minimum(n_first + SAMPLES, N)
        first = part % ROW_PARTS * LENGTH
        reach = tl.minimum(LENGTH, S - first)
        s = tl.arange(0, BLOCK_S)
        place = c[:, None] * stride_c + s[None, :] * stride_s
        sample = n_first.to(tl.int64) * stride_n + first.to(tl.int64) * stride_s
        for _ in range(n_first, n_last):
            for begin in range(0, reach, BLOCK_S):
                inside = c_inside[:, None] & (begin + s < reach)[None, :]
                start = sample + begin * stride_s
                wide = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
                g = tl.load(grad + start + place, mask=inside, other=0.0).to(tl.float32)
                off = g - lean - (wide - mean[:, None]) * pull
                outcome = scale[:, None] * off
                tl.store(grad_x + start + place, outcome.to(grad_x.dtype.element_ty), mask=inside)
            sample += stride_n
