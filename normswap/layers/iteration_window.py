"""The window of Cross-Iteration BatchNorm: its statistics, what they depend on, the normalisation.

Shapes: k batches in the window, n of them past, G groups, C channels, F the weights of one channel.
Weights are looked at as (G, C/G, F).
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.layers.batch_statistics import (
    aliases,
    answers_at_once,
    per_channel,
    reduced_axes,
    vector_kernels_for,
)
from normswap.layers.gpu.launching import can_launch
from normswap.layers.iteration_history import Loan, Present
from normswap.layers.producers import fold_weight, unfold_weight
from normswap.layers.products import product
from normswap.layers.tracing import must_be_plain

Part = Tensor | float
"""(C,), or one number where all channels have the same."""


class Window(NamedTuple):
    """Statistics over the window.

    Attributes:
        mean: (C,), μ̄.
        variance: (C,), σ̄².
        share: the part that the current batch has in both.
    """

    mean: Tensor
    variance: Tensor
    share: Part


class Entries(NamedTuple):
    """What the batches of the window have to do with the statistics over it.

    Attributes:
        here: the present batch's row.
        share: (k, C) or one number, what a batch counts for in μ̄.
        deviation: (k, C), μ̂_τ − μ̄ where it counts.
        grows: like ``share``, what its variance counts for in σ̄².
    """

    here: int
    share: Part
    deviation: Tensor
    grows: Part


class Reach(NamedTuple):
    """How the statistics over the window depend on today's weights through past batches.

    Attributes:
        entries: see :class:`Entries`.
        moved: (k, C), ⟨p̄_τ, w − w_τ⟩ where it counts.
        loan: the past entries' slopes and patches; None where no weight is followed.
        by_slope: (k, C), with the loan: what multiplies a slope's part in the gradient, minus half
            of ``grows`` times the factor of the batch.
    """

    entries: Entries
    moved: Tensor
    loan: Loan | None = None
    by_slope: Tensor | None = None


def offsets_of(patches: Tensor, weight: Tensor) -> Tensor:
    """``⟨p̄, w⟩``: (k, G, F) with (G, C/G, F) to (k, C)."""
    if weight.shape[0] == 1:
        return product(patches.view(patches.shape[0], -1), weight.view(-1, weight.shape[2]))
    return torch.bmm(weight, patches.permute(1, 2, 0)).flatten(0, 1).t()


def predict(
    present: Present, variance: Tensor, moved: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Variances (k, C) of the batches of the window under today's weights.

    With ``rest = v_τ − factor·⟨D, w_τ⟩``: ``v̂ = factor·⟨D, w⟩ + rest − ⟨p̄, w − w_τ⟩²``.

    Args:
        present: the window.
        variance: (C,), of the present batch.
        moved: (k, C), ⟨p̄, w − w_τ⟩, anything for the present batch.
        weight: (G, C/G, F).

    Returns:
        The variances, and (C,) ``⟨D, w⟩`` of the slope that the present batch may borrow.
    """
    # With the weight as the row, one product per channel takes a fifth of the time of einsum,
    # which makes it the column.
    rows = weight.view(-1, 1, weight.shape[-1])
    pieces = [torch.bmm(rows, slopes.to(weight.dtype)) for slopes in present.slopes]
    columns = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).squeeze(1)
    along = columns.index_select(1, _index(present.owners, columns.device)).t()
    variances = torch.addcmul(present.rest, present.factor, along)
    variances.addcmul_(moved, moved, value=-1)
    variances[present.here].copy_(variance)
    return variances, along[present.here]


@lru_cache(maxsize=256)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)


def average(
    mean: Tensor, variance: Tensor, shift: Tensor, past_variance: Tensor, rule: str
) -> tuple[Window, Entries]:
    """Join the batch's moments and the past ones, as brought to today's weights.

    Args:
        mean: (C,), of the batch.
        variance: (C,), biased.
        shift: (n, C), past means less ``mean``, so that one far from zero costs no digits.
        past_variance: (n, C).
        rule: ``"max"`` or ``"drop"``.
    """
    here = shift.shape[0]
    shifts = torch.cat([shift, (mean - mean).unsqueeze(0)])
    variances = torch.cat([past_variance, variance.unsqueeze(0)])
    return join(mean, shifts, variances, here, rule)


