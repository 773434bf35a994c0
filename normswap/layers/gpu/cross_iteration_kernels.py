"""Cross-Iteration BatchNorm's arithmetic in Triton; see :mod:`normswap.layers.gpu.cross_iteration`.

The parts and the layout are those of Batch Renormalization's kernels, and so are the sums.
"""

from __future__ import annotations

from normswap.layers.gpu.batch_renorm_kernels import _channels, _parts, _vector
from normswap.layers.gpu.language import jit, tl

_VECTORS = ["mean", "variance", "weight", "shares", "sums"]
_OUTCOMES = ["grad_weight", "grad_bias", "lean", "growth"]


@jit
def _store(pointer, values, c, mask):
    if pointer is not None:
        tl.store(pointer + c, values.to(pointer.dtype.element_ty), mask=mask)


@jit(do_not_specialize_on_alignment=_VECTORS + _OUTCOMES)
def backward(
    x,
    grad,
    grad_x,
    mean,
    variance,
    weight,
    shares,
    sums,
    grad_weight,
    grad_bias,
    lean,
    growth,
    share,
    eps,
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
    """∂x = γ/σ·(g − share·mean(g) − share·x̂·mean(g·x̂)), and once what is of channels alone."""
    S, stride_n, stride_c = S * STEP, stride_n * STEP, stride_c * STEP
    # backwards: what the kernel before read last is in the cache still
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c, c_inside = _channels(program, C, BLOCK_C)
    part = program // tl.cdiv(C, BLOCK_C)
    total = tl.sum(_parts(sums, c, c_inside, C, PARTS, BLOCK_P), 0)
    dot = tl.sum(_parts(sums + PARTS * C, c, c_inside, C, PARTS, BLOCK_P), 0)
    centre = tl.load(mean + c, mask=c_inside, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(variance + c, mask=c_inside, other=1.0) + eps)
    gain = _vector(weight, c, c_inside, 1.0) * inverse
    along = dot * inverse
    once = c_inside & (part == 0)
    _store(grad_weight, along, c, once)
    _store(grad_bias, total, c, once)
    _store(lean, gain * total, c, once)
    _store(growth, gain * inverse * along, c, once)
    if grad_x is not None:
        weighed = share / ((N * 1.0) * S)
        if shares is not None:
            weighed = tl.load(shares + c, mask=c_inside, other=0.0) / ((N * 1.0) * S)
        pull = (along * inverse * weighed)[:, None]
        level = (total * weighed)[:, None]
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
                off = g - level - (wide - centre[:, None]) * pull
                outcome = gain[:, None] * off
                tl.store(grad_x + start + place, outcome.to(grad_x.dtype.element_ty), mask=inside)
            sample += stride_n
