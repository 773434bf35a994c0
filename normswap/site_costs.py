"""What converting a site costs, by itself and beside others: divergence of the outputs, in nats.

To second order, from a few backward passes of the original for all sites together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.calibration import by_channel, linear_output
from normswap.graph import Movable
from normswap.graph.norms import fused_parts, state_of
from normswap.recipes import recipe_of
from normswap.running import call, copied, hooked, input_of, leaves

_DRAWS = 4
"""Random directions per image in which an error's effect on the outputs is looked at."""


def slopes_of(
    sites: list[str],
    donor: nn.Module,
    producers: Mapping[str, Movable],
    teacher: nn.Module,
    found: list[Any],
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """How random directions of the outputs answer to each site's own error; (images · draws,).

    A site's error e changes the outputs by J·e; with random v of the softmax's own covariance the
    mean of (v·J·e)² is twice the divergence that makes. One backward pass gives v·J·e of all sites.

    Args:
        sites: their names.
        donor: the converted model, in which each is solved by itself.
        producers: what was scaled with a site, by the site's name.
        teacher: the original.
        found: what it is called with.
        draw: of the directions.
    """
    ours, theirs = dict(donor.named_modules()), dict(teacher.named_modules())
    loudness = {site: producer.loudness() for site, producer in producers.items()}
    errors = {n: _SiteError(theirs[n], ours[n], loudness.get(n)) for n in sites}
    hooks = [theirs[n].register_forward_hook(e.nudge, with_kwargs=True) for n, e in errors.items()]
    with torch.enable_grad(), hooked(*hooks):
        for batch in found:
            outputs = leaves(call(teacher, copied(batch)))
            for last in (False,) * (_DRAWS - 1) + (True,):
                _look(list(errors.values()), outputs, draw, last=last)
    return {name: error.slopes for name, error in errors.items()}


def cost_of(slopes: Tensor) -> float:
    """Mean divergence of the outputs, in nats; infinite where the site never ran."""
    return float(slopes.square().mean() / 2) if len(slopes) else math.inf


def cheapest_first(slopes: Mapping[str, Tensor]) -> tuple[list[str], list[float]]:
    """Sites in the order in which each adds least to the divergence of those before it, and that.

    To second order the divergence of several is that of the sum of their slopes, so two whose
    errors agree cost more together than each by itself, and two that differ less. Half of what few
    images show of that counts.
    """
    left = {name: values for name, values in slopes.items() if len(values)}
    order: list[str] = []
    costs: list[float] = []
    together: dict[int, Tensor] = {}  # of the sites chosen; a site that runs twice stands apart
    while left:
        added = {n: v.square().mean() for n, v in left.items()}
        for name, values in left.items():
            if len(values) in together:
                added[name] = added[name] + (values * together[len(values)]).mean()
        order.append(min(left, key=lambda name: float(added[name])))
        costs.append(max(float(added[order[-1]]) / 2, 0.0) + (costs[-1] if costs else 0.0))
        chosen = left.pop(order[-1])
        together[len(chosen)] = chosen + together.get(len(chosen), 0.0)
    never = [name for name in slopes if name not in order]
    return [*order, *never], [*costs, *(math.inf for _ in never)]


class _SiteError:
    """What one converted site does wrong by itself, as a gain on its error that is 0."""

    def __init__(self, bn: nn.Module, layer: nn.Module, scale: Tensor | None) -> None:
        self.bn, self.layer, self.scale = bn, layer, scale
        self.gain: Tensor | None = None
        self._seen: list[Tensor] = []

    @property
    def slopes(self) -> Tensor:
        """All that were seen; none where it never ran."""
        return torch.cat(self._seen) if self._seen else torch.empty(0)

    def see(self, slope: Tensor | None) -> None:
        """Take in how one random direction of the outputs answers to the gains."""
        if slope is not None:
            self._seen.append(slope.detach().flatten())

    def nudge(self, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """A forward hook on the BatchNorm."""
        x = input_of(args, kwargs).detach()
        with torch.no_grad():
            error = self._error(x, output.detach())
        shape = [len(output), *[1] * (output.dim() - 1)]
        self.gain = torch.zeros(shape, device=output.device, requires_grad=True)
        return output + self.gain.to(output) * error

    def _error(self, x: Tensor, output: Tensor) -> Tensor:
        """What comes out of the layer, on what the BatchNorm gets, minus what comes out of that."""
        recipe = recipe_of(self.layer)
        louder = x if self.scale is None else x * by_channel(self.scale, x)
        normal = None if recipe is None else recipe.standardise(self.layer, louder)
        if recipe is None or normal is None:
            return torch.zeros_like(output)
        state, parts = state_of(self.layer), fused_parts(self.bn)
        for own, into in ((state.weight, torch.mul), (state.bias, torch.add)):
            normal = normal if own is None else into(normal, by_channel(own.detach(), normal))
        plain = recipe.aim(self.layer, linear_output(self.bn, x))
        if parts is None:
            return normal - plain
        found: Tensor = parts[1](normal) - parts[1](plain)
        return found


def _look(
    errors: list[_SiteError], outputs: list[Tensor], draw: torch.Generator, *, last: bool
) -> None:
    ran = [error for error in errors if error.gain is not None]
    gains = [error.gain for error in ran if error.gain is not None]
    aim = _direction(outputs, draw)
    if not gains or aim is None:
        return
    slopes = torch.autograd.grad(aim, gains, retain_graph=not last, allow_unused=True)
    for error, slope in zip(ran, slopes, strict=True):
        error.see(slope)
        if last:
            error.gain = None


def _direction(outputs: list[Tensor], draw: torch.Generator) -> Tensor | None:
    """A random direction of the outputs in which a step of 1 costs half a nat per image."""
    for z in outputs:
        if z.dim() >= 2 and z.shape[1] > 1 and z.requires_grad:
            p = z.detach().float().softmax(1).movedim(1, -1)
            rows = p.reshape(-1, p.shape[-1])
            chosen = torch.multinomial(rows.cpu(), 1, generator=draw).to(rows.device)
            v = (torch.zeros_like(rows).scatter_(1, chosen, 1.0) - rows).view_as(p)
            return (v * z.float().movedim(1, -1)).sum() / math.sqrt(rows.shape[0] / len(z))
    varying = [z for z in outputs if z.requires_grad and z.numel()]
    if not varying:
        return None
    steps = [
        torch.randn(z.shape, generator=draw).to(z) / z.detach().std().clamp_min(1e-6)
        for z in varying
    ]
    return torch.stack([(v * z).sum() for v, z in zip(steps, varying, strict=True)]).sum()
