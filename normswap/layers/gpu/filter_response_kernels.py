"""FRN's arithmetic in Triton; see :mod:`normswap.layers.gpu.filter_response` for who calls what.

A tile has channels down and positions across. ``row`` counts samples times channels, as in an
(N, C) matrix. Pointers may be None, which Triton sees when it compiles. The positions and strides
come divided by STEP, so that Triton knows what divides them and how wide its accesses may be.
"""

from __future__ import annotations

from normswap.layers.gpu.language import jit, tl

_VECTORS = ["inverse_root", "weight", "bias", "tau", "eps_l", "partial", "sums"]
_OUTCOMES = ["grad_weight", "grad_bias", "grad_tau", "grad_eps"]


@jit
def _inverse_root(mean_square, eps_l, eps, c, c_inside):
    if eps_l is not None:
        learnt = tl.load(eps_l + c, mask=c_inside, other=0.0).to(tl.float32)
        return tl.rsqrt(mean_square + (tl.abs(learnt) + eps))
    return tl.rsqrt(mean_square + eps)


@jit
def _vector(pointer, c, c_inside, absent):
    """A (C,) vector's part of this tile, as a column."""
    if pointer is not None:
        found = tl.load(pointer + c, mask=c_inside, other=0.0).to(tl.float32)
    else:
        found = tl.full(c.shape, absent, tl.float32)
    return found[:, None]


@jit
def _respond(wide, scale, bias, tau, c, c_inside):
    z = wide * scale + _vector(bias, c, c_inside, 0.0)
    if tau is not None:
        z = tl.maximum(z, _vector(tau, c, c_inside, 0.0), propagate_nan=tl.PropagateNan.ALL)
    return z


@jit
def _keep(g, wide, scale, bias, tau, c, c_inside):
    """The gradient where the output is above τ; a tie goes to τ, a NaN on."""
    if tau is not None:
        z = wide * scale + _vector(bias, c, c_inside, 0.0)
        return tl.where(z <= _vector(tau, c, c_inside, 0.0), 0.0, g)
    return g