def join(
    mean: Tensor, shift: Tensor, variances: Tensor, here: int, rule: str
) -> tuple[Window, Entries]:
    """Join the moments of the batches in a window.

    ``σ̄² = mean(v̂) + Var(μ̂)`` is the paper's ν̄ − μ̄² without its cancellation. A past batch that is
    not finite has no part in it.

    Args:
        mean: (C,), of the present batch.
        shift: (k, C), means less ``mean``.
        variances: (k, C).
        here: the present batch's row.
        rule: ``"max"`` or ``"drop"``.
    """
    if answers_at_once(shift):
        lowest, highest = torch.aminmax(variances)
        # the usual case: every batch counts and none needs its rule
        if lowest.item() >= 0.0 and highest.item() < math.inf:
            share = 1.0 / shift.shape[0]
            mean_shift = shift.mean(0)
            deviation = shift - mean_shift
            spread = torch.addcmul(variances, deviation, deviation).mean(0)
            window = Window(mean + mean_shift, spread, share)
            return window, Entries(here, share, deviation, share)
    kernels = vector_kernels_for(shift)
    found = None if kernels is None else kernels.join(mean, shift, variances, here, rule)
    if found is not None:
        statistics, entries = found
        return Window(*statistics), Entries(here, *entries)
    return _join_by_rule(mean, shift, variances, here, rule)


def _join_by_rule(
    mean: Tensor, shift: Tensor, variances: Tensor, here: int, rule: str
) -> tuple[Window, Entries]:
    counts = torch.isfinite(shift + variances)
    if rule == "drop":
        counts &= variances >= 0
    counts[here] = True
    part = counts.sum(0).to(mean.dtype).reciprocal()
    shares = torch.where(counts, part, 0.0)
    shift = torch.where(counts, shift, 0.0)
    known = torch.where(counts, variances, 0.0).clamp_min(0.0)
    mean_shift = shift.sum(0) * part
    deviation = torch.where(counts, shift - mean_shift, 0.0)
    spread = torch.addcmul(known, deviation, deviation).sum(0) * part
    grows = torch.where(variances > 0, shares, 0.0)
    return Window(mean + mean_shift, spread, part), Entries(here, shares, deviation, grows)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    window: Window,
    eps: float,
    producer: nn.Module | None = None,
    reach: Reach | None = None,
) -> Tensor:
    """``y = γ·(x − μ̄)/√(σ̄² + ε) + β``, where this batch has a share of μ̄ and σ̄².

    Args:
        x: the batch.
        weight: γ, or None.
        bias: β, or None.
        window: the statistics.
        eps: ε.
        producer: the layer whose weight and bias have a gradient through past batches, or None.
        reach: how they have.
    """
    followed = (None, None) if producer is None else (producer.weight, producer.bias)
    y: Tensor = _NormaliseAcrossIterations.apply(
        x, weight, bias, *window, eps, *followed, producer, reach
    )
    return y


