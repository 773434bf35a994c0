"""Cross-Iteration Batch Normalization: BatchNorm over the last k iterations.

Statistics of past iterations are brought to today's weights through what the layer before makes
possible to know exactly (the mean) or to first order (the variance); see ``producers``.

Shapes: k entries of history, G groups, C channels, F weights of one channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.batch_statistics import (
    TracksBatches,
    batch_moments,
    centred_moments,
    check_positive,
    check_rank,
    full_precision,
    in_eager,
    is_recomputation,
    per_channel,
)
from normswap.layers.fused import Fused
from normswap.layers.producers import (
    Pad,
    ProducerLink,
    fold_weight,
    mean_patch,
    producer_problem,
    weight_gradient,
)

_RULES = ("max", "drop")


class _NormaliseAcrossIterations(torch.autograd.Function):
    """y = γ·(x − μ̄)/√(σ̄² + ε) + β, where this batch has a ``share`` of μ̄ and σ̄².

    The history is constant, so with x̂ = (x − μ̄)·s:
    ``∂x = γ·s·(g − share·mean(g) − share·x̂·mean(g·x̂))``. BatchNorm's kernel computes that for
    share = 1; the share of the last term goes into its arguments, the rest is one addition.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        share: Tensor,
        eps: float,
    ) -> Tensor:
        wide_weight = None if weight is None else weight.to(mean.dtype)
        wide_bias = None if bias is None else bias.to(mean.dtype)
        if wide_weight is None:
            wide_weight = torch.ones_like(mean)
        if wide_bias is None:
            wide_bias = torch.zeros_like(mean)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, mean, torch.rsqrt(variance + eps), share)
        y: Tensor = torch.native_batch_norm(
            x, wide_weight, wide_bias, mean, variance, False, 0.0, eps
        )[0]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_deviation, share = ctx.saved_tensors
        root = share.sqrt()
        scale = root.reciprocal() if weight is None else weight / root
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            grad,
            x,
            scale,
            None,
            None,
            mean,
            inverse_deviation * root,
            True,
            ctx.eps,
            [True, True, True],
        )
        elements = x.numel() // x.shape[1]
        gain = scale * root * inverse_deviation
        rest = gain * grad_shift * ((1.0 - share) / elements)
        grad_x.add_(per_channel(rest, x).to(grad_x.dtype))
        grad_weight = None if weight is None else (grad_scale / root).to(weight.dtype)
        grad_bias = None if bias is None else grad_shift.to(bias.dtype)
        grad_mean = grad_variance = None
        if ctx.needs_input_grad[3]:  # the history's part of the statistics is no constant
            grad_mean = -gain * grad_shift
            grad_variance = -0.5 * gain * inverse_deviation * (grad_scale / root)
        return grad_x, grad_weight, grad_bias, grad_mean, grad_variance, None, None