@jit(do_not_specialize_on_alignment=_VECTORS)
def forward_whole(
    x,
    y,
    inverse_root,
    weight,
    bias,
    tau,
    eps_l,
    eps,
    C,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Response of a tile that holds its rows whole: one read, one write."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    blocks = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    c_inside = c < C
    inside = c_inside[:, None] & (s < S)[None, :]
    place = n.to(tl.int64) * stride_n + (c[:, None] * stride_c + s[None, :] * stride_s)
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    root = _inverse_root(tl.sum(wide * wide, 1) / S, eps_l, eps, c, c_inside)
    tl.store(inverse_root + n * C + c, root, mask=c_inside)
    scale = root[:, None] * _vector(weight, c, c_inside, 1.0)
    z = _respond(wide, scale, bias, tau, c, c_inside)
    tl.store(y + place, z.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize_on_alignment=_VECTORS)
def forward_squares(
    x,
    partial,
    N,
    C,
    LENGTH,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Σ x² of each part of each row, as (parts, N, C)."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    blocks = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks % N
    part = tl.program_id(0) // (blocks * N)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    first = part * LENGTH
    last = tl.minimum(first + LENGTH, S)
    base = x + n.to(tl.int64) * stride_n
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for begin in range(first, last, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        inside = c_inside[:, None] & (s < last)[None, :]
        place = c[:, None] * stride_c + s[None, :] * stride_s
        wide = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        total += wide * wide
    row = (part * N + n) * C + c
    tl.store(partial + row, tl.sum(total, 1), mask=c_inside)


@jit(do_not_specialize_on_alignment=_VECTORS)
def forward_parts(
    x,
    y,
    inverse_root,
    weight,
    bias,
    tau,
    eps_l,
    partial,
    eps,
    N,
    C,
    PARTS,
    LENGTH,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Response of a part of rows, whose squares are summed already."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    # backwards: what the kernel before read last is in the cache still
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    n = program // blocks % N
    part = program // (blocks * N)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    mean_square = _over_parts(partial, n, c, c_inside, N, C, PARTS, BLOCK_P) / S
    root = _inverse_root(mean_square, eps_l, eps, c, c_inside)
    tl.store(inverse_root + n * C + c, root, mask=c_inside & (part == 0))
    scale = root[:, None] * _vector(weight, c, c_inside, 1.0)
    first = part * LENGTH
    last = tl.minimum(first + LENGTH, S)
    base = n.to(tl.int64) * stride_n
    for begin in range(first, last, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        inside = c_inside[:, None] & (s < last)[None, :]
        place = base + (c[:, None] * stride_c + s[None, :] * stride_s)
        wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        z = _respond(wide, scale, bias, tau, c, c_inside)
        tl.store(y + place, z.to(y.dtype.element_ty), mask=inside)


@jit
def _over_parts(partial, n, c, c_inside, N, C, PARTS, BLOCK_P: tl.constexpr):
    """Sum (parts, N, C) over the parts, for one sample's channels."""
    part = tl.arange(0, BLOCK_P)
    inside = (part < PARTS)[:, None] & c_inside[None, :]
    place = (part[:, None] * N + n) * C + c[None, :]
    return tl.sum(tl.load(partial + place, mask=inside, other=0.0), 0)


@jit(do_not_specialize_on_alignment=_VECTORS)
def backward_whole(
    x,
    grad,
    grad_x,
    inverse_root,
    weight,
    bias,
    tau,
    sums,
    N,
    C,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """∂x of a tile that holds its rows whole, and each row's sums."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    blocks = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    c_inside = c < C
    inside = c_inside[:, None] & (s < S)[None, :]
    place = n.to(tl.int64) * stride_n + (c[:, None] * stride_c + s[None, :] * stride_s)
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(inverse_root + n * C + c, mask=c_inside, other=0.0)[:, None]
    scale = root * _vector(weight, c, c_inside, 1.0)
    h = _keep(g, wide, scale, bias, tau, c, c_inside)
    dot = tl.sum(h * wide, 1)
    if sums is not None:
        row = n * C + c
        tl.store(sums + row, dot, mask=c_inside)
        tl.store(sums + N * C + row, tl.sum(h, 1), mask=c_inside)
        tl.store(sums + 2 * N * C + row, tl.sum(g - h, 1), mask=c_inside)
    if grad_x is not None:
        pull = scale * root * root * (dot / S)[:, None]
        outcome = h * scale - wide * pull
        tl.store(grad_x + place, outcome.to(grad_x.dtype.element_ty), mask=inside)


@jit(do_not_specialize_on_alignment=_VECTORS)
def backward_sums(
    x,
    grad,
    inverse_root,
    weight,
    bias,
    tau,
    sums,
    N,
    C,
    PARTS,
    LENGTH,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Σ h·x, Σ h and Σ (g − h) of each part of each row, as (3, parts, N, C)."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    blocks = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks % N
    part = tl.program_id(0) // (blocks * N)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    root = tl.load(inverse_root + n * C + c, mask=c_inside, other=0.0)[:, None]
    scale = root * _vector(weight, c, c_inside, 1.0)
    first = part * LENGTH
    last = tl.minimum(first + LENGTH, S)
    base = n.to(tl.int64) * stride_n
    dot = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    kept = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    cut = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for begin in range(first, last, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        inside = c_inside[:, None] & (s < last)[None, :]
        place = base + (c[:, None] * stride_c + s[None, :] * stride_s)
        wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        h = _keep(g, wide, scale, bias, tau, c, c_inside)
        dot += h * wide
        kept += h
        cut += g - h
    row = (part * N + n) * C + c
    tl.store(sums + row, tl.sum(dot, 1), mask=c_inside)
    tl.store(sums + PARTS * N * C + row, tl.sum(kept, 1), mask=c_inside)
    tl.store(sums + 2 * PARTS * N * C + row, tl.sum(cut, 1), mask=c_inside)


@jit(do_not_specialize_on_alignment=_VECTORS)
def backward_parts(
    x,
    grad,
    grad_x,
    inverse_root,
    weight,
    bias,
    tau,
    sums,
    N,
    C,
    PARTS,
    LENGTH,
    S,
    stride_n,
    stride_c,
    stride_s,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """∂x of a part of rows, whose sums are known."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    n = program // blocks % N
    part = program // (blocks * N)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    root = tl.load(inverse_root + n * C + c, mask=c_inside, other=0.0)[:, None]
    scale = root * _vector(weight, c, c_inside, 1.0)
    dot = _over_parts(sums, n, c, c_inside, N, C, PARTS, BLOCK_P)
    pull = scale * root * root * (dot / S)[:, None]
    first = part * LENGTH
    last = tl.minimum(first + LENGTH, S)
    base = n.to(tl.int64) * stride_n
    for begin in range(first, last, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        inside = c_inside[:, None] & (s < last)[None, :]
        place = base + (c[:, None] * stride_c + s[None, :] * stride_s)
        wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        h = _keep(g, wide, scale, bias, tau, c, c_inside)
        outcome = h * scale - wide * pull
        tl.store(grad_x + place, outcome.to(grad_x.dtype.element_ty), mask=inside)


@jit
def _store(pointer, values, c, c_inside):
    if pointer is not None:
        tl.store(pointer + c, values.to(pointer.dtype.element_ty), mask=c_inside)


@jit(do_not_specialize_on_alignment=_VECTORS + _OUTCOMES)
def backward_channels(
    sums,
    inverse_root,
    weight,
    eps_l,
    grad_weight,
    grad_bias,
    grad_tau,
    grad_eps,
    N,
    C,
    ROWS,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of γ, β, τ and ε_l from the sums of rows; ROWS is parts times N."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    of_weight = tl.zeros([BLOCK_C], tl.float32)
    of_bias = tl.zeros([BLOCK_C], tl.float32)
    of_tau = tl.zeros([BLOCK_C], tl.float32)
    of_eps = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, ROWS, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        inside = (row < ROWS)[:, None] & c_inside[None, :]
        place = row[:, None] * C + c[None, :]
        root = tl.load(inverse_root + (row % N)[:, None] * C + c[None, :], mask=inside, other=0.0)
        along = root * tl.load(sums + place, mask=inside, other=0.0)
        of_weight += tl.sum(along, 0)
        if grad_bias is not None:
            of_bias += tl.sum(tl.load(sums + ROWS * C + place, mask=inside, other=0.0), 0)
        if grad_tau is not None:
            of_tau += tl.sum(tl.load(sums + 2 * ROWS * C + place, mask=inside, other=0.0), 0)
        if grad_eps is not None:
            of_eps += tl.sum(along * root * root, 0)
    _store(grad_weight, of_weight, c, c_inside)
    _store(grad_bias, of_bias, c, c_inside)
    _store(grad_tau, of_tau, c, c_inside)
    if grad_eps is not None:
        if weight is not None:
            of_eps *= tl.load(weight + c, mask=c_inside, other=0.0).to(tl.float32)
        learnt = tl.load(eps_l + c, mask=c_inside, other=0.0).to(tl.float32)
        sign = tl.where(learnt > 0, 1.0, tl.where(learnt < 0, -1.0, 0.0))
        _store(grad_eps, of_eps * (-0.5 * sign), c, c_inside)