class _NormaliseAcrossIterations(torch.autograd.Function):
    """The normalisation with its gradient by hand.

    The history is constant but for its reach, so with x̂ = (x − μ̄)·s:
    ``∂x = γ·s·(g − share·mean(g) − share·x̂·mean(g·x̂))``. BatchNorm's kernel computes that for
    share = 1; the share of the last term goes into its arguments, the rest is one addition. On a
    GPU two kernels of its own do all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        share: Part,
        eps: float,
        producer_weight: Tensor | None = None,
        producer_bias: Tensor | None = None,
        producer: nn.Module | None = None,
        reach: Reach | None = None,
    ) -> Tensor:
        wide_weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        wide_bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        # not saved: that they have changed by the time of the backward is the loan's affair
        ctx.followed = producer, producer_weight, producer_bias
        ctx.eps, ctx.share, ctx.reach = eps, share, reach
        ctx.save_for_backward(x, weight, bias, mean, variance)
        y: Tensor = torch.native_batch_norm(
            x, wide_weight, wide_bias, mean, variance, False, 0.0, eps
        )[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody wants second derivatives
            return _differentiable_backward(ctx, grad)
        found = _gradients(ctx, grad)
        by_weight = by_bias = None
        if ctx.reach is not None:
            assert found.lean is not None  # both are made for it
            assert found.growth is not None
            by_weight, by_bias = _gradient_through_history(
                ctx.reach, found.lean, found.growth, *ctx.followed
            )
        return found.x, found.weight, found.bias, *[None] * 4, by_weight, by_bias, None, None


class _Gradients(NamedTuple):
    """Of x, γ and β; minus that of μ̄ and minus twice that of σ̄²."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lean: Tensor | None
    growth: Tensor | None


def _gradients(ctx: Any, grad: Tensor) -> _Gradients:
    x, weight, bias, mean, variance = ctx.saved_tensors
    share = ctx.share
    kernels = _kernels_for(x)
    if kernels is not None:
        needed = (*ctx.needs_input_grad[:3], ctx.reach is not None)
        found = kernels.backward(grad, x, weight, bias, mean, variance, share, ctx.eps, needed)
        if found is not None:
            return _Gradients(*found)
    inverse_deviation = torch.rsqrt(variance + ctx.eps)
    root = math.sqrt(share) if isinstance(share, float) else share.sqrt()
    wide_weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward.default(
        grad,
        x,
        wide_weight / root,
        None,
        None,
        mean,
        inverse_deviation * root,
        True,
        ctx.eps,
        [True, True, True],
    )
    grad_weight = grad_scale / root
    gain = wide_weight * inverse_deviation
    lean = gain * grad_shift
    if not (isinstance(share, float) and share == 1.0):
        rest = lean * ((1.0 - share) * (x.shape[1] / x.numel()))
        grad_x.add_(per_channel(rest, x).to(grad_x.dtype))
    return _Gradients(
        grad_x,
        None if weight is None else grad_weight.to(weight.dtype),
        None if bias is None else grad_shift.to(bias.dtype),
        lean,
        None if ctx.reach is None else gain.mul_(inverse_deviation).mul_(grad_weight),
    )


def _kernels_for(x: Tensor) -> Any:
    """The module that works on ``x`` with kernels of its own, or None."""
    if not x.is_cuda or must_be_plain() or not can_launch(x):
        return None
    # with it comes Triton, which most installations never need
    from normswap.layers.gpu import cross_iteration

    return cross_iteration


