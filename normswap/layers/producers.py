"""The layers whose output CBN can follow from one iteration to the next, and their calculus.

A producer is a linear map of patches: ``y = ⟨w, patch⟩ + b``. This room knows, for each kind of
convolution, its mean input patch (``∂mean(y)/∂w``) and its weight gradient, and the hook that
hands a producer's input to the normaliser behind it. It knows nothing of normalisers.

Shapes: G groups, C channels, F the weights of one channel. Weights are looked at as (G, C/G, F).
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from normswap.layers.batch_statistics import in_eager, is_recomputation, mean_of_maps
from normswap.layers.products import product

_FEW_POSITIONS = 128
_SMALL_MAP = 256

Pad = Callable[[Tensor], Tensor]
"""Pads a producer's input by hand, where the module does so in its forward."""

_PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def producer_problem(module: nn.Module, *, around: bool = False) -> str | None:
    """Say why CBN cannot follow ``module``, or None if it can.

    Args:
        module: the module that makes a BN's input.
        around: the BN runs inside of it, behind its own convolution or product; what else its
            ``forward`` does comes later.

    Returns:
        A reason that fits behind "because", or None.

    Example:
        >>> producer_problem(nn.Conv2d(3, 8, 3)) is None
        True
        >>> producer_problem(nn.MaxPool2d(2))
        'MaxPool2d is no convolution and no linear layer'
    """
    kind = type(module).__name__
    if not isinstance(module, _PLAIN):
        return f"{kind} is no convolution and no linear layer"
    if parametrize.is_parametrized(module):
        return f"{kind} computes its weight from other parameters"
    if isinstance(module.weight, UninitializedParameter):
        return f"{kind} has no weight before its first forward"
    if not _runs_torch_forward(module, around) and not _pads_like_tensorflow(module):
        return f"{kind} overrides the forward of its base class"
    return None


def _runs_torch_forward(module: nn.Module, around: bool) -> bool:
    base = next(kind for kind in _PLAIN if isinstance(module, kind))
    methods = ("_conv_forward",) if around else ("forward", "_conv_forward")
    same_class = all(getattr(type(module), m, None) is getattr(base, m, None) for m in methods)
    return same_class and not any(m in vars(module) for m in methods)


def _pads_like_tensorflow(module: nn.Module) -> bool:
    """Whether it is timm's Conv2dSame: zero padding computed per input, TensorFlow's way."""
    kind = type(module)
    return kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")


class Call(NamedTuple):
    """One call of a producer.

    Attributes:
        input: what it was given, detached.
        shape: the shape of what it returned.
    """

    input: Tensor
    shape: torch.Size


