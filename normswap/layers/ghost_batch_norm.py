"""Ghost Batch Normalization: BatchNorm over parts of the batch, for batches that are too large."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normswap.layers.batch_statistics import (
    TracksBatches,
    check_positive,
    check_rank,
    is_recomputation,
)
from normswap.layers.fused import Fused


class _GhostBatchNorm(TracksBatches):
    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        size: int = 32,
        *,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_positive(self, size=size)
        self.size = size

    def _check_input_dim(self, x: Tensor) -> None:
        check_rank(self, x, self._ranks)

    def _train(self, x: Tensor) -> Tensor:
        ghosts = x.tensor_split(max(1, round(x.shape[0] / self.size)))
        return torch.cat([self._normalised(ghost) for ghost in ghosts])

    def _normalised(self, ghost: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        assert mean is not None  # refused in __init__
        assert variance is not None
        if is_recomputation():  # of a checkpointed block: this batch is counted already
            mean, variance, weight = mean.clone(), variance.clone(), 0.0
        else:
            weight = float(self._count_batch())
        return F.batch_norm(ghost, mean, variance, self.weight, self.bias, True, weight, self.eps)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"{super().extra_repr()}, size={self.size}"


class GhostBatchNorm1d(_GhostBatchNorm):
    """Ghost Batch Normalization of (N, C) or (N, C, L); see :class:`GhostBatchNorm2d`.

    Example:
        >>> GhostBatchNorm1d(4, size=2)(torch.randn(6, 4)).shape
        torch.Size([6, 4])
    """

    _ranks = (2, 3)


class GhostBatchNorm2d(_GhostBatchNorm):
    """BatchNorm over ghost batches of about ``size`` samples each.

    In training the batch is split into N/size parts (rounded, at least one; they differ by one
    sample at most), and each is normalised by its own mean and variance, as BatchNorm would. The
    running statistics take them in one after the other. In eval mode it is BatchNorm.

    Args:
        num_features: number of channels C.
        eps: ε, added to the variance.
        momentum: share of the newest ghost batch in the running statistics; None: their average.
        affine: have γ (``weight``) and β (``bias``).
        size: samples of a ghost batch.
        track_running_stats: must stay True.
        device: where parameters and buffers live.
        dtype: their dtype.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        LayerError: arguments out of range, or an input with another number of axes or channels.

    Example:
        >>> layer, x = GhostBatchNorm2d(4, size=2), torch.randn(6, 4, 8, 8)
        >>> torch.allclose(layer(x)[:2], torch.nn.BatchNorm2d(4)(x[:2]), atol=1e-6)
        True

    Reference:
        Hoffer, Hubara & Soudry 2017, Train longer, generalize better, arXiv 1705.08741,
        algorithm 1.
    """

    _ranks = (4,)


class GhostBatchNorm3d(_GhostBatchNorm):
    """Ghost Batch Normalization of (N, C, D, H, W); see :class:`GhostBatchNorm2d`.

    Example:
        >>> GhostBatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    _ranks = (5,)


class GhostBatchNormAct2d(Fused, GhostBatchNorm2d):
    """``act(drop(GhostBatchNorm2d(x)))``; see :class:`normswap.layers.fused.Fused`."""