class _ThroughHistory(torch.autograd.Function):
    """μ̄ and σ̄² as functions of today's weight and bias, through past batches alone."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *reach: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*reach)
        return mean.clone(), variance.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor | None, ...]:
        reach = _Reach(*ctx.saved_tensors)
        weight_dtype, bias_dtype = ctx.dtypes
        rows = (*reach.mean.shape[:2], 1)
        grad_weight = grad_mean.view(rows) * reach.mean + grad_variance.view(rows) * reach.variance
        grad_bias = grad_mean * reach.mean_bias + grad_variance * reach.variance_bias
        return (
            None,
            None,
            grad_weight.to(weight_dtype),
            None if bias_dtype is None else grad_bias.to(bias_dtype),
            *[None] * len(reach),
        )


class _Batch(NamedTuple):
    """What one batch leaves behind, in the statistics' dtype.

    Attributes:
        mean: (C,), of the producer's output; empty with compensation.
        variance: (C,), biased.
        offset: (C,), ``⟨patch, w⟩``, the mean less the bias; empty without compensation.
        patch: (G, F), ∂mean/∂w; empty without compensation.
        slope: (weight's shape), ∂variance/∂w up to ``factor``; empty without compensation.
        factor: (1,), 2 over the number of elements per channel.
    """

    mean: Tensor
    variance: Tensor
    offset: Tensor
    patch: Tensor
    slope: Tensor
    factor: Tensor


class _History:
    """A ring of the last ``size`` batches."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.position = 0
        self.filled = 0
        self.rings: _Batch | None = None

    def push(self, batch: _Batch) -> None:
        """Put ``batch`` in the place of the oldest entry."""
        if self.size == 0:
            return
        if self.rings is None or not _fits(self.rings, batch):
            self.rings = _Batch(*(_ring_like(field, self.size) for field in batch))
            self.position = self.filled = 0
        for ring, field in zip(self.rings, batch, strict=True):
            ring[self.position].copy_(field)
        self.position = (self.position + 1) % self.size
        self.filled = min(self.filled + 1, self.size)

    def entries(self, like: Tensor) -> _Batch | None:
        """All entries stacked, with the device and dtype of ``like``; None if there are none."""
        if self.rings is None or self.filled == 0:
            return None
        if self.rings.variance.device != like.device or self.rings.variance.dtype != like.dtype:
            self.rings = _Batch(*(ring.to(like) for ring in self.rings))
        return _Batch(*(ring[: self.filled] for ring in self.rings))

    def state(self) -> dict[str, Tensor | int]:
        """Plain data, ready for a training checkpoint."""
        state: dict[str, Tensor | int] = {"position": self.position, "filled": self.filled}
        if self.rings is not None:
            state.update({name: ring.clone() for name, ring in self.rings._asdict().items()})
        return state

    def load(self, state: dict[str, Tensor | int]) -> None:
        """Take over what ``state`` returned."""
        self.position, self.filled = int(state["position"]), int(state["filled"])
        found = [state[name] for name in _Batch._fields if name in state]
        rings = [ring.clone() for ring in found if isinstance(ring, Tensor)]
        self.rings = _Batch(*rings) if rings else None


def _ring_like(field: Tensor, size: int) -> Tensor:
    """``size`` times ``field``, each slot in the memory format of ``field``."""
    dense = torch.empty_like(field)
    ring = dense.new_empty(size * field.numel())
    return ring.as_strided((size, *field.shape), (field.numel(), *dense.stride()))


def _fits(rings: _Batch, batch: _Batch) -> bool:
    return all(
        ring.shape[1:] == field.shape and ring.dtype == field.dtype and ring.device == field.device
        for ring, field in zip(rings, batch, strict=True)
    )


class _Window(NamedTuple):
    """Statistics over the window.

    Attributes:
        mean: (C,), μ̄.
        variance: (C,), σ̄².
        share: (C,), the part that the current batch has in both.
    """

    mean: Tensor
    variance: Tensor
    share: Tensor


class _Reach(NamedTuple):
    """How the statistics over the window depend on today's weights through past batches.

    Attributes:
        mean: (G, C/G, F), ∂μ̄/∂w.
        variance: (G, C/G, F), ∂σ̄²/∂w.
        mean_bias: (C,), ∂μ̄/∂b.
        variance_bias: (C,), ∂σ̄²/∂b.
    """

    mean: Tensor
    variance: Tensor
    mean_bias: Tensor
    variance_bias: Tensor


def _counts(past_mean: Tensor, past_variance: Tensor, rule: str) -> Tensor:
    """Which entries of the history have a part in the statistics, per channel."""
    counts = torch.isfinite(past_mean) & torch.isfinite(past_variance)
    return counts & (past_variance >= 0) if rule == "drop" else counts


def _average(mean: Tensor, variance: Tensor, past: tuple[Tensor, Tensor], rule: str) -> _Window:
    """Join the batch's moments and the past ones (k, C), as brought to today's weights.

    ``σ̄² = mean(v̂) + Var(μ̂)`` is the paper's ν̄ − μ̄² without its cancellation. An entry that is
    not finite has no part in it.
    """
    past_mean, past_variance = past
    counts = _counts(past_mean, past_variance, rule)
    past_mean = torch.where(counts, past_mean, mean)
    past_variance = torch.where(counts, past_variance.clamp_min(0.0), 0.0)
    share = (1.0 + counts.sum(0)).to(mean.dtype).reciprocal()
    present = counts.to(mean.dtype)
    # deviations from the current mean, so that a mean far from zero costs no digits
    shift = past_mean - mean
    mean_shift = shift.sum(0) * share
    spread = (present * (shift - mean_shift).square()).sum(0) + mean_shift.square()
    return _Window(mean + mean_shift, (variance + past_variance.sum(0) + spread) * share, share)


class _CrossIterationBatchNorm(TracksBatches):
    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        window: int = 8,
        burn_in: int = 0,
        compensate: bool = True,
        variance_rule: str = "max",
        *,
        through_history: bool = False,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_positive(self, window=window)
        if burn_in < 0 or variance_rule not in _RULES:
            raise LayerError(
                type(self).__name__,
                got=f"burn_in={burn_in}, variance_rule={variance_rule!r}",
                need="iterations, 0 or more, and one of " + ", ".join(map(repr, _RULES)),
                hint="burn_in=0, variance_rule='max'",
            )
        if through_history and not compensate:
            raise LayerError(
                type(self).__name__,
                got="through_history=True, compensate=False",
                need="compensation: without it the history does not depend on the weights",
                hint="compensate=True",
            )
        self.window = window
        self.burn_in = burn_in
        self.compensate = compensate
        self.variance_rule = variance_rule
        self.through_history = through_history
        self.iteration = 0
        self._history = _History(window - 1)
        self._link: ProducerLink | None = None

    @property
    def producer(self) -> nn.Module | None:
        """The attached convolution or linear layer, or None."""
        return None if self._link is None else self._link.producer

    def attach(self, producer: nn.Module, pad: Pad | None = None) -> None:
        """Wire the layer to the module whose output it normalises.

        The producer gets a forward hook; it does not become a child of this layer. A deep copy or a
        pickle of the model that holds both keeps them wired.

        Args:
            producer: a convolution, transposed convolution or linear layer.
            pad: what the producer does to its input before it convolves it without padding, if its
                forward does so by hand (timm's ``Conv2dSame`` is known).

        Raises:
            LayerError: a module that CBN cannot follow, or with another number of outputs.
        """
        name = type(self).__name__
        around = self in producer.modules()
        problem = None if pad is not None else producer_problem(producer, around=around)
        if problem is not None:
            raise LayerError(
                f"{name}.attach",
                got=problem,
                need="torch's own convolution, transposed convolution or linear layer",
                hint="BatchRenorm, which needs no producer, or compensate=False",
            )
        outputs = getattr(producer, "out_channels", getattr(producer, "out_features", None))
        if outputs != self.num_features:
            raise LayerError(
                f"{name}.attach",
                got=f"a producer of {outputs} channels",
                need=f"{self.num_features}, the layer's num_features",
                hint="the module whose output this layer normalises",
            )
        self.detach()
        self._link = ProducerLink(producer, self, pad)

    def detach(self) -> None:
        """Take the hook off the producer and forget the history."""
        if self._link is not None:
            self._link.remove()
        self._link = None
        self.reset_history()

    def reset_history(self) -> None:
        """Forget past iterations; the window fills again."""
        self._history = _History(self.window - 1)

    def training_state(self) -> dict[str, Tensor | int]:
        """The iteration and the history."""
        return super().training_state() | self._history.state()

    def load_training_state(self, state: dict[str, Tensor | int]) -> None:
        """Take over what ``training_state`` returned."""
        super().load_training_state(state)
        self._history.load(state)

    def _check_input_dim(self, x: Tensor) -> None:
        check_rank(self, x, self._ranks)

    @in_eager
    def _train(self, x: Tensor) -> Tensor:
        with torch.no_grad(), full_precision(x.device.type):
            mean, window, reach = self._window_statistics(x.detach())
        self._recent.remember(mean, (*window, *(reach or ())))
        centre, spread = window.mean, window.variance
        if reach is not None and self._link is not None:
            weight, bias = self._link.producer.weight, self._link.producer.bias
            folded = fold_weight(self._link.producer, cast(Tensor, weight))
            centre, spread = _ThroughHistory.apply(centre, spread, folded, bias, *reach)
        y: Tensor = _NormaliseAcrossIterations.apply(
            x, self.weight, self.bias, centre, spread, window.share, self.eps
        )
        return y

    def _window_statistics(self, x: Tensor) -> tuple[Tensor, _Window, _Reach | None]:
        """The batch's own mean and the statistics over the window, which it enters, once."""
        if is_recomputation():
            mean, variance = batch_moments(x)
            recalled = self._recent.recall(mean, variance, self.eps)
            if recalled is not None:
                reach = _Reach(*recalled[3:]) if recalled[3:] else None
                return mean, _Window(*recalled[:3]), reach
        self.iteration += 1
        collects = self.window > 1 and self.iteration > self.burn_in
        reach = None
        if not collects:
            mean, variance = batch_moments(x)
            window = _Window(mean, variance, torch.ones_like(mean))
        elif self.compensate:
            mean, variance, window, reach = self._compensated(x)
        else:
            mean, variance, window = self._naive(x)
        self._track(mean, variance, x.numel() // x.shape[1])
        return mean, window, reach

    def _naive(self, x: Tensor) -> tuple[Tensor, Tensor, _Window]:
        mean, variance = batch_moments(x)
        past = self._history.entries(mean)
        moments = _no_entries(mean) if past is None else (past.mean, past.variance)
        window = _average(mean, variance, moments, self.variance_rule)
        nothing = mean.new_empty(0)
        self._history.push(_Batch(mean, variance, nothing, nothing, nothing, nothing))
        return mean, variance, window

    def _compensated(self, x: Tensor) -> tuple[Tensor, Tensor, _Window, _Reach | None]:
        link = self._link
        call = None if link is None else link.take(x)
        if link is None or call is None:
            raise self._unwired()
        producer = link.producer
        mean, variance, centred = centred_moments(x)
        weight = fold_weight(producer, _tensor(producer, "weight").to(mean.dtype))
        call = call._replace(input=call.input.to(mean.dtype))
        past = self._history.entries(mean)
        patch = mean_patch(producer, call, link.pad)
        patches = (
            patch.unsqueeze(0) if past is None else torch.cat([patch.unsqueeze(0), past.patch])
        )
        # one contraction for the present and the past: the weight is read once
        offsets = _predicted_offsets(patches, weight)
        moments = _no_entries(mean)
        if past is None:
            bias = _bias(producer)
            self._check_input(mean, variance, offsets[0] if bias is None else offsets[0] + bias)
        else:
            slopes = fold_weight(producer, past.slope)
            moments = _predict(past, offsets[1:], slopes, weight, _bias(producer))
        window = _average(mean, variance, moments, self.variance_rule)
        reach = None
        if past is not None and self.through_history:
            reach = _reach(window, moments, past, offsets[1:], slopes, self.variance_rule)
        slope = weight_gradient(producer, call, centred, link.pad)
        factor = mean.new_full((1,), 2.0 * x.shape[1] / x.numel())
        self._history.push(_Batch(mean.new_empty(0), variance, offsets[0], patch, slope, factor))
        return mean, variance, window, reach

    def _check_input(self, mean: Tensor, variance: Tensor, made: Tensor) -> None:
        """What comes in must be what the producer makes: an operation between moves the means."""
        room = 0.1 * variance.sqrt() + 0.05 * mean.abs() + 1e-3  # half precision stays within
        if not mean.is_meta and bool(((mean - made).abs() > room).any()):
            raise self._unwired()

    def _unwired(self) -> LayerError:
        if self._link is None:
            return LayerError(
                type(self).__name__,
                got="a training forward before attach()",
                need="the module that makes its input, to follow its weights",
                hint="norm.attach(conv), or compensate=False",
            )
        return LayerError(
            type(self).__name__,
            got="an input that its producer has not made in this forward",
            need=f"the output of the attached {type(self._link.producer).__name__}",
            hint="attach() with the module that makes the input",
        )

    def _track(self, mean: Tensor, variance: Tensor, elements: int) -> None:
        running_mean, running_variance = self._running(mean.dtype)
        rate = self._count_batch()
        unbiased = variance * (elements / max(elements - 1, 1))
        self._store_running(
            running_mean + rate * (mean - running_mean),
            running_variance + rate * (unbiased - running_variance),
            mean + variance,
        )

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}, "
            f"compensate={self.compensate}, variance_rule={self.variance_rule!r}"
            + (", through_history=True" if self.through_history else "")
        )


