"""The parameters that move, in units in which one learning rate fits all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.calibration.flow import Scale, own_parameters
from normswap.drift import Pair
from normswap.graph.norms import state_of
from normswap.running import device_of


@dataclass(frozen=True)
class _Affine:
    """γ and β of one layer as ``y = (a + unit·u)·(x̂ − mean)/std + b + unit·v``."""

    weight: nn.Parameter
    bias: nn.Parameter
    mean: Tensor
    std: Tensor
    unit: Tensor
    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor

    def pull(self) -> None:
        """Gradients of γ and β become gradients of u and v."""
        slope, shift = _gradient(self.weight), _gradient(self.bias)
        self.u.grad = (slope - shift * self.mean) / self.std * self.unit
        self.v.grad = shift * self.unit

    def push(self) -> None:
        """Write u and v back into γ and β."""
        slope = (self.a + self.unit * self.u) / self.std
        self.weight.copy_(slope)
        self.bias.copy_(self.b + self.unit * self.v - slope * self.mean)


@dataclass(frozen=True)
class _Single:
    """Any other per-channel parameter of a layer (τ): ``start + unit·u``."""

    parameter: nn.Parameter
    unit: Tensor
    start: Tensor
    u: Tensor

    def pull(self) -> None:
        """The gradient of the parameter becomes that of u."""
        self.u.grad = _gradient(self.parameter) * self.unit

    def push(self) -> None:
        """Write u back into the parameter."""
        self.parameter.copy_(self.start + self.unit * self.u)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """In float32, as the coordinates are."""
    found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found.float()


class Coordinates:
    """The replaced layers' parameters in units of what they do to the output.

    FRN's x̂ is ±1 plus a little where a channel's mean outweighs its spread, so γ and β fight each
    other. In ``y = a·(x̂ − mean)/std + b`` they do not; a, b and τ are measured in the spread of
    the original's output, and one learning rate fits every channel of every network.
    """

    def __init__(self, pairs: tuple[Pair, ...], scales: dict[str, Scale]) -> None:
        self.parts: list[_Affine | _Single] = []
        self.leaves: list[Tensor] = []
        seen: set[int] = set()
        for pair in pairs:
            scale = scales.get(pair.name) or _plain_scale(pair)
            own = own_parameters(pair.module)
            if any(id(p) in seen for p in own.values()):
                continue
            seen |= {id(p) for p in own.values()}
            self._add(own, scale)

    def _add(self, own: dict[str, nn.Parameter], scale: Scale) -> None:
        unit = scale.out.clamp_min(1e-3 * scale.out.max().clamp_min(1e-6))
        if "weight" in own and "bias" in own:
            w, b = own.pop("weight"), own.pop("bias")
            u, v = self._leaf(w), self._leaf(b)
            a0, b0 = w.detach() * scale.std, b.detach() + w.detach() * scale.mean
            self.parts.append(_Affine(w, b, scale.mean, scale.std, unit, a0, b0, u, v))
        for parameter in own.values():
            start = parameter.detach().clone()
            self.parts.append(_Single(parameter, unit, start, self._leaf(parameter)))

    def _leaf(self, like: Tensor) -> Tensor:
        self.leaves.append(torch.zeros_like(like, dtype=torch.float32, requires_grad=True))
        return self.leaves[-1]

    def pull(self) -> bool:
        """Gradients in the coordinates; False if any is not finite."""
        for part in self.parts:
            part.pull()
        return all(
            bool(leaf.grad.isfinite().all()) for leaf in self.leaves if leaf.grad is not None
        )

    @torch.no_grad()
    def push(self) -> None:
        """Write the coordinates back into the layers."""
        for part in self.parts:
            part.push()


def _plain_scale(pair: Pair) -> Scale:
    """For a layer whose formula is not known or that runs more than once."""
    weight = state_of(pair.original).weight
    one = torch.ones(state_of(pair.original).channels, device=device_of(pair.module))
    return Scale(0 * one, one, one if weight is None else weight.detach().abs().float())
