"""What the layers that train on batch statistics share.

The moments of a batch, the update of running statistics, and the way to tell a forward that
gradient checkpointing repeats from one that is new. Nothing here knows a normaliser's formula.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.errors import LayerError
from normswap.layers.gpu.launching import can_launch
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in, must_be_plain

_Function = TypeVar("_Function", bound=Callable[..., Any])
_REMEMBERED = 16
_SAME_BATCH = 1e-2
# (mean / deviation)² above which mean((x − μ)·x) is not exact enough
_FAR = 100.0
_WEIGHT_ONLY = [False, True, False]


def in_eager(function: _Function) -> _Function:
    """Decorator: ``torch.compile`` leaves this function alone."""
    left_alone: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return left_alone


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are computed in float32 at least: squares above 256² overflow float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast would run the contractions in the low precision."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def aliases(*inputs: Any) -> list[Any]:
    """Views of a function's inputs, by which it can be differentiated anew.

    The inputs themselves may depend on each other, as the output of a convolution on its weight;
    ``autograd.grad`` would follow that.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """View a (C,) vector so that it broadcasts over the channel axis of ``x``."""
    return vector.reshape([1, -1] + [1] * (x.dim() - 2))


def reduced_axes(x: Tensor) -> list[int]:
    """Every axis but the channels'."""
    return [0, *range(2, x.dim())]


def mean_of_maps(x: Tensor) -> Tensor:
    """Mean per channel, (C,). In two steps it is twice as fast on small maps."""
    return x.mean(reduced_axes(x)[1:]).mean(0)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, in the statistics' dtype."""
    x = x.detach() if x.requires_grad else x
    if _has_fast_kernel(x):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    if _is_plain_map(x):
        mean = mean_of_maps(x)
        variance = _variance_in_one_read(x, mean)
        # a variance below zero is rounding too
        if not torch.addcmul(variance, mean, mean, value=-1.0 / _FAR).min().item() < 0.0:
            return mean, variance
    wide = x.to(statistics_dtype(x.dtype))
    mean = wide.mean(reduced_axes(x))
    # squared in place: one temporary of the size of the batch, not two
    return mean, (wide - per_channel(mean, x)).square_().mean(reduced_axes(x))


def _variance_in_one_read(x: Tensor, mean: Tensor) -> Tensor:
    """``mean((x − μ)·x)``, by a kernel of BatchNorm's backward that writes no temporary.

    A quarter faster than two passes, and eight times as fast as torch's own statistics of
    contiguous batches. Loses digits where the mean is far from zero.
    """
    part = filled(x.shape[1], x.shape[1] / x.numel(), x.dtype)
    variance: Tensor = torch.ops.aten.native_batch_norm_backward.default(
        x, x, None, None, None, mean, part, True, 0.0, _WEIGHT_ONLY
    )[1]
    return variance


@lru_cache(maxsize=1024)
def filled(size: int, value: float, dtype: torch.dtype) -> Tensor:
    """A constant vector on the CPU; nobody writes to it."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype)


def _is_plain_map(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary batch of maps in memory: no trace, no transform, no subclass."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() > 2
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def _has_fast_kernel(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # inductor fuses the plain form
    if x.is_cuda:
        return True
    full_precision = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and full_precision and x.dim() == 4 and _is_channels_last(x)


def answers_at_once(x: Tensor) -> bool:
    """Whether a question about the values of ``x`` holds nothing up."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def is_all_finite(values: Tensor) -> bool:
    """Whether every value is known to be finite; False where asking would hold up a device."""
    return answers_at_once(values) and math.isfinite(values.sum().item())


