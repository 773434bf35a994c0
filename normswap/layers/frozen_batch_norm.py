"""BatchNorm in its eval form for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.layers.batch_statistics import check_rank
from normswap.layers.fused import Fused
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in


class _FrozenBatchNorm(nn.Module):
    if TYPE_CHECKING:  # TorchScript reads annotations, and knows none of these
        _ranks: tuple[int, ...]

        weight: nn.Parameter | None
        bias: nn.Parameter | None
        running_mean: Tensor
        running_var: Tensor
        num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        trainable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        for name, fill in (("weight", torch.ones), ("bias", torch.zeros)):
            fresh = fill(num_features, device=device, dtype=dtype) if affine else None
            parameter = None if fresh is None else nn.Parameter(fresh, requires_grad=trainable)
            self.register_parameter(name, parameter)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        counter = torch.zeros((), device=device, dtype=torch.long)
        self.register_buffer("num_batches_tracked", counter)

    def reset_parameters(self) -> None:
        """Set γ = 1, β = 0, mean 0 and variance 1: the identity, but for ε."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Normalise ``x`` by the stored statistics."""
        if not is_scripting():
            if is_stand_in(input):
                return as_one_node(self, input)
            check_rank(self, input, self._ranks)
        mean, var = self.running_mean, self.running_var
        if self.training and torch.is_grad_enabled():
            # several processes copy buffers in place before every forward, with the same values;
            # to older torch that is a change of what an earlier forward kept for its backward
            mean, var = mean.data, var.data
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # BatchNorm itself stores a counter, other frozen layers do not: both load strictly
        key = prefix + "num_batches_tracked"
        added = key not in state_dict
        if added:
            state_dict[key] = torch.zeros_like(self.num_batches_tracked, device="cpu")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if added:
            del state_dict[key]

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


class FrozenBatchNorm1d(_FrozenBatchNorm):
    """Frozen BatchNorm of (N, C) or (N, C, L); see :class:`FrozenBatchNorm2d`.

    Example:
        >>> FrozenBatchNorm1d(4)(torch.randn(1, 4)).shape
        torch.Size([1, 4])
    """

    _ranks = (2, 3)


class FrozenBatchNorm2d(_FrozenBatchNorm):
    """BatchNorm that uses its stored statistics in training too: ``y = γ·(x − μ)/√(σ² + ε) + β``.

    Keys, kernel and output are BatchNorm's in eval mode; state dicts load strictly both ways.

    Args:
        num_features: number of channels C.
        eps: ε, added to the variance.
        affine: have γ (``weight``) and β (``bias``).
        trainable: whether γ and β require a gradient.
        device: where parameters and buffers live.
        dtype: their dtype.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        LayerError: the input has another number of axes or channels.

    Example:
        >>> batch_norm = nn.BatchNorm2d(4).eval()
        >>> layer = FrozenBatchNorm2d(4)
        >>> _ = layer.load_state_dict(batch_norm.state_dict())
        >>> x = torch.randn(2, 4, 3, 3)
        >>> torch.equal(layer(x), batch_norm(x))
        True
    """

    _ranks = (4,)


class FrozenBatchNorm3d(_FrozenBatchNorm):
    """Frozen BatchNorm of (N, C, D, H, W); see :class:`FrozenBatchNorm2d`.

    Example:
        >>> FrozenBatchNorm3d(4)(torch.randn(1, 4, 2, 3, 3)).shape
        torch.Size([1, 4, 2, 3, 3])
    """

    _ranks = (5,)


class FrozenBatchNormAct1d(Fused, FrozenBatchNorm1d):
    """``act(drop(FrozenBatchNorm1d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class FrozenBatchNormAct2d(Fused, FrozenBatchNorm2d):
    """``act(drop(FrozenBatchNorm2d(x)))``; see :class:`normswap.layers.fused.Fused`."""


class FrozenBatchNormAct3d(Fused, FrozenBatchNorm3d):
    """``act(drop(FrozenBatchNorm3d(x)))``; see :class:`normswap.layers.fused.Fused`."""
