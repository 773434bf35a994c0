"""Cross-Iteration Batch Normalization: BatchNorm over the last k iterations.

Statistics of past iterations are brought to today's weights through what the layer before makes
possible to know exactly (the mean) or to first order (the variance); see ``producers`` and
``variance_slope``. The arithmetic of the window is in ``iteration_window``.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.batch_statistics import (
    TracksBatches,
    batch_moments,
    check_positive,
    full_precision,
    in_eager,
    is_all_finite,
    is_recomputation,
)
from normswap.layers.fused import Fused
from normswap.layers.iteration_history import Batch, History, Past, Present
from normswap.layers.iteration_window import (
    Entries,
    Reach,
    Window,
    average,
    join,
    normalise,
    offsets_of,
    predict,
)
from normswap.layers.producers import (
    Pad,
    ProducerLink,
    fold_weight,
    mean_patch,
    producer_problem,
)
from normswap.layers.variance_slope import variance_slope

_RULES = ("max", "drop")
_TRUSTED = 4.0
"""The largest factor by which a borrowed slope is stretched."""
_TINY = 1e-30
_HISTORY_DTYPES = (None, torch.bfloat16, torch.float16)


class _CrossIterationBatchNorm(TracksBatches):
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
        through_history: bool | None = None,
        sampling: int = 2,
        history_dtype: torch.dtype | None = None,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_positive(self, window=window, sampling=sampling)
        through_history = compensate if through_history is None else through_history
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
        if sampling != int(sampling) or history_dtype not in _HISTORY_DTYPES:
            raise LayerError(
                type(self).__name__,
                got=f"sampling={sampling}, history_dtype={history_dtype}",
                need="a whole number of rows, and None, torch.bfloat16 or torch.float16",
                hint="sampling=2, history_dtype=None",
            )
        self.window = window
        self.burn_in = burn_in
        self.compensate = compensate
        self.variance_rule = variance_rule
        self.through_history = through_history
        self.sampling = int(sampling)
        self._turn = 0
        self.history_dtype = history_dtype
        self.iteration = 0
        self._link: ProducerLink | None = None
        self.reset_history()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and self.__dict__.get("_link") is not None:
            self.__dict__["_link"].listen(bool(value))

    __jit_unused_properties__ = ("producer",)  # TorchScript compiles the others

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
        every = min(self.sampling**2, self.window)
        self._history = History(
            self.window - 1, lends=self.through_history, every=every, phase=self._turn
        )

    def stagger(self, turn: int) -> None:
        """Take another turn than other layers to see how the variance depends on the weight.

        With ``sampling`` that is done for some batches only, and layers that all did it in the same
        step would make that one dearer than the others. Forgets the history.
        """
        self._turn = turn
        self.reset_history()

    def history_bytes(self) -> int:
        """Bytes that the history takes; training state, beside parameters and buffers."""
        return self._history.nbytes()

    def training_state(self) -> dict[str, Tensor | int]:
        """The iteration and the history."""
        return super().training_state() | self._history.state()

    def load_training_state(self, state: dict[str, Tensor | int]) -> None:
        """Take over what ``training_state`` returned."""
        self._history.load(state)
        super().load_training_state(state)

    @in_eager
    def _train(self, x: Tensor) -> Tensor:
        with torch.no_grad(), full_precision(x.device.type):
            mean, window, reach = self._window_statistics(x.detach())
        self._remember_window(mean, window, reach)
        if reach is None or self._link is None:
            return normalise(x, self.weight, self.bias, window, self.eps)
        producer = self._link.producer
        return normalise(x, self.weight, self.bias, window, self.eps, producer, reach)

    def _remember_window(self, mean: Tensor, window: Window, reach: Reach | None) -> None:
        loan = None if reach is None else reach.loan
        if loan is not None and reach is not None:
            # a graph holds the loan if it may need it; without gradients there is no graph
            if not torch.is_grad_enabled() and not is_recomputation():
                self._history.keep(loan)
            reach = reach._replace(loan=None)
        self._recent.remember(mean, (window, reach, None if loan is None else weakref.ref(loan)))

    def _recalled(self, mean: Tensor, variance: Tensor) -> tuple[Window, Reach | None] | None:
        """What the first forward of a checkpoint used, in the second."""
        found = self._recent.recall(mean, variance, self.eps)
        if found is None:
            return None
        window, reach, loan = found
        if loan is None:
            return window, reach
        if loan() is None:
            raise LayerError(
                type(self).__name__,
                got="a checkpoint that runs again after its history was overwritten",
                need="each forward's backward before many other forwards",
                hint="torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            )
        return window, reach._replace(loan=loan())

    def _window_statistics(self, x: Tensor) -> tuple[Tensor, Window, Reach | None]:
        """The batch's own mean and the statistics over the window, which it enters, once."""
        mean, variance = batch_moments(x)
        recalled = self._recalled(mean, variance) if is_recomputation() else None
        if recalled is not None:
            return mean, *recalled
        reach = None
        collects = False
        if not self._counts_anew():
            self.iteration += 1
            collects = self.window > 1 and self.iteration > self.burn_in
        if not collects:
            window = Window(mean, variance, 1.0)
        elif self.compensate:
            window, reach = self._compensated(x, mean, variance)
        else:
            window = self._naive(mean, variance)
        self._track(mean, variance, x.numel() // x.shape[1], _is_known_finite(window))
        return mean, window, reach

    def _naive(self, mean: Tensor, variance: Tensor) -> Window:
        self._history.prepare(mean, None, mean.dtype)
        window, _, _ = self._join_constant(mean, variance, mean)
        self._history.push(Batch(mean, variance))
        return window

    def _compensated(
        self, x: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Window, Reach | None]:
        link = self._link
        call = None if link is None else link.take(x)
        if link is None or call is None:
            raise self._unwired()
        producer = link.producer
        if self._is_constant(producer):
            return self._beside_a_constant(producer, mean, variance)
        weight = fold_weight(producer, _tensor(producer, "weight").to(mean.dtype))
        history = self._history
        history.prepare(mean, (*weight.shape,), self.history_dtype or mean.dtype)
        wide = call._replace(input=call.input.to(mean.dtype))
        mean_patch(producer, wide, link.pad, out=history.place())
        present = history.present()
        # one contraction for the present and the past: the weight is read once
        offsets = offsets_of(present.patches, weight)
        offset = offsets[present.here]
        reach = along = None
        if history.filled == 0:
            bias = _bias(producer)
            self._check_input(mean, variance, offset if bias is None else offset + bias)
            window = Window(mean, variance, 1.0)
        else:
            moved = offsets - present.offset
            variances, along = predict(present, variance, moved, weight)
            # a bias moves all means alike
            shift = offsets - offset
            window, entries = join(mean, shift, variances, present.here, self.variance_rule)
            reach = self._reach(entries, moved, present)
        factor = None
        if history.borrows and along is not None:
            factor = _borrowed(variance, along)
            rest = torch.addcmul(variance, along, factor, value=-1)
        else:
            room, moments = history.room(), (mean, variance)
            along = variance_slope(
                producer, call, x, moments, link.pad, sampling=self.sampling, out=room
            )
            if room.dtype != mean.dtype:
                # what rounding took from the slope is taken from the rest, so that v̂(w_τ) = v_τ
                along = (room.to(mean.dtype) * weight.flatten(0, 1)).sum(-1)
            rest = variance - along
        if not _is_known_finite(window):
            history.forget_values(mean, variance)
            factor = None if factor is None else factor.nan_to_num_()
        history.push(Batch(offset, variance, rest, factor))
        return window, reach

    def _is_constant(self, producer: nn.Module) -> bool:
        """Whether the producer's weight stands still, so that its past batches need no slope."""
        weight = cast(Tensor, producer.weight)
        moved = self._history.has_moved(weight)
        return not (weight.requires_grad or moved or self._history.has_slopes)

    def _beside_a_constant(
        self, producer: nn.Module, mean: Tensor, variance: Tensor
    ) -> tuple[Window, Reach | None]:
        """A frozen weight: past batches are what they were, but for the bias."""
        self._history.prepare(mean, None, mean.dtype)
        bias = _bias(producer)
        offset = mean if bias is None else mean - bias.to(mean.dtype)
        window, past, entries = self._join_constant(mean, variance, offset)
        reach = None
        if past is not None and entries is not None:
            reach = self._reach(entries, torch.zeros_like(entries.deviation), None)
        self._history.push(Batch(offset, variance))
        return window, reach

    def _join_constant(
        self, mean: Tensor, variance: Tensor, offset: Tensor
    ) -> tuple[Window, Past | None, Entries | None]:
        """Past batches as they were."""
        past = self._history.past()
        if past is None:
            return Window(mean, variance, 1.0), None, None
        shift = past.offset - offset
        window, entries = average(mean, variance, shift, past.variance, self.variance_rule)
        return window, past, entries

    def _reach(self, entries: Entries, moved: Tensor, present: Present | None) -> Reach | None:
        """What the gradient needs to go on through past batches, if it shall."""
        if not self.through_history or self._link is None:
            return None
        weight = cast(Tensor, self._link.producer.weight)
        bias = cast(Tensor | None, self._link.producer.bias)
        if present is None or not weight.requires_grad:
            if bias is None or not bias.requires_grad:
                return None
            return Reach(entries, moved)
        if isinstance(entries.share, Tensor):
            moved = torch.where(entries.share > 0, moved, 0.0)
        loan = self._history.lend(present, weight)
        return Reach(entries, moved, loan, present.factor * (-0.5 * entries.grows))

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

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}, "
            f"compensate={self.compensate}, variance_rule={self.variance_rule!r}, "
            f"through_history={self.through_history}, sampling={self.sampling}"
            + ("" if self.history_dtype is None else f", history_dtype={self.history_dtype}")
        )


