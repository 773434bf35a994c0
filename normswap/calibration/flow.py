"""Step one: γ and β in closed form, in data-flow order, from what really arrives at each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.drift import Pair, hooked, input_of
from normswap.graph import call
from normswap.graph.norms import is_batchnorm, state_of

_PER_CHANNEL = ("weight", "bias", "tau")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """γ, β and τ of a layer; ε is not among them: it must stay small."""
    return {k: p for k, p in module.named_parameters(recurse=False) if k in _PER_CHANNEL}


def _linear_output(bn: nn.Module, x: Tensor) -> Tensor:
    """What BatchNorm computes in eval mode, without a fused activation."""
    s = state_of(bn)
    return F.batch_norm(x, s.mean, s.var, s.weight, s.bias, s.mean is None, 0.0, s.eps)


def _standardised(module: nn.Module, x: Tensor) -> Tensor | None:
    """The layer's output before γ and β; None for a layer of unknown formula."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return F.instance_norm(x, eps=module.eps)
    if "FilterResponseNorm" in type(module).__name__:
        axes = list(range(2, x.dim()))
        square = x.square().mean(axes, keepdim=True) if axes else x.square()
        learnt = getattr(module, "eps_l", None)
        eps = torch.as_tensor(module.eps, device=x.device).abs()
        if learnt is not None:
            eps = eps + _column(learnt.abs(), x)
        return x * torch.rsqrt(square + eps)
    if is_batchnorm(module):
        s = state_of(module)
        if s.mean is not None:
            return F.batch_norm(x, s.mean, s.var, None, None, False, 0.0, s.eps)
    return None


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


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
            found[pair.name] = _moments(_linear_output(pair.original, input_of(args, kwargs)))

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
            normal = _standardised(module, input_of(args, kwargs))
            if pair.name not in targets or normal is None:
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