class ProducerLink:
    """The hook on a producer that keeps the input of its last calls until the normaliser asks.

    A plain object, neither module nor closure: the normaliser can hold it without owning the
    producer's parameters, and a deep copy or pickle of the model carries it along, pointing at the
    copies. It keeps the input of the last call, and of earlier calls whose output is still alive;
    what the normaliser has taken is forgotten, and eval keeps nothing.

    A normaliser that is part of its producer (detectron2's convolutions hold their norm) asks
    before the producer is done: then the input is noted on the way in.
    """

    def __init__(self, producer: nn.Module, normaliser: nn.Module, pad: Pad | None) -> None:
        self.producer = producer
        self.normaliser = normaliser
        self.pad = pad
        self._inbox: list[tuple[weakref.ref[Tensor], Call]] = []
        self._pending: list[Tensor] = []
        self.listen(normaliser.training)

    def listen(self, training: bool) -> None:
        """Hook the producer for training, and take the hook off for eval, where none is needed.

        TorchScript compiles hooks with the modules that carry them, and this is none for it.
        """
        if not training:
            self.remove()
        elif not self._places() and self.normaliser in self.producer.modules():
            self.producer.register_forward_pre_hook(self.enter, with_kwargs=True)
        elif not self._places():
            self.producer.register_forward_hook(self, with_kwargs=True)

    def _places(self) -> list[tuple[str, int]]:
        """Where the producer has the hook now; whoever restores its hooks asks nobody."""
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        return [
            (kind, key)
            for kind in kinds
            for key, hook in getattr(self.producer, kind).items()
            if hook is self or hook == self.enter
        ]

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the input of a producer that holds the normaliser."""
        self._pending.clear()
        if self.normaliser.training and not is_recomputation():
            self._pending.append((args[0] if args else kwargs["input"]).detach())

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Note one call of the producer."""
        if not self.normaliser.training:
            if self._inbox:
                self._inbox.clear()
        elif not is_recomputation():
            self._record(args[0] if args else kwargs["input"], output)

    @in_eager
    def _record(self, x: Tensor, output: Tensor) -> None:
        self._inbox[:] = [entry for entry in self._inbox if entry[0]() is not None]
        self._inbox.append((weakref.ref(output), Call(x.detach(), output.shape)))

    def take(self, output: Tensor) -> Call | None:
        """The call that gave ``output``, which may be a view or copy of its result; forgets it."""
        if self._pending:
            x = self._pending.pop()
            return Call(x, output.shape) if x.dim() == output.dim() else None
        made_here = [e for e in self._inbox if _is_same_memory(e[0](), output)]
        same_size = [e for e in self._inbox if math.prod(e[1].shape) == output.numel()]
        for entry in (*made_here[-1:], *same_size[-1:]):
            self._inbox[:] = [e for e in self._inbox if e is not entry and e[0]() is not None]
            return entry[1]
        return None

    def remove(self) -> None:
        """Take the hook off the producer."""
        for kind, key in self._places():
            del getattr(self.producer, kind)[key]
            getattr(self.producer, f"{kind}_with_kwargs").pop(key, None)
        self._inbox.clear()
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inbox": [], "_pending": []}


def _is_same_memory(made: Tensor | None, output: Tensor) -> bool:
    if made is None or made is output:
        return made is output
    return made.data_ptr() == output.data_ptr() != 0


def groups_of(producer: nn.Module) -> int:
    """Number of groups; 1 for a linear layer."""
    return int(getattr(producer, "groups", 1))


