"""A convolution moved by ridge regression, from what arrives in the copy and in the original."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.graph import Movable
from normswap.layers import patches

STRENGTHS = (0.03, 0.1, 0.3, 1.0)
"""Ridge strengths to choose from, in mean squares of the inputs."""
ROWS = 16_000
"""Positions that a regression looks at."""
_MOST_FEATURES = 1600
"""Above this many inputs of a channel solving takes longer than it gains."""


class Regression:
    """A convolution's correction by ridge regression, from the lanes of both models.

    The correction makes the convolution's output on the copy's inputs come near the original's on
    the original's. Errors belong to samples, not to positions: so the strength is chosen on samples
    that the correction has not seen.
    """

    def __init__(self, producer: Movable) -> None:
        self.module = producer.module
        self.loudness = producer.loudness()
        self.start = [p.detach().clone() for p in producer.tensors]
        self.conv = isinstance(self.module, _ConvNd) and not isinstance(
            self.module, _ConvTransposeNd
        )
        self._sums: list[list[Tensor] | None] = [None, None]

    @property
    def possible(self) -> bool:
        """Dense and depthwise convolutions."""
        module = self.module
        if not isinstance(module, _ConvNd) or not self.conv:
            return False
        depthwise = module.groups == module.in_channels == module.out_channels
        return (module.groups == 1 or depthwise) and self._features(module) <= _MOST_FEATURES

    def _features(self, module: _ConvNd) -> int:
        return module.weight[0].numel()

    def add(
        self, x: Tensor, wanted: Tensor, rows: int, *, held: bool, draw: torch.Generator
    ) -> None:
        """Take one lane in: the copy's input, what the original makes of its own, positions."""
        module = self.module
        assert isinstance(module, _ConvNd)
        at = _positions(wanted, rows, draw)
        seen = patches(module, x, at).float()
        aim = wanted.movedim(1, -1)[at].float() * self.loudness
        weight = self.start[0].float().flatten(1)
        if module.groups > 1:
            seen, aim = seen.transpose(0, 1), aim.T[..., None]  # (C, R, taps), (C, R, 1)
            error = aim - seen @ weight[..., None]
        else:
            seen = seen.flatten(1)
            error = aim - seen @ weight.T
        seen = torch.cat([seen, torch.ones_like(seen[..., :1])], -1)
        count = seen.new_tensor(float(error.shape[-2]))
        new = [seen.mT @ seen, seen.mT @ error, error.square().sum(), count]
        old = self._sums[held]
        self._sums[held] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def move(self) -> None:
        """Correct the weight, counted from where it began, as far as that helps on held samples.

        What other rounds saw counts too; only the strength is chosen on the last one.
        """
        used, held = self._sums
        assert used is not None
        judged = used if held is None else held
        strengths = STRENGTHS if held is not None else (0.3,)
        found = [(self._left(judged, m), m) for m in (_solved(used, s) for s in strengths)]
        left, move = min(found, key=lambda pair: pair[0])
        self._apply(move if left < 0 else torch.zeros_like(move))
        self._sums[True] = None

    @staticmethod
    def _left(sums: list[Tensor], move: Tensor) -> float:
        """Change of the squared error: below 0 is better."""
        gram, cross, _, _ = sums
        return float((move * (gram @ move)).sum() - 2 * (move * cross).sum())

    def _apply(self, move: Tensor) -> None:
        module = self.module
        assert isinstance(module, _ConvNd)
        change = move[..., 0] if module.groups > 1 else move.T
        weight = self.start[0]
        module.weight.copy_(weight + change[:, :-1].reshape(weight.shape).to(weight))
        if module.bias is not None:
            module.bias.copy_(self.start[1] + change[:, -1].to(weight))


def _positions(like: Tensor, rows: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Sample and place of ``rows`` positions of (N, C, …), as many of every sample."""
    places = like[0, 0].numel()
    each = max(1, min(places, rows // len(like)))
    flat = torch.rand(len(like), places, generator=draw).topk(each).indices.flatten()
    sample = torch.arange(len(like)).repeat_interleave(each)
    spatial = torch.unravel_index(flat, like.shape[2:])
    return tuple(index.to(like.device) for index in (sample, *spatial))


def _solved(sums: list[Tensor], strength: float) -> Tensor:
    gram, cross, _, count = sums
    gram, cross = gram / count, cross / count
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    level = diagonal[..., :-1].mean(-1, keepdim=True)
    ridge = strength * level + 1e-4 * level.mean() + 1e-9
    pulls = torch.cat([ridge.expand_as(diagonal[..., :-1]), 1e-6 + 0 * ridge], -1)
    factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(pulls))
    return torch.cholesky_solve(cross, factor)