def vector_kernels_for(vector: Tensor) -> Any:
    """The module that does arithmetic on ``vector`` by kernels of its own, or None."""
    if not vector.is_cuda or must_be_plain() or not can_launch(vector):
        return None
    # with it comes Triton, which most installations never need
    from normswap.layers.gpu import vectors

    return vectors


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward, as checkpointing's second forward does."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def may_be_repeated() -> bool:
    """A checkpointed forward runs under no_grad (reentrant) or under saved-tensor hooks."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return not torch.is_grad_enabled() or hooks is not None


class RecentBatches:
    """The constants of the last forwards, found again by the batch's mean.

    A checkpointed segment runs twice. The second run must use the constants of the first, although
    the running statistics have moved on; it sees the same batch, so the batch's mean is the key.
    Small beside activations; never part of a state dict, a copy or a pickle.
    """

    def __init__(self) -> None:
        self._entries: deque[tuple[Tensor, tuple[Any, ...]]] = deque(maxlen=_REMEMBERED)

    def remember(self, mean: Tensor, constants: tuple[Any, ...]) -> None:
        """Keep the constants of one forward, if a checkpoint may run it again."""
        if may_be_repeated() and not is_recomputation():
            self._entries.append((mean, constants))

    def recall(self, mean: Tensor, variance: Tensor, eps: float) -> tuple[Any, ...] | None:
        """The constants of the forward that saw this batch, or None."""
        deviation = torch.sqrt(variance + eps)
        distances = [
            float(((seen - mean).abs() / deviation).max())
            if seen.shape == mean.shape and seen.device == mean.device
            else math.inf
            for seen, _ in self._entries
        ]
        # the nearest; of equals the latest, as a backward meets forwards in reverse
        index = min(range(len(distances)), key=lambda i: (distances[i], -i), default=None)
        if index is None or not distances[index] < _SAME_BATCH:
            return None
        found = self._entries[index]
        del self._entries[index]
        self._entries.appendleft(found)  # behind its equals, which have not been used yet
        return found[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> RecentBatches:
        return RecentBatches()

    def __reduce__(self) -> tuple[type[RecentBatches], tuple[()]]:
        return (RecentBatches, ())


class TracksBatches(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training form a subclass defines; eval is BatchNorm's own, to the bit.

    Subclasses define ``_train``. Buffers, keys, ``repr`` and dtype handling are BatchNorm's.
    """

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if not track_running_stats:
            raise LayerError(
                type(self).__name__,
                got="track_running_stats=False",
                need="running statistics, which its definition uses",
                hint="GroupNorm or FilterResponseNorm, which keep none",
            )
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype
        )
        self.iteration = 0
        self._recent = RecentBatches()
        self._was_reset = False

    _was_reset = False
    _ranks: tuple[int, ...]

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        super().reset_running_stats()
        self._was_reset = True

    def _counts_anew(self) -> bool:
        """Whether this forward is one of ``update_bn``'s, which wants BatchNorm's statistics.

        It resets them, sets ``momentum`` to None and runs the data through in training mode
        without gradients. A layer that leant on what it is still counting would spoil the input
        of all layers behind it. With gradients that holds for the first batch alone.
        """
        if self._was_reset:
            seen = self.num_batches_tracked
            anew = self.momentum is None and (
                not torch.is_grad_enabled() or seen is None or int(seen) == 0
            )
            self._was_reset = anew
        return self._was_reset

    def _check_input_dim(self, x: Tensor) -> None:
        check_rank(self, x, self._ranks)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Normalise ``x``."""
        if is_scripting():
            if self.training:
                raise RuntimeError("scripted layers have their eval form only: call eval() first")
        else:
            if is_stand_in(input):
                return as_one_node(self, input)
            self._check_input_dim(input)
            if self.training and input.numel() > 0:
                return self._train(input)
        # an empty batch says nothing about the statistics; its output only has to have a graph
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _train(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_state(self) -> dict[str, Tensor | int]:
        """What a training checkpoint must hold beside the state dict, as plain data."""
        return {"iteration": self.iteration}

    def load_training_state(self, state: dict[str, Tensor | int]) -> None:
        """Take over what ``training_state`` returned."""
        self.iteration = int(state["iteration"])

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return str(super().extra_repr())  # type: ignore[no-untyped-call]

    def _running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None  # refused in __init__
        assert self.running_var is not None
        return self.running_mean.to(dtype), self.running_var.to(dtype)

    def _store_running(self, mean: Tensor, variance: Tensor, evidence: Tensor) -> None:
        """Take over the new statistics where the ``evidence`` is finite: a NaN must not stay."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if is_all_finite(evidence):
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
            return
        finite = torch.isfinite(evidence)
        self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
        self.running_var.copy_(torch.where(finite, variance, self.running_var))

    def _track(self, mean: Tensor, variance: Tensor, elements: int, finite: bool = False) -> None:
        """Take a batch into the running statistics as BatchNorm does.

        ``finite`` says that the batch is known to be.
        """
        if self._track_by_kernel(mean, variance, elements):
            return
        rate = self._count_batch()
        unbiased = variance * (elements / max(elements - 1, 1))
        if finite and self.running_mean is not None and self.running_mean.dtype == mean.dtype:
            assert self.running_var is not None
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(unbiased, rate)
            return
        running_mean, running_variance = self._running(mean.dtype)
        self._store_running(
            torch.lerp(running_mean, mean, rate),
            torch.lerp(running_variance, unbiased, rate),
            mean + variance,
        )

    def _track_by_kernel(self, mean: Tensor, variance: Tensor, elements: int) -> bool:
        kernels = vector_kernels_for(mean)
        if kernels is None or self.running_mean is None or self.running_var is None:
            return False
        done: bool = kernels.track(
            mean,
            variance,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.momentum,
            elements / max(elements - 1, 1),
        )
        return done

    def _count_batch(self) -> float | Tensor:
        """Count one batch and return the weight its statistics get in the running ones."""
        counter = self.num_batches_tracked
        if counter is not None:
            counter.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 if counter is None else counter.to(torch.float32).reciprocal()


def check_rank(layer: nn.Module, x: Tensor, ranks: tuple[int, ...]) -> None:
    """Raise unless ``x`` has one of the ``ranks`` that the layer is made for."""
    if x.dim() not in ranks:
        raise LayerError(
            type(layer).__name__,
            got=f"an input of shape {tuple(x.shape)}",
            need=" or ".join(f"{rank} axes" for rank in ranks),
            hint=f"the {max(x.dim() - 2, 1)}d class of this layer",
        )
    channels = getattr(layer, "num_features", None)
    if x.shape[1] != channels:
        raise LayerError(
            type(layer).__name__,
            got=f"{x.shape[1]} channels",
            need=f"{channels}, the layer's num_features",
            hint=f"num_features={x.shape[1]}",
        )


def check_positive(layer: nn.Module, **values: float) -> None:
    """Raise unless every value is a positive number."""
    for name, value in values.items():
        if not value > 0 or math.isnan(value):
            raise LayerError(
                type(layer).__name__, got=f"{name}={value}", need="more than 0", hint=f"{name}=1"
            )
