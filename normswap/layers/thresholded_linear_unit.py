"""The Thresholded Linear Unit: a ReLU whose threshold is learnt per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.batch_statistics import per_channel
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in


class ThresholdedLinearUnit(nn.Module):
    """Clip each channel from below at a learnt threshold: ``z = max(x, τ)``.

    Args:
        num_features: number of channels C.
        device: where the parameter lives.
        dtype: dtype of the parameter.

    Shape:
        (N, C, *) to the same.

    Raises:
        LayerError: the input does not have ``num_features`` channels.

    Example:
        >>> ThresholdedLinearUnit(1)(torch.tensor([[-1.0], [2.0]])).flatten().tolist()
        [0.0, 2.0]

    Reference:
        Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737, section 3.2.
    """

    def __init__(
        self,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every threshold to 0, which makes the layer a ReLU."""
        nn.init.zeros_(self.tau)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Clip ``x`` from below."""
        if not is_scripting():
            if is_stand_in(input):
                return as_one_node(self, input)
            self._check(input)
        return torch.maximum(input, per_channel(self.tau.to(input.dtype), input))

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise LayerError(
                "ThresholdedLinearUnit",
                got=f"an input of shape {tuple(x.shape)}",
                need=f"(N, {self.num_features}, *)",
                hint="num_features equal to the channels of the input",
            )

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return str(self.num_features)
