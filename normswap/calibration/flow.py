"""Step one: γ and β in closed form, in data-flow order, from what really arrives at each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.drift import Pair
from normswap.graph.norms import state_of
from normswap.recipes import recipe_of
from normswap.running import call, hooked, input_of

_PER_CHANNEL = ("weight", "bias", "tau")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """γ, β and τ of a layer; ε is not among them: it must stay small."""
    return {k: p for k, p in module.named_parameters(recurse=False) if k in _PER_CHANNEL}


def linear_output(bn: nn.Module, x: Tensor) -> Tensor:
    """What BatchNorm computes in eval mode, without a fused activation."""
    s = state_of(bn)
    return F.batch_norm(x, s.mean, s.var, s.weight, s.bias, s.mean is None, 0.0, s.eps)


def _by_channel(x: Tensor) -> Tensor:
    """(C, everything else), float32."""
    return x.detach().float().transpose(0, 1).flatten(1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = _by_channel(x)
    mean = rows.mean(1)
    # ten times faster on a CPU than Tensor.std
    return mean, torch.linalg.vector_norm(rows - mean[:, None], dim=1) / rows.shape[1] ** 0.5


@dataclass(frozen=True)
class Scale:
    """Where a layer works: moments of its standardised input x̂ and spread of the original's y."""

    mean: Tensor
    std: Tensor
    out: Tensor


def _targets(
    pairs: tuple[Pair, ...], teacher: nn.Module, x: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and spread of the original's output per site and channel, before any activation."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    repeated: set[str] = set()

    def hook_for(pair: Pair) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if pair.name in found:  # one (γ, β) cannot serve each of several calls alone
                repeated.add(pair.name)
            aim = linear_output(pair.original, input_of(args, kwargs))
            recipe = recipe_of(pair.module)
            found[pair.name] = _moments(aim if recipe is None else recipe.aim(pair.module, aim))

        return hook

    hooks = [p.original.register_forward_pre_hook(hook_for(p), with_kwargs=True) for p in pairs]
    with hooked(*hooks):
        call(teacher, x)
    return {name: target for name, target in found.items() if name not in repeated}


def match_in_flow(
    pairs: tuple[Pair, ...], model: nn.Module, teacher: nn.Module, x: Any
) -> dict[str, Scale]:
    """Set every γ and β from what really arrives there, upstream first, in one forward pass.

    With x̂ the standardised input and t the original's output: ``γ = ±std(t)/std(x̂)``, with the
    sign γ has, and ``β = mean(t) − γ·mean(x̂)``.
    """
    targets = _targets(pairs, teacher, x)
    scales: dict[str, Scale] = {}

    def hook_for(pair: Pair) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recipe = recipe_of(module)
            if recipe is None or pair.name not in targets:
                return
            normal = recipe.standardise(module, input_of(args, kwargs))
            if normal is None:
                return
            (mean, std), (centre, spread) = _moments(normal), targets[pair.name]
            std = std.clamp_min(1e-4 * std.max().clamp_min(1e-6))
            scales[pair.name] = Scale(mean, std, spread)
            own = own_parameters(module)
            if "weight" in own and "bias" in own:
                slope = own["weight"].sign() * spread / std
                own["weight"].copy_(slope)
                own["bias"].copy_(centre - slope * mean)

        return hook

    hooks = [p.module.register_forward_pre_hook(hook_for(p), with_kwargs=True) for p in pairs]
    with hooked(*hooks):
        call(model, x)
    return scales
