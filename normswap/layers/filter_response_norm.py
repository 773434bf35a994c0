"""Filter Response Normalization, with its Thresholded Linear Unit fused in.

Two forms of one function. The eager form is an ``autograd.Function`` that reads the batch as seldom
as it can, with kernels of its own on a GPU; the plain form is what compilers and exporters get to
see.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normswap.layers.batch_statistics import (
    aliases,
    check_rank,
    full_precision,
    per_channel,
    statistics_dtype,
)
from normswap.layers.fused import Fused
from normswap.layers.gpu.launching import can_launch
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in, must_be_plain

_FRESH_LEARNT_EPS = 1e-4
# below this many elements per row, torch's channel-wise kernel spends its time between rows
_LONG_ROW = 16


class _FilterResponseNorm(nn.Module):
    if TYPE_CHECKING:  # TorchScript reads annotations, and knows none of these
        _ranks: tuple[int, ...]

        weight: nn.Parameter | None
        bias: nn.Parameter | None
        tau: nn.Parameter | None
        eps_l: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        learnable_eps: bool = False,
        tlu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        for name, present in {
            "weight": affine,
            "bias": affine,
            "tau": tlu,
            "eps_l": learnable_eps,
        }.items():
            fresh = torch.empty(num_features, device=device, dtype=dtype) if present else None
            self.register_parameter(name, None if fresh is None else nn.Parameter(fresh))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ = 1, β = 0, τ = 0, ε_l = 1e-4."""
        for parameter, value in (
            (self.weight, 1.0),
            (self.bias, 0.0),
            (self.tau, 0.0),
            (self.eps_l, _FRESH_LEARNT_EPS),
        ):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Normalise each channel of each sample of ``x`` by its root mean square."""
        if not is_scripting():
            if is_stand_in(input):
                return as_one_node(self, input)
            check_rank(self, input, self._ranks)
            return filter_response_norm(
                input, self.weight, self.bias, self.tau, self.eps_l, self.eps
            )
        return plain_filter_response_norm(
            input, self.weight, self.bias, self.tau, self.eps_l, self.eps
        )

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return (
            f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}, "
            f"learnable_eps={self.eps_l is not None}, tlu={self.tau is not None}"
        )


def filter_response_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor | None,
    eps_l: Tensor | None,
    eps: float,
) -> Tensor:
    """FRN (and TLU, if ``tau`` is given), by hand where nobody has to look inside."""
    if x.numel() == 0 or must_be_plain():
        return plain_filter_response_norm(x, weight, bias, tau, eps_l, eps)
    y: Tensor = _FilterResponse.apply(x, weight, bias, tau, eps_l, eps)
    return y


def plain_filter_response_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor | None,
    eps_l: Tensor | None,
    eps: float,
) -> Tensor:
    """FRN (and TLU, if ``tau`` is given) in a handful of plain operations."""
    dtype = x.dtype
    x = x.to(statistics_dtype(dtype))
    # x * x, not x.square(): exporters make Pow of the latter, which runtimes compute slowly
    square = x * x
    mean_square = square.mean(list(range(2, x.dim())), keepdim=True) if x.dim() > 2 else square
    if eps_l is None:
        scale = torch.rsqrt(mean_square + abs(eps))
    else:
        scale = torch.rsqrt(mean_square + (per_channel(eps_l.abs(), x) + abs(eps)))
    if weight is not None:
        scale = scale * per_channel(weight, x)
    y = x * scale
    if bias is not None:
        y = y + per_channel(bias, x)
    if tau is not None:
        y = torch.maximum(y, per_channel(tau, x))
    return y.to(dtype)


class _FilterResponse(torch.autograd.Function):
    """z = max(γ·x·s + β, τ) with s = (mean(x²) + |ε|)^(-1/2), by hand.

    With rows of M elements (one sample's channel), h = g where z > τ else 0, A = Σ h·x and
    B = Σ h over a row: ∂x = γ·s·(h − x·s²·A/M), ∂γ = Σ_n s·A, ∂β = Σ_n B, ∂τ = Σ g − ∂β,
    ∂ε = Σ_n −½·γ·s³·A. Keeps x, as BatchNorm does, and not the output, as ReLU would: what is
    behind a TLU may work in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tau: Tensor | None,
        eps_l: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        kernels = _kernels_for(x)
        made = None if kernels is None else kernels.forward(x, weight, bias, tau, eps_l, eps)
        ctx.kernels = None if made is None else kernels
        y, inverse_root = made or _FilterResponse._forward(x, weight, bias, tau, eps_l, eps)
        ctx.save_for_backward(x, inverse_root, weight, bias, tau, eps_l)
        return y

    @staticmethod
    def _forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tau: Tensor | None,
        eps_l: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        mean_square = _mean_square(x)
        dtype = mean_square.dtype
        epsilon: float | Tensor = abs(eps)
        if eps_l is not None:
            epsilon = eps_l.to(dtype).abs() + epsilon
        inverse_root = torch.rsqrt(mean_square + epsilon)
        scale = inverse_root if weight is None else inverse_root * weight
        y = _scale_and_shift(x, scale, bias)
        if tau is not None:
            threshold = per_channel(tau.to(y.dtype), y)
            torch.maximum(y, threshold, out=y)
        return y, inverse_root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody wants second derivatives
            return _differentiable_backward(ctx, grad)
        if ctx.kernels is not None:
            x, inverse_root, *vectors = ctx.saved_tensors
            needed = ctx.needs_input_grad[:5]
            found = ctx.kernels.backward(grad, x, inverse_root, tuple(vectors), needed)
            if found is not None:
                return *found, None
        with full_precision(grad.device.type):
            return _FilterResponse._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_root, weight, bias, tau, eps_l = ctx.saved_tensors
        dtype = inverse_root.dtype
        scale = inverse_root if weight is None else inverse_root * weight
        kept = grad
        if tau is not None:
            # y − τ, once more from x; threshold_backward is the fast way to mask
            kept = _scale_and_shift(x, scale, -tau if bias is None else bias - tau)
            torch.ops.aten.threshold_backward.grad_input(grad, kept, 0, grad_input=kept)
        x_wide, kept_wide = x.to(dtype), kept.to(dtype)
        dot, total = _row_dot(kept_wide, x_wide), _row_sum(kept_wide)
        grad_x = grad_weight = grad_bias = grad_tau = grad_eps = None
        if ctx.needs_input_grad[1]:
            grad_weight = (inverse_root * dot).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = total.sum(0).to(bias.dtype)
        if ctx.needs_input_grad[3]:
            grad_tau = (_row_sum(grad.to(dtype)) - total).sum(0).to(tau.dtype)
        if ctx.needs_input_grad[4]:
            slope = (scale * inverse_root * inverse_root * dot).sum(0) * -0.5
            grad_eps = (slope * eps_l.sign()).to(eps_l.dtype)
        if ctx.needs_input_grad[0]:
            elements = max(x[0, 0].numel(), 1)
            pull = scale * inverse_root * inverse_root * dot * (-1.0 / elements)
            # last, and in place where the buffer is ours: fresh memory costs more than the product
            buffer = torch.empty_like(x_wide) if kept_wide is grad else kept_wide
            torch.mul(kept_wide, _rows(scale, x), out=buffer)
            grad_x = buffer.addcmul_(x_wide, _rows(pull, x)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, grad_tau, grad_eps, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward as autograd writes it, so that it has derivatives itself."""
    x, _, *rest = ctx.saved_tensors
    x, weight, bias, tau, eps_l = aliases(x, *rest)
    inputs: list[Any] = [x, weight, bias, tau, eps_l, None]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    with full_precision(grad.device.type):
        y = plain_filter_response_norm(x, weight, bias, None, eps_l, ctx.eps)
        if tau is not None:
            # a tie goes to the threshold, as it does by hand; torch.maximum would share it out
            threshold = per_channel(tau.to(y.dtype), y)
            y = torch.where(y > threshold, y, threshold)
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def _kernels_for(x: Tensor) -> Any:
    """The module that works on ``x`` with kernels of its own, or None."""
    if not x.is_cuda or not can_launch(x):
        return None
    # with it comes Triton, which most installations never need
    from normswap.layers.gpu import filter_response

    return filter_response


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """View (N, C) values so that they broadcast over the rows of ``x``."""
    return values.reshape(*values.shape, *([1] * (x.dim() - 2)))


def _mean_square(x: Tensor) -> Tensor:
    dtype = statistics_dtype(x.dtype)
    if x.dim() == 2:
        return x.to(dtype).square()
    axes = list(range(2, x.dim()))
    if x.is_contiguous():
        elements = math.prod(x.shape[2:])
        # one pass without a temporary; slow on any other memory format
        norm: Tensor = torch.linalg.vector_norm(x, dim=axes, dtype=dtype)
        return norm.square_().div_(elements)
    return x.to(dtype).square().mean(axes)


def _scale_and_shift(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x·scale + bias`` in one pass over ``x``, keeping its dtype and memory format."""
    samples, channels = scale.shape
    elements = x.numel() // scale.numel()
    shift = scale.new_zeros(channels) if bias is None else bias.to(scale.dtype)
    if x.is_contiguous() and elements >= _LONG_ROW:
        # every row as a channel of one sample: BatchNorm's eval kernel is the fastest affine
        rows = samples * channels
        y = torch.native_batch_norm(
            x.view(1, rows, elements),
            scale.reshape(rows),
            shift.repeat(samples),
            scale.new_zeros(rows),
            scale.new_ones(rows),
            False,
            0.0,
            0.0,
        )[0]
        # no view in autograd's eyes: whoever follows may add to the output in place
        whole: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
        return whole
    return torch.addcmul(per_channel(shift, x), x, _rows(scale, x)).to(x.dtype)


def _row_sum(x: Tensor) -> Tensor:
    return x.sum(list(range(2, x.dim()))) if x.dim() > 2 else x


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() > 2 and a.is_contiguous() and b.is_contiguous():
        dot: Tensor = torch.linalg.vecdot(a.flatten(2), b.flatten(2))
        return dot
    return _row_sum(a * b)


class FilterResponseNorm1d(_FilterResponseNorm):
    """Filter Response Normalization of (N, C) or (N, C, L); see :class:`FilterResponseNorm2d`.

    For (N, C) the mean runs over one element, so ``ν² = x²``: use ``learnable_eps=True`` there.

    Example:
        >>> FilterResponseNorm1d(4)(torch.randn(2, 4, 9)).shape
        torch.Size([2, 4, 9])
    """

    _ranks = (2, 3)


class FilterResponseNorm2d(_FilterResponseNorm):
    """Divide each sample's channel by its root mean square; clip the result at a learnt threshold.

    ``ν² = mean_{H,W}(x²)``; ``y = γ·x·(ν² + |ε|)^(-1/2) + β``; ``z = max(y, τ)``. No running
    statistics: training and eval are the same function. Statistics are taken in float32 at least.

    Args:
        num_features: number of channels C.
        eps: ε, used as ``|ε|``.
        affine: have γ (``weight``) and β (``bias``), fresh at 1 and 0.
        learnable_eps: add ``|ε_l|`` per channel to ε, learnt, fresh at 1e-4.
        tlu: end in a Thresholded Linear Unit with τ (``tau``), fresh at 0. It replaces the ReLU
            that would follow.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        LayerError: the input has another number of axes or channels.

    Example:
        >>> layer = FilterResponseNorm2d(4, tlu=False)
        >>> y = layer(7 * torch.randn(2, 4, 8, 8))
        >>> torch.allclose((y * y).mean((2, 3)), torch.ones(2, 4), atol=1e-4)
        True

    Reference:
        Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737, equations 1-4.
    """

    _ranks = (4,)


class FilterResponseNorm3d(_FilterResponseNorm):
    """Filter Response Normalization of (N, C, D, H, W); see :class:`FilterResponseNorm2d`.

    Example:
        >>> FilterResponseNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    _ranks = (5,)


class FilterResponseNormAct1d(Fused, FilterResponseNorm1d):
    """``act(drop(FilterResponseNorm1d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class FilterResponseNormAct2d(Fused, FilterResponseNorm2d):
    """``act(drop(FilterResponseNorm2d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class FilterResponseNormAct3d(Fused, FilterResponseNorm3d):
    """``act(drop(FilterResponseNorm3d(x)))``; see :class:`normswap.layers.fused.Fused`."""