def _gradient_through_history(
    reach: Reach,
    lean: Tensor,
    growth: Tensor,
    producer: nn.Module | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradients of μ̄ (``−lean``) and σ̄² (``−growth/2``) to the producer's.

    ``∂μ̄ = Σ share·p̄`` and ``∂σ̄² = Σ 2·share·deviation·p̄ + grows·(D − 2·moved·p̄)``.
    """
    here, share, deviation, grows = reach.entries
    by_weight = by_bias = None
    if bias is not None and bias.requires_grad:
        of_mean = torch.addcmul(lean, deviation, growth).mul_(-share)
        by_bias = (of_mean.sum(0) - of_mean[here]).to(bias.dtype)
    if producer is not None and weight is not None and reach.loan is not None:
        assert reach.by_slope is not None  # comes with the loan
        if isinstance(share, float) and share == grows:
            levers, part = deviation - reach.moved, share
        else:
            levers, part = share * deviation - grows * reach.moved, 1.0
        of_patch = torch.addcmul(lean * -share, levers, growth, value=-part)
        of_patch[here].zero_()
        of_slopes = (growth * reach.by_slope).unsqueeze(2).unbind(0)
        by_weight = _through_patches(of_patch, reach.loan.patches())
        for rows, slope in zip(reach.loan.owned, reach.loan.slopes(), strict=True):
            column = reduce(torch.add, [of_slopes[row] for row in rows])
            by_weight.addcmul_(column, slope.to(column.dtype))
        # detached: autograd adds the convolution's own gradient to a view's in new memory
        by_weight = unfold_weight(producer, by_weight.to(weight.dtype)).detach()
    return by_weight, by_bias


def _through_patches(coefficients: Tensor, patches: Tensor) -> Tensor:
    """``Σ_τ c_τ·p̄_τ``, (k, C) with (k, G, F) to (C, F)."""
    batches, groups, taps = patches.shape
    if groups == 1:
        return product(coefficients.t(), patches.view(batches, taps).t())
    by_group = coefficients.t().reshape(groups, -1, batches)
    return torch.bmm(by_group, patches.transpose(0, 1)).flatten(0, 1)


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward as autograd writes it, so that it has derivatives itself."""
    x, weight, bias, mean, variance = ctx.saved_tensors
    window = Window(mean, variance, ctx.share)
    producer, *followed = ctx.followed
    x, weight, bias, *followed = aliases(x, weight, bias, *followed)
    y = _plain(x, weight, bias, window, ctx.eps, (producer, *followed), ctx.reach)
    inputs = (x, weight, bias, *[None] * 4, *followed, None, None)
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(
        y, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True
    )
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    window: Window,
    eps: float,
    followed: tuple[nn.Module | None, Tensor | None, Tensor | None],
    reach: Reach | None,
) -> Tensor:
    """The normalisation around its present point, in operations that autograd knows.

    ``μ̄`` and the second moment about it are written as their present values plus what they gain
    when x, w and b move: nothing at this point, and the right derivatives of every order.
    """
    dtype = window.mean.dtype
    axes = reduced_axes(x)
    centred = x.to(dtype) - per_channel(window.mean, x)
    now = centred.detach()
    first = window.share * (centred.mean(axes) - now.mean(axes))
    second = window.share * ((centred * centred).mean(axes) - (now * now).mean(axes))
    if reach is not None:
        gained = _gained_through_history(reach, followed, dtype)
        first, second = first + gained[0], second + gained[1]
    variance = window.variance + second - first * first
    y = (centred - per_channel(first, x)) * per_channel(torch.rsqrt(variance + eps), x)
    if weight is not None:
        y = y * per_channel(weight.to(dtype), x)
    if bias is not None:
        y = y + per_channel(bias.to(dtype), x)
    return y.to(x.dtype)


def _gained_through_history(
    reach: Reach,
    followed: tuple[nn.Module | None, Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    producer, weight, bias = followed
    here, share, deviation, grows = reach.entries
    past = [row for row in range(len(deviation)) if row != here]
    share, grows = (p[past] if isinstance(p, Tensor) else p for p in (share, grows))
    deviation, moved = deviation[past], reach.moved[past]
    shift = torch.zeros_like(deviation)
    growth = torch.zeros_like(deviation[0])
    if producer is not None and weight is not None and reach.loan is not None:
        assert reach.by_slope is not None  # comes with the loan
        step = fold_weight(producer, (weight - weight.detach()).to(dtype))
        along = offsets_of(reach.loan.patches()[past], step)
        shift = shift + along
        growth = growth - (grows * along * (2.0 * moved + along)).sum(0)
        # copies: the ring moves on, and whoever differentiates twice may take his time
        slopes = torch.stack([slope.to(dtype) for slope in reach.loan.slopes()])
        gains = (slopes * step.flatten(0, 1)).sum(-1)
        for rows, gain in zip(reach.loan.owned, gains, strict=True):
            growth = growth - 2.0 * gain * reach.by_slope[list(rows)].sum(0)
    if bias is not None:
        shift = shift + (bias - bias.detach()).to(dtype)
    around = share * shift * (2.0 * deviation + shift)
    return (share * shift).sum(0), around.sum(0) + growth