def _borrowed(variance: Tensor, along: Tensor) -> Tensor:
    """What brings a slope of another batch to this one's variance v: ``⟨factor·D, w⟩ = 2v``."""
    return (variance * 2.0).div_(along + _TINY).clamp_(0.0, _TRUSTED)


def _is_known_finite(window: Window) -> bool:
    """Whether the batch in this window is known to be finite."""
    if isinstance(window.share, float) and window.share < 1.0:
        return True
    return is_all_finite(window.mean + window.variance)


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)  # checked when the producer was attached
    return value.detach()


def _bias(producer: nn.Module) -> Tensor | None:
    return None if producer.bias is None else _tensor(producer, "bias")


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
    In the paper the gradient flows through the current batch's share only; here it goes on through
    the others.
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
        through_history: let the gradient reach the producer's weight through past batches too; None
            does so with compensation. The paper stops it there, which leaves the weight's scale
            free to grow; at batch 2 training can be very much slower for it.
        sampling: estimate how the variance depends on the weight from every how many-th row and
            column of a convolution's map, and from fewer on maps so large that an eighth of the
            batch's positions, or about 100, are left; maps with fewer than 32 positions in the
            sample are looked at whole. Likewise one of ``sampling²`` batches is looked at, but one
            in each window at least; the others take over what it showed, scaled to their own
            variance. 1 looks at all. The batch's own statistics are exact either way, past means
            too, and so is BatchNorm's scale invariance.
        history_dtype: ``torch.bfloat16`` or ``torch.float16`` for a history of half the size; None
            for the statistics' own dtype.
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
        *Differs from the paper* in that the gradient passes through the history, and in the
        sampling; with ``through_history=False, sampling=1`` in arithmetic only: the mean is
        followed exactly, and the variance instead of the second moment, which cancels less.
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
