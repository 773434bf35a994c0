"""Layers for a model that shall live without normswap: their source is copied as it stands here.

Each needs torch alone, works for any number of spatial dimensions and has the keys of the layer of
the same family in :mod:`normswap.layers`. The fast forms stay there: here stands the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FilterResponseNorm(nn.Module):
    """y = γ·x / √(mean(x²) + ε) + β, and z = max(y, τ) where a TLU took a ReLU's place.

    Singh & Krishnan 2019, arXiv 1911.09737.
    """

    def __init__(
        self, channels: int, eps: float = 1e-6, learnable_eps: bool = False, tlu: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.tau = nn.Parameter(torch.zeros(channels)) if tlu else None
        self.eps_l = nn.Parameter(torch.full((channels,), 1e-4)) if learnable_eps else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each sample by its root mean square."""
        shape = (1, -1, *([1] * (x.dim() - 2)))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        square = wide * wide
        power = square.mean(list(range(2, x.dim())), keepdim=True) if x.dim() > 2 else square
        eps = self.eps if self.eps_l is None else self.eps + self.eps_l.abs().view(shape)
        y = wide * (torch.rsqrt(power + eps) * self.weight.view(shape)) + self.bias.view(shape)
        return (y if self.tau is None else torch.maximum(y, self.tau.view(shape))).to(x.dtype)


class ThresholdedLinearUnit(nn.Module):
    """z = max(x, τ), with a τ per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Clip from below."""
        return torch.maximum(x, self.tau.view(1, -1, *([1] * (x.dim() - 2))))


class EvoNorm(nn.Module):
    """EvoNorm-S0: y = γ·x·sigmoid(v·x) / √(var of the group + ε) + β.

    Liu et al. 2020, arXiv 2004.02967.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Gate by itself, and divide by the spread of each sample's group."""
        shape = (1, -1, *([1] * (x.dim() - 2)))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        variance = wide.reshape(len(x), self.groups, -1).var(2, unbiased=False)
        std = (variance + self.eps).sqrt().repeat_interleave(x.shape[1] // self.groups, 1)
        y = wide * (wide * self.v.view(shape)).sigmoid() / std.view(*x.shape[:2], *shape[2:])
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of ``name``, with the dropout and activation that stand there."""
    old = model.get_submodule(name)
    if isinstance(getattr(old, "act", None), nn.Module):
        kind = type(new)

        class WithActivation(kind):  # type: ignore[misc, valid-type]
            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.act(self.drop(kind.forward(self, x)))
                return y

        new.__class__ = WithActivation
        new.drop = getattr(old, "drop", nn.Identity())
        new.act = old.act
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