def fold_weight(producer: nn.Module, weights: Tensor) -> Tensor:
    """View weights (*, weight's shape) as (*, G, C/G, F).

    The order within F follows the weight's memory, so that no copy is made for channels_last.
    """
    leading = weights.dim() - _weight_of(producer).dim()
    head = weights.shape[:leading]
    groups = groups_of(producer)
    if isinstance(producer, _ConvTransposeNd):
        inputs, outputs = weights.shape[leading : leading + 2]
        by_group = weights.reshape(*head, groups, inputs // groups, outputs, -1)
        return by_group.transpose(-3, -2).reshape(*head, groups, outputs, -1)
    outputs = weights.shape[leading]
    if taps_first(producer):
        weights = weights.movedim(leading + 1, -1)
    return weights.reshape(*head, groups, outputs // groups, -1)


def unfold_weight(producer: nn.Module, folded: Tensor) -> Tensor:
    """The way back from :func:`fold_weight`, for one weight: (C, F) to the weight's shape."""
    shape = _weight_of(producer).shape
    if isinstance(producer, _ConvTransposeNd):
        groups = groups_of(producer)
        by_group = folded.reshape(groups, shape[1], shape[0] // groups, -1)
        return by_group.transpose(1, 2).reshape(shape)
    if taps_first(producer):
        return folded.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return folded.view(shape)


def taps_first(producer: nn.Module) -> bool:
    """Whether the taps come before the input channels in the weight's memory."""
    weight = _weight_of(producer)
    return (
        isinstance(producer, _ConvNd)
        and weight.dim() in (4, 5)
        and not weight.is_contiguous()
        and weight.movedim(1, -1).is_contiguous()
    )


def _weight_of(producer: nn.Module) -> Tensor:
    weight = producer.weight
    assert isinstance(weight, Tensor)  # producer_problem looked at it
    return weight


def mean_patch(
    producer: nn.Module, call: Call, pad: Pad | None, out: Tensor | None = None
) -> Tensor:
    """``∂mean(y)/∂w``, the same for every channel of a group: (G, F), ordered like the weight.

    Which input rows a kernel tap meets does not depend on the columns, so the mean over positions
    is one small matrix per axis.

    Args:
        producer: the convolution or linear layer.
        call: its call, the input in the statistics' dtype.
        pad: how the input is padded by hand, or None.
        out: what to write the result to; None for a new tensor.
    """
    means = _mean_patch(producer, call, pad)
    groups = groups_of(producer)
    if out is None:
        out = means.new_empty(groups, means.numel() // groups)
    if taps_first(producer):
        return (
            out.view(groups, means.shape[1], -1)
            .copy_(means.view(groups, -1, means.shape[1]).transpose(1, 2))
            .view_as(out)
        )
    out.view(means.shape).copy_(means)
    return out


def _mean_patch(producer: nn.Module, call: Call, pad: Pad | None) -> Tensor:
    """(C_in, taps)."""
    if isinstance(producer, nn.Linear):
        return call.input.reshape(-1, call.input.shape[-1]).mean(0).unsqueeze(1)
    assert isinstance(producer, _ConvNd)  # producer_problem looked at it
    x, padding, mode = pad_by_hand(producer, call.input, pad)
    if _is_pointwise(producer, padding) and max(producer.stride) == 1:
        return mean_of_maps(x).unsqueeze(1)
    settings = (producer.kernel_size, producer.stride, producer.dilation, padding)
    axes = zip(x.shape[2:], call.shape[2:], *settings, strict=True)
    along = tuple(
        _Axis(size, out, kernel, stride, dilation, pads, mode, producer.transposed)
        for size, out, kernel, stride, dilation, pads in axes
    )
    return _mean_over_positions(x, along)


class _Axis(NamedTuple):
    """One axis of a convolution."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]
    mode: str
    transposed: bool


def _mean_over_positions(x: Tensor, axes: tuple[_Axis, ...]) -> Tensor:
    """(C_in, taps): for each tap, the mean of the inputs that it meets."""
    batch, channels, *sizes = x.shape
    if all(axis.kernel == 1 for axis in axes) or math.prod(sizes) <= _SMALL_MAP:
        # one product with all taps at once
        touches = _touches_of_map(axes, batch, x.device, x.dtype)
        sums = torch.mm(touches, x.reshape(batch * channels, -1).t())
        return sums.view(-1, batch, channels).sum(1).t()
    tables = [_touches(axis, x.device, x.dtype) for axis in axes]
    if len(tables) > 1:
        x = torch.matmul(tables[-2], x)
    total = torch.matmul(x.sum(0), tables[-1].t())
    if len(tables) > 2:
        total = torch.matmul(tables[0], total.flatten(2))
    return total.flatten(1).div_(batch * math.prod(axis.out for axis in axes))


@lru_cache(maxsize=256)
def _touches_of_map(
    axes: tuple[_Axis, ...], batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(taps, input positions): each tap's part in a mean over the whole map."""
    table = _touches(axes[0], device, dtype)
    for axis in axes[1:]:
        table = torch.kron(table, _touches(axis, device, dtype))
    return table / (batch * math.prod(axis.out for axis in axes))


@lru_cache(maxsize=512)
def _touches(axis: _Axis, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(kernel, size): how often each tap meets each input position along one axis."""
    size, out, kernel, stride, dilation, (before, after), mode, transposed = axis
    rows = [[0.0] * size for _ in range(kernel)]
    if transposed:
        for tap in range(kernel):
            for position in range(size):
                rows[tap][position] = float(0 <= position * stride + tap * dilation - before < out)
    else:
        source = _padded_positions(size, before, after, mode)
        for tap in range(kernel):
            for step in range(out):
                shown = source[step * stride + tap * dilation]
                if shown is not None:
                    rows[tap][shown] += 1.0
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float64, device="cpu").to(device, dtype)


def _padded_positions(size: int, before: int, after: int, mode: str) -> list[int | None]:
    """Which input position each position of the padded axis shows; None for a zero."""
    positions = range(-before, size + after)
    if mode == "circular":
        return [p % size for p in positions]
    if mode == "replicate":
        return [min(max(p, 0), size - 1) for p in positions]
    if mode == "reflect":
        return [-p if p < 0 else 2 * (size - 1) - p if p >= size else p for p in positions]
    return [p if 0 <= p < size else None for p in positions]


def pad_by_hand(
    producer: _ConvNd, x: Tensor, pad: Pad | None
) -> tuple[Tensor, list[tuple[int, int]], str]:
    """The input, the padding left to do as (before, after) per axis, and its mode."""
    if pad is not None:
        return pad(x), [(0, 0)] * len(producer.kernel_size), "zeros"
    if _pads_like_tensorflow(producer):
        sizes = x.shape[2:]
        return x, [_same(producer, axis, size) for axis, size in enumerate(sizes)], "zeros"
    if isinstance(producer.padding, str) or producer.padding_mode != "zeros":
        twice = producer._reversed_padding_repeated_twice
        pairs = [(twice[i], twice[i + 1]) for i in range(0, len(twice), 2)]
        return x, pairs[::-1], producer.padding_mode
    return x, [(int(p), int(p)) for p in producer.padding], "zeros"


def _same(producer: _ConvNd, axis: int, size: int) -> tuple[int, int]:
    stride, reach = (
        producer.stride[axis],
        producer.dilation[axis] * (producer.kernel_size[axis] - 1),
    )
    total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    return total // 2, total - total // 2


def weight_gradient(
    producer: nn.Module,
    call: Call,
    grad: Tensor,
    pad: Pad | None,
    *,
    every: int = 1,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``scale·Σ grad·∂y/∂w`` over batch and positions.

    Args:
        producer: the convolution or linear layer.
        call: its call.
        grad: upstream in the statistics' dtype, with channels on axis 1: of the output's shape, or
            of a view of it.
        pad: how the input is padded by hand, or None.
        every: ``grad`` holds every how many-th row and column of the output only.
        scale: a factor.
        out: what to write the result to, of any float dtype; None for a new tensor.

    Returns:
        (C, F), ordered as :func:`fold_weight` orders the weight.
    """
    if out is None:
        folded = fold_weight(producer, _weight_of(producer).detach()).flatten(0, 1)
        out = torch.empty_like(folded, dtype=grad.dtype, memory_format=torch.contiguous_format)
    _gradient_into(out, producer, call, grad, pad, every, scale)
    return out


def _gradient_into(
    out: Tensor,
    producer: nn.Module,
    call: Call,
    grad: Tensor,
    pad: Pad | None,
    every: int,
    scale: float,
) -> None:
    if isinstance(producer, nn.Linear):
        x = call.input.reshape(-1, call.input.shape[-1])
        _multiply(out, [(_as_rows(grad).t(), x.to(grad.dtype).t())], scale)
        return
    assert isinstance(producer, _ConvNd)  # producer_problem looked at it
    if every == 1 and grad.shape != call.shape:
        sizes = (call.shape[0], *call.shape[2:], call.shape[1])
        grad = _as_rows(grad).reshape(sizes).movedim(-1, 1)
    x, padding, mode = pad_by_hand(producer, call.input, pad)
    few = _has_few_positions(producer, grad)
    if few or mode != "zeros" or any(before != after for before, after in padding):
        if any(map(any, padding)):
            x = with_padding(x, padding, mode)
        padding = [(0, 0)] * len(padding)
    steps = [step * every for step in producer.stride]
    if _is_pointwise(producer, padding):
        x = every_nth(x, steps).to(grad.dtype)
        if not _is_dense(x) and math.prod(x.shape[2:]) > _FEW_POSITIONS:
            x = x.contiguous(memory_format=format_of(call.input))
        _multiply(out, _pointwise_factors(x, grad), scale)
    elif few:
        rows = _patch_rows(producer, x, grad.shape[2:], steps).to(grad.dtype)
        _multiply(out, [(_as_rows(grad).t(), rows.t())], scale)
    else:
        weight = _weight_of(producer).detach()
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grad,
            x.to(grad.dtype),
            weight.to(grad.dtype),
            None,
            steps,
            [before for before, _ in padding],
            list(producer.dilation),
            producer.transposed,
            list(producer.output_padding),
            producer.groups,
            [False, True, False],
        )[1]
        torch.mul(fold_weight(producer, gradient).flatten(0, 1), scale, out=out)


def _multiply(out: Tensor, factors: list[tuple[Tensor, Tensor]], scale: float) -> None:
    """``out = scale·Σ a @ b.T``."""
    total = product(*factors[0])
    for a, b in factors[1:]:
        total.add_(product(a, b))
    torch.mul(total, scale, out=out)


def every_nth(x: Tensor, steps: Sequence[int]) -> Tensor:
    """A view of every n-th position along each spatial axis of (N, C, *)."""
    for axis, step in enumerate(steps):
        if step > 1:
            x = x[(slice(None),) * (2 + axis) + (slice(None, None, step),)]
    return x


def with_padding(x: Tensor, padding: list[tuple[int, int]], mode: str) -> Tensor:
    """``x`` padded as :func:`pad_by_hand` says."""
    amounts = [amount for pair in padding[::-1] for amount in pair]
    return F.pad(x, amounts, "constant" if mode == "zeros" else mode)


def patches(producer: _ConvNd, x: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """What the taps of a convolution see at some positions of its output: (R, C_in, taps).

    Args:
        producer: the convolution, not a transposed one.
        x: its input.
        at: for each of R positions the sample, and the place along each axis.
    """
    sample, *place = at
    x, padding, mode = pad_by_hand(producer, x, None)
    if any(map(any, padding)):
        x = with_padding(x, padding, mode)
    rows = x.movedim(1, -1)
    taps = itertools.product(*map(range, producer.kernel_size))
    seen = [rows[(sample, *_met(producer, place, tap))] for tap in taps]
    return torch.stack(seen, 2)


def _met(producer: _ConvNd, place: list[Tensor], tap: tuple[int, ...]) -> list[Tensor]:
    """Where in the padded input a tap stands, along each axis."""
    steps = zip(place, tap, producer.stride, producer.dilation, strict=True)
    return [position * stride + at * dilation for position, at, stride, dilation in steps]


def _is_pointwise(producer: _ConvNd, padding: list[tuple[int, int]]) -> bool:
    one_tap = all(size == 1 for size in producer.kernel_size)
    return (
        one_tap and producer.groups == 1 and not producer.transposed and not any(map(any, padding))
    )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def format_of(x: Tensor) -> torch.memory_format:
    """channels_last if ``x`` is that and nothing else, or else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and _is_dense(x):
        return torch.channels_last
    return torch.contiguous_format


def _pointwise_factors(x: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Plain matrix products are a fifth faster than the convolution's kernel."""
    few = math.prod(x.shape[2:]) <= _FEW_POSITIONS  # one product then reads the result but once
    if few or not (x.is_contiguous() and grad.is_contiguous()):
        return [(_as_rows(grad).t(), _as_rows(x).t())]
    return [(g.flatten(1), sample.flatten(1)) for g, sample in zip(grad, x, strict=True)]


def _has_few_positions(producer: _ConvNd, grad: Tensor) -> bool:
    """Whether the patches themselves are cheaper than the convolution's kernel for many of them."""
    positions = grad.numel() // max(grad.shape[1], 1)
    plain = producer.groups == 1 and not producer.transposed and max(producer.kernel_size) > 1
    return plain and grad.device.type == "cpu" and positions <= _FEW_POSITIONS


def _patch_rows(producer: _ConvNd, x: Tensor, sizes: torch.Size, steps: list[int]) -> Tensor:
    """(positions, F) of an input that is padded already, F ordered like the weight's."""
    for axis, size in enumerate(sizes):
        taps, dilation = producer.kernel_size[axis], producer.dilation[axis]
        x = x.unfold(2 + axis, dilation * (taps - 1) + 1, steps[axis])[..., ::dilation]
        x = x.narrow(2 + axis, 0, size)
    rank = len(sizes)
    # (N, C, positions, taps): channels before the taps, or behind them for channels_last
    front = [0, *range(2, 2 + rank)]
    taps_at = list(range(2 + rank, 2 + 2 * rank))
    order = [*front, *taps_at, 1] if taps_first(producer) else [*front, 1, *taps_at]
    return x.permute(order).reshape(x.shape[0] * math.prod(sizes), -1)


def _as_rows(x: Tensor) -> Tensor:
    """(N, C, *) as (N·*, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
