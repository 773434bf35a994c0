"""Batch Renormalization: BatchNorm whose training output is tied to its running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normswap.errors import LayerError
from normswap.layers.batch_statistics import (
    TracksBatches,
    batch_moments,
    in_eager,
    is_recomputation,
    may_be_repeated,
)
from normswap.layers.fused import Fused
from normswap.layers.gpu.launching import CannotLaunchError, can_launch
from normswap.layers.tracing import must_be_plain

_UNBOUNDED = 1e15  # what an infinite bound grows to within a ramp, where infinity times 0 is NaN


class _Renormalise(torch.autograd.Function):
    """y = γ·((x − μ_B)/σ_B·r + d) + β, with r and d constants.

    r and d fold into the affine (γ·r and γ·d + β), so BatchNorm's own kernels do the work in both
    directions. The backward is made of differentiable operations: second derivatives are right.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        r: Tensor,
        d: Tensor,
        eps: float,
    ) -> Tensor:
        scale, shift = (r, d) if weight is None else (r * weight, d * weight)
        if bias is not None:
            shift = shift + bias
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, mean, torch.rsqrt(variance + eps), r, d)
        y: Tensor = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        found = _gradients(grad, x, weight, bias, statistics, ctx.eps)
        return *found, None, None, None, None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean, inverse_deviation, r, d = statistics
    grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
        grad,
        x,
        r if weight is None else r * weight,
        None,
        None,
        mean,
        inverse_deviation,
        True,
        eps,
        [True, True, True],
    )
    grad_weight = grad_bias = None
    if weight is not None:
        grad_weight = (grad_scale * r + grad_shift * d).to(weight.dtype)
    if bias is not None:
        grad_bias = grad_shift.to(bias.dtype)
    return grad_x, grad_weight, grad_bias


