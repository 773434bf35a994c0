"""BatchNorm over all processes: torch's own, which is TorchScript too in its eval form."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``; what it computes is inherited.

    Example:
        >>> import torch
        >>> layer, twin = SyncBatchNorm(4).eval(), nn.BatchNorm2d(4).eval()
        >>> x = torch.randn(2, 4, 3, 3)
        >>> torch.equal(layer(x), twin(x))
        True
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Normalise ``x``."""
        if is_scripting():
            if self.training:
                raise RuntimeError("scripted layers have their eval form only: call eval() first")
        else:
            if is_stand_in(input):
                return as_one_node(self, input)
            return nn.SyncBatchNorm.forward(self, input)  # no super(): timm's heir does more
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
