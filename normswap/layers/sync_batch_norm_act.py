"""timm's SyncBatchNorm with a dropout and an activation, which is TorchScript too in its eval form.

In a file of its own because it imports timm; only a model of timm's layers needs it.
"""

from __future__ import annotations

from timm.layers import norm_act

from normswap.layers.fused import Fused
from normswap.layers.sync_batch_norm import SyncBatchNorm


class SyncBatchNormAct(Fused, SyncBatchNorm, norm_act.SyncBatchNormAct):  # type: ignore[misc]
    """``act(drop(SyncBatchNorm(x)))``; timm's own tools take it for timm's.

    Example:
        >>> import torch
        >>> layer = SyncBatchNormAct(4, act=torch.nn.ReLU()).eval()
        >>> layer(torch.randn(2, 4, 3, 3)).min().item()
        0.0
    """
