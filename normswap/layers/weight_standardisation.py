"""Weight standardisation: a convolution whose filters have mean 0 and variance 1 when it runs.

``gn-ws`` is GroupNorm behind such a convolution. The stored weight stays as it is: state-dict keys
and optimizers see nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normswap.layers.batch_statistics import statistics_dtype
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in, renamed

if TYPE_CHECKING:
    from collections.abc import Callable

EPS = 1e-6
"""Added to the variance of a filter."""


def standardised_weight(weight: Tensor, eps: float = EPS) -> Tensor:
    """``(w − mean(w))/√(var(w) + ε)`` over each output channel's filter, in float32 at least."""
    rows = weight.to(statistics_dtype(weight.dtype)).flatten(1)
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    whole: Tensor = ((rows - mean) * torch.rsqrt(variance + eps)).reshape(weight.shape)
    return whole.to(weight.dtype)


class _Standardised(nn.Module):
    """Mixin, left of a convolution's class, whose own way to convolve is ``_plain_forward``."""

    if TYPE_CHECKING:  # TorchScript reads annotations, and knows none of these
        weight: Tensor
        bias: Tensor | None
        _plain_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Convolve with the standardised weight."""
        if not is_scripting():  # noqa: SIM102 - what is in it is no TorchScript
            if is_stand_in(input):
                return as_one_node(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._plain_forward(x, standardised_weight(weight), bias)
        return y


class WeightStandardisedConv1d(_Standardised, nn.Conv1d):
    """``nn.Conv1d`` with standardised filters; see :class:`WeightStandardisedConv2d`."""

    _plain_forward = renamed(nn.Conv1d._conv_forward, "_plain_forward")


class WeightStandardisedConv2d(_Standardised, nn.Conv2d):
    """``nn.Conv2d`` that runs on ``(w − mean(w))/√(var(w) + ε)`` in the place of its weight w.

    Mean and variance (over the number of elements, not one less) are each output channel's own,
    ε is 1e-6. Arguments, parameters and state-dict keys are those of ``nn.Conv2d``.

    Example:
        >>> conv = WeightStandardisedConv2d(3, 4, 3)
        >>> conv(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])

    Reference:
        Qiao et al. 2019, Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, arXiv 1903.10520, equations 6-8.
    """

    _plain_forward = renamed(nn.Conv2d._conv_forward, "_plain_forward")


class WeightStandardisedConv3d(_Standardised, nn.Conv3d):
    """``nn.Conv3d`` with standardised filters; see :class:`WeightStandardisedConv2d`."""

    _plain_forward = renamed(nn.Conv3d._conv_forward, "_plain_forward")


standardised_classes: dict[type[nn.Module], type[_ConvNd]] = {
    nn.Conv1d: WeightStandardisedConv1d,
    nn.Conv2d: WeightStandardisedConv2d,
    nn.Conv3d: WeightStandardisedConv3d,
}
"""Which class a convolution turns into, and back when its weight is folded."""


@torch.no_grad()
def fold_weights(model: nn.Module) -> nn.Module:
    """Store the standardised weights and make plain convolutions of their layers, in place.

    Example:
        >>> conv, x = WeightStandardisedConv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
        >>> expected = conv(x)
        >>> torch.equal(fold_weights(conv)(x), expected), type(conv).__name__
        (True, 'Conv2d')
    """
    plain = {made: cls for cls, made in standardised_classes.items()}
    for module in model.modules():
        cls = plain.get(type(module))  # type: ignore[arg-type]
        if cls is not None:
            weight = module.get_parameter("weight")
            weight.copy_(standardised_weight(weight))
            module.__class__ = cls
    return model