class _RenormaliseByKernels(torch.autograd.Function):
    """The same with its statistics and their update in kernels of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        kernels: Any,
        plan: Any,
        running: Any,
        momentum: float | None,
        eps: float,
        limits: tuple[float, float],
    ) -> Tensor:
        ctx.kernels, ctx.eps = kernels, eps
        y: Tensor
        y, statistics = kernels.forward(plan, x, weight, bias, running, momentum, eps, limits)
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        found = None
        if not torch.is_grad_enabled():  # or somebody wants second derivatives
            needed = ctx.needs_input_grad[:3]
            found = ctx.kernels.backward(grad, x, weight, bias, statistics, needed)
        if found is None:
            found = _gradients(grad, x, weight, bias, statistics.unbind(), ctx.eps)
        return *found, None, None, None, None, None, None


def _kernels_for(x: Tensor) -> Any:
    """The module that works on ``x`` with kernels of its own, or None."""
    if not x.is_cuda or must_be_plain() or not can_launch(x):
        return None
    # with it comes Triton, which most installations never need
    from normswap.layers.gpu import batch_renorm

    return batch_renorm


class _BatchRenorm(TracksBatches):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 0,
        r_ramp: int = 0,
        d_ramp: int = 0,
        *,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not (r_max >= 1.0 and d_max >= 0.0):
            raise LayerError(
                type(self).__name__,
                got=f"r_max={r_max}, d_max={d_max}",
                need="r_max of 1 or more and d_max of 0 or more",
                hint="r_max=3, d_max=5",
            )
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.set_schedule(warmup=warmup, r_ramp=r_ramp, d_ramp=d_ramp)

    def set_schedule(self, warmup: int = 0, r_ramp: int = 0, d_ramp: int = 0) -> None:
        """Open r and d over time, counted in training forwards from now on.

        Args:
            warmup: iterations with r = 1 and d = 0, which is plain BatchNorm.
            r_ramp: iterations after the warm-up in which the bound of r grows from 1 to ``r_max``.
            d_ramp: iterations after the warm-up in which the bound of d grows from 0 to ``d_max``.

        Raises:
            LayerError: a negative number.
        """
        if min(warmup, r_ramp, d_ramp) < 0:
            raise LayerError(
                type(self).__name__,
                got=f"warmup={warmup}, r_ramp={r_ramp}, d_ramp={d_ramp}",
                need="iterations, 0 or more",
                hint="0 for bounds that are constant",
            )
        self.warmup, self.r_ramp, self.d_ramp = int(warmup), int(r_ramp), int(d_ramp)
        self.iteration = 0

    __jit_unused_properties__ = ("limits",)  # TorchScript compiles the others

    @property
    def limits(self) -> tuple[float, float]:
        """The bounds of r and d at the present iteration."""
        since = self.iteration - self.warmup
        if since < 0:
            return 1.0, 0.0
        r_limit = _ramp(1.0, self.r_max, since, self.r_ramp)
        return r_limit, _ramp(0.0, self.d_max, since, self.d_ramp)

    def _train(self, x: Tensor) -> Tensor:
        kernels = _kernels_for(x)
        y = None if kernels is None else self._train_by_kernels(kernels, x)
        return self._train_by_torch(x) if y is None else y

    def _train_by_kernels(self, kernels: Any, x: Tensor) -> Tensor | None:
        """One training forward by kernels, or None where they do not do."""
        # a checkpoint keeps and recalls what the other form makes
        if may_be_repeated() or is_recomputation() or self._counts_anew():
            return None
        running = kernels.Running(self.running_mean, self.running_var, self.num_batches_tracked)
        plan = kernels.plan_for(x, self.weight, self.bias, running, self.momentum)
        if plan is None:
            return None
        try:
            y: Tensor = _RenormaliseByKernels.apply(
                x,
                self.weight,
                self.bias,
                kernels,
                plan,
                running,
                self.momentum,
                self.eps,
                self.limits,
            )
        except CannotLaunchError:  # nothing is changed then
            return None
        if self._is_on_schedule():
            self.iteration += 1
        return y

    def _train_by_torch(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, variance = batch_moments(x)
            r, d = self._corrections(mean, variance, x.numel() // x.shape[1])
        self._recent.remember(mean, (r, d))
        if torch.compiler.is_compiling():
            return self._train_compiled(x, r, d)
        y: Tensor = _Renormalise.apply(x, self.weight, self.bias, mean, variance, r, d, self.eps)
        return y

    def _train_compiled(self, x: Tensor, r: Tensor, d: Tensor) -> Tensor:
        # a compiler merges the second look at the batch with the first, and derives the backward
        scale, shift = (r, d) if self.weight is None else (r * self.weight, d * self.weight)
        if self.bias is not None:
            shift = shift + self.bias
        y: Tensor = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, self.eps)[0]
        return y

    def _corrections(self, mean: Tensor, variance: Tensor, elements: int) -> tuple[Tensor, Tensor]:
        """R and d of this batch; takes the batch into the running statistics, once."""
        if is_recomputation():
            recalled = self._recent.recall(mean, variance, self.eps)
            if recalled is not None:
                r, d = recalled
                return r, d
        if self._counts_anew():
            self._track(mean, variance, elements)
            return torch.ones_like(mean), torch.zeros_like(mean)
        running_mean, running_variance = self._running(mean.dtype)
        running_deviation = torch.sqrt(running_variance + self.eps)
        deviation = torch.sqrt(variance + self.eps)
        r_limit, d_limit = self._next_limits()
        r = (deviation / running_deviation).clamp(1.0 / r_limit, r_limit)
        d = ((mean - running_mean) / running_deviation).clamp(-d_limit, d_limit)
        rate = self._count_batch()
        new_deviation = running_deviation + rate * (deviation - running_deviation)
        self._store_running(
            running_mean + rate * (mean - running_mean),
            (new_deviation * new_deviation - self.eps).clamp_min(0.0),
            mean + variance,
        )
        return r, d

    def _next_limits(self) -> tuple[float, float]:
        return self._advance() if self._is_on_schedule() else self.limits

    def _is_on_schedule(self) -> bool:
        return self.iteration < self.warmup + max(self.r_ramp, self.d_ramp)

    @in_eager
    def _advance(self) -> tuple[float, float]:
        # outside compiled code, where a counter would mean one recompilation per iteration
        limits = self.limits
        self.iteration += 1
        return limits

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        schedule = f"warmup={self.warmup}, r_ramp={self.r_ramp}, d_ramp={self.d_ramp}"
        bounds = f"r_max={self.r_max}, d_max={self.d_max}"
        return f"{super().extra_repr()}, {bounds}, {schedule}"


def _ramp(start: float, end: float, since: int, length: int) -> float:
    if since >= length:
        return end
    return start + (min(end, _UNBOUNDED) - start) * since / length


class BatchRenorm1d(_BatchRenorm):
    """Batch Renormalization of (N, C) or (N, C, L); see :class:`BatchRenorm2d`.

    Example:
        >>> BatchRenorm1d(4)(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    _ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Normalise by the batch, then correct towards the running statistics within bounds.

    ``x̂ = (x − μ_B)/σ_B·r + d``, ``y = γ·x̂ + β`` with ``r = σ_B/σ`` clipped to [1/r_max, r_max] and
    ``d = (μ_B − μ)/σ`` clipped to ±d_max, both constants for the gradient. Afterwards
    ``μ += α(μ_B − μ)`` and ``σ += α(σ_B − σ)``, where ``σ = √(running_var + ε)``. Eval is
    BatchNorm's own, to the bit, and so are the state dict's keys.

    One element per channel works (BatchNorm raises there). A channel whose batch statistics are not
    finite gives NaN in the output and leaves its running statistics alone. Under gradient
    checkpointing the repeated forward uses the r and d of the first and updates nothing (BatchNorm
    updates its running statistics twice). The iteration counter is training state: see
    :func:`normswap.layers.training_state`.

    Args:
        num_features: number of channels C.
        eps: ε, added to variances.
        momentum: α; None for a cumulative average, as in BatchNorm.
        affine: have γ (``weight``) and β (``bias``).
        r_max: bound of r, at least 1; ``float("inf")`` for none.
        d_max: bound of d, at least 0; ``float("inf")`` for none.
        warmup: iterations of plain BatchNorm first.
        r_ramp: iterations in which the bound of r grows to ``r_max``.
        d_ramp: iterations in which the bound of d grows to ``d_max``.
        track_running_stats: must stay True.
        device: where parameters and buffers live.
        dtype: their dtype.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        LayerError: bounds or schedule out of range, no running statistics, or an input with
            another number of axes or channels.

    Example:
        >>> layer = BatchRenorm2d(4, r_max=float("inf"), d_max=float("inf"), momentum=0.0)
        >>> x = torch.randn(2, 4, 3, 3)
        >>> torch.allclose(layer(x), layer.eval()(x), atol=1e-5)
        True

    Reference:
        Ioffe, "Batch Renormalization", arXiv 1702.03275, algorithm 1.
    """

    _ranks = (4,)


class BatchRenorm3d(_BatchRenorm):
    """Batch Renormalization of (N, C, D, H, W); see :class:`BatchRenorm2d`.

    Example:
        >>> BatchRenorm3d(4)(torch.randn(1, 4, 2, 3, 3)).shape
        torch.Size([1, 4, 2, 3, 3])
    """

    _ranks = (5,)


class BatchRenormAct1d(Fused, BatchRenorm1d):
    """``act(drop(BatchRenorm1d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class BatchRenormAct2d(Fused, BatchRenorm2d):
    """``act(drop(BatchRenorm2d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class BatchRenormAct3d(Fused, BatchRenorm3d):
    """``act(drop(BatchRenorm3d(x)))``; see :class:`normswap.layers.fused.Fused`."""
