"""EvoNorm-S0: a gate and a per-sample scale in one layer, for a BatchNorm with its activation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.batch_statistics import check_rank, per_channel, statistics_dtype
from normswap.layers.fused import Fused
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in

_PAPER_GROUPS = 32


class _EvoNorm(nn.Module):
    if TYPE_CHECKING:  # TorchScript reads annotations, and knows none of these
        _ranks: tuple[int, ...]

        weight: nn.Parameter
        bias: nn.Parameter
        v: nn.Parameter

    def __init__(
        self,
        num_features: int,
        groups: int | None = None,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.groups = math.gcd(num_features, _PAPER_GROUPS) if groups is None else groups
        self.eps = eps
        if self.groups < 1 or num_features % self.groups:
            raise LayerError(
                type(self).__name__,
                got=f"groups={groups} for {num_features} channels",
                need=f"a divisor of {num_features}",
                hint=f"groups={math.gcd(num_features, _PAPER_GROUPS)}",
            )
        for name in ("weight", "bias", "v"):
            fresh = torch.empty(num_features, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(fresh))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ = 1, β = 0, v = 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.v)

    def standardised(self, x: Tensor) -> Tensor:
        """The output before γ and β: ``x·σ(v·x)/√(var_group(x) + ε)``."""
        grouped = x.to(statistics_dtype(x.dtype)).reshape(x.shape[0], self.groups, -1)
        std = grouped.var(2, unbiased=False).add(self.eps).sqrt().to(x.dtype)
        std = std.repeat_interleave(self.num_features // self.groups, 1)
        gate = (x * per_channel(self.v.to(x.dtype), x)).sigmoid()
        # lists, because TorchScript has no stars
        return x * gate / std.reshape([x.shape[0], x.shape[1]] + [1] * (x.dim() - 2))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Gate ``x`` by itself and divide it by the spread of its group."""
        if not is_scripting():
            if is_stand_in(input):
                return as_one_node(self, input)
            check_rank(self, input, self._ranks)
        y = self.standardised(input) * per_channel(self.weight.to(input.dtype), input)
        return y + per_channel(self.bias.to(input.dtype), input)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}"


class EvoNorm1d(_EvoNorm):
    """EvoNorm-S0 of (N, C) or (N, C, L); see :class:`EvoNorm2d`.

    Example:
        >>> EvoNorm1d(4, groups=2)(torch.randn(2, 4, 9)).shape
        torch.Size([2, 4, 9])
    """

    _ranks = (2, 3)


class EvoNorm2d(_EvoNorm):
    """EvoNorm-S0: ``y = γ·x·σ(v·x)/√(var_{group}(x) + ε) + β``, with σ the sigmoid.

    It is normaliser and activation in one: nothing should follow it. The variance is each sample's
    own, over one group of channels and all positions, in float32 at least.

    Args:
        num_features: number of channels C.
        groups: number of groups, a divisor of C; None takes the largest that divides 32 too.
        eps: ε, added to the variance.
        device: where the parameters live.
        dtype: dtype of the parameters γ (``weight``), β (``bias``) and ``v``.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        LayerError: ``groups`` does not divide C; the input has another number of axes or channels.

    Example:
        >>> layer = EvoNorm2d(4, groups=1)
        >>> layer(torch.zeros(2, 4, 8, 8)).abs().max().item()
        0.0

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, table 1.
    """

    _ranks = (4,)


class EvoNorm3d(_EvoNorm):
    """EvoNorm-S0 of (N, C, D, H, W); see :class:`EvoNorm2d`.

    Example:
        >>> EvoNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    _ranks = (5,)


class EvoNormAct2d(Fused, EvoNorm2d):
    """``act(drop(EvoNorm2d(x)))``; see :class:`normswap.layers.fused.Fused`."""