def _no_entries(mean: Tensor) -> tuple[Tensor, Tensor]:
    return mean.new_empty(0, mean.numel()), mean.new_empty(0, mean.numel())


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)  # checked when the producer was attached
    return value.detach()


def _bias(producer: nn.Module) -> Tensor | None:
    return None if producer.bias is None else _tensor(producer, "bias")


def _predicted_offsets(patches: Tensor, weight: Tensor) -> Tensor:
    """``⟨p̄, w⟩``: (k, G, F) with (G, C/G, F) to (k, C)."""
    return torch.matmul(weight, patches.permute(1, 2, 0)).flatten(0, 1).t()


def _contract(slopes: Tensor, weight: Tensor) -> Tensor:
    """``⟨D, w⟩``: (k, G, C/G, F) with (G, C/G, F) to (k, C).

    With the weight as the row, one product per channel takes a fifth of the time of ``einsum``,
    which makes it the column.
    """
    rows = weight.flatten(0, 1).unsqueeze(1)
    return torch.bmm(rows, slopes.flatten(1, 2).permute(1, 2, 0)).squeeze(1).t()


def _predict(
    past: _Batch, offsets: Tensor, slopes: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Moments (k, C) of past batches under today's weights.

    ``μ̂ = ⟨p̄, w⟩ + b`` and, with ``⟨D, w_τ⟩ = 2v_τ``, ``v̂ = ⟨D, w⟩ − v_τ − ⟨p̄, w − w_τ⟩²``.
    """
    contracted = _contract(slopes, weight) * past.factor
    means = offsets if bias is None else offsets + bias.to(offsets.dtype)
    return means, contracted - past.variance - (offsets - past.offset).square()


def _reach(
    window: _Window,
    moments: tuple[Tensor, Tensor],
    past: _Batch,
    offsets: Tensor,
    slopes: Tensor,
    rule: str,
) -> _Reach:
    """Derivatives of ``_average`` and ``_predict`` by the weight, past batches only.

    ``∂σ̄²/∂μ̂_τ = 2·share·(μ̂_τ − μ̄)`` and ``∂σ̄²/∂v̂_τ = share`` where v̂_τ counts and is positive.
    """
    past_mean, past_variance = moments
    counts = _counts(past_mean, past_variance, rule)
    share = torch.where(counts, window.share, 0.0)
    lean = 2.0 * share * torch.where(counts, past_mean - window.mean, 0.0)
    grows = torch.where(past_variance > 0, share, 0.0)
    moved = torch.where(counts, offsets - past.offset, 0.0)
    patches = torch.nan_to_num(past.patch, posinf=0.0, neginf=0.0).transpose(0, 1)
    slopes = torch.nan_to_num(slopes, posinf=0.0, neginf=0.0).flatten(1, 2).transpose(0, 1)
    groups = len(patches)

    def spread(coefficients: Tensor) -> Tensor:  # (k, C) over the patches: (G, C/G, F)
        return coefficients.t().reshape(groups, -1, len(coefficients)) @ patches

    of_slopes = (grows * past.factor).t().unsqueeze(1) @ slopes
    of_patches = spread(lean - 2.0 * grows * moved)
    return _Reach(
        spread(share), of_patches + of_slopes.view_as(of_patches), share.sum(0), lean.sum(0)
    )


class CrossIterationBatchNorm1d(_CrossIterationBatchNorm):
    """CBN of (N, C) or (N, C, L); see :class:`CrossIterationBatchNorm2d`.

    Example:
        >>> linear, norm = nn.Linear(3, 4), CrossIterationBatchNorm1d(4)
        >>> norm.attach(linear)
        >>> norm(linear(torch.randn(2, 3))).shape
        torch.Size([2, 4])
    """

    _ranks = (2, 3)


class CrossIterationBatchNorm2d(_CrossIterationBatchNorm):
    """Normalise by the statistics of the last ``window`` iterations, brought to today's weights.

    ``μ̂_τ = μ_τ + ⟨∂μ_τ/∂w, w_t − w_τ⟩``, and the second moment ν likewise;
    ``μ̄ = mean(μ̂)``, ``ν̄ = mean(max(ν̂, μ̂²))``, ``σ̄² = ν̄ − μ̄²``, ``y = γ(x − μ̄)/√(σ̄² + ε) + β``.
    The gradient flows through the current batch's share only, unless ``through_history`` is set.
    Eval is BatchNorm's own, to the bit, and so are the state dict's keys; running statistics are
    BatchNorm's too.

    Wire it with :meth:`attach` before training. Every training forward counts as an iteration, also
    under ``torch.no_grad`` and with gradient accumulation, as BatchNorm's running statistics do.
    Under gradient checkpointing the repeated forward uses the statistics of the first and counts
    nothing (BatchNorm updates its running statistics twice). A channel whose batch statistics are
    not finite gives NaN in the output, leaves its running statistics alone and has no part in
    later windows. One element per channel works (BatchNorm raises there). In ``torch.compile`` the
    training forward is a graph break. History and counter are training state, never in the state
    dict: see :func:`normswap.layers.training_state`.

    Args:
        num_features: number of channels C.
        eps: ε, added to the variance.
        momentum: weight of the batch in the running statistics; None for a cumulative average.
        affine: have γ (``weight``) and β (``bias``).
        window: iterations in the statistics, the current one included; 1 is BatchNorm.
        burn_in: iterations of plain BatchNorm first.
        compensate: apply the Taylor term; without it ("naive CBN") no producer is needed.
        variance_rule: what to do with a predicted variance below 0: ``"max"`` takes 0, ``"drop"``
            leaves the entry out, as the paper's code does.
        through_history: let the gradient reach the producer's weight through past batches too. The
            paper stops it there, which leaves the weight's scale free to grow; at batch 2 training
            can be very much slower for it. Costs one more look at the history, and keeps two more
            tensors of the weight's size for the backward.
        track_running_stats: must stay True.
        device: where parameters and buffers live.
        dtype: their dtype.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        LayerError: arguments out of range, no running statistics, an input with another number of
            axes or channels, or a training forward without its producer.

    Example:
        >>> conv, norm = nn.Conv2d(3, 4, 3), CrossIterationBatchNorm2d(4, window=4)
        >>> norm.attach(conv)
        >>> norm(conv(torch.randn(2, 3, 8, 8))).shape
        torch.Size([2, 4, 6, 6])

    Reference:
        Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712, section 3.
        *Differs from the paper* in arithmetic only: the mean is followed exactly, and the variance
        instead of the second moment, which cancels less.
    """

    _ranks = (4,)


class CrossIterationBatchNorm3d(_CrossIterationBatchNorm):
    """CBN of (N, C, D, H, W); see :class:`CrossIterationBatchNorm2d`.

    Example:
        >>> conv, norm = nn.Conv3d(3, 4, 1), CrossIterationBatchNorm3d(4)
        >>> norm.attach(conv)
        >>> norm(conv(torch.randn(1, 3, 2, 5, 5))).shape
        torch.Size([1, 4, 2, 5, 5])
    """

    _ranks = (5,)


class CrossIterationBatchNormAct1d(Fused, CrossIterationBatchNorm1d):
    """``act(drop(CrossIterationBatchNorm1d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class CrossIterationBatchNormAct2d(Fused, CrossIterationBatchNorm2d):
    """``act(drop(CrossIterationBatchNorm2d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class CrossIterationBatchNormAct3d(Fused, CrossIterationBatchNorm3d):
    """``act(drop(CrossIterationBatchNorm3d(x)))``; see :class:`normswap.layers.fused.Fused`."""
