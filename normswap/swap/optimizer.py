"""Move an optimizer onto the parameters of a converted model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from normswap.errors import SwapError
from normswap.graph.norms import state_of
from normswap.swap.journal import Journal


def check_optimizer(optimizer: Any) -> None:
    """Raise unless ``optimizer`` is a torch optimizer.

    Raises:
        SwapError: for anything else.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SwapError(
            "optimizer",
            got=type(optimizer).__name__,
            need="a torch.optim.Optimizer over the model's parameters",
            hint="optimizer.optimizer for a wrapper, or optimizer=None",
        )


def move_optimizer(
    optimizer: torch.optim.Optimizer,
    replacements: dict[nn.Module, nn.Module],
    journal: Journal,
    names: dict[nn.Parameter, str] | None = None,
) -> None:
    """Swap each old norm parameter for the new one of the same name, in its own group.

    Parameters that only the new layer has (τ, ε) join the group of its γ, or the first group if
    the BN had no parameters at all. Parameters the optimizer did not hold stay out. State is
    dropped with the parameter it belongs to, and kept where the parameter survived.
    """
    exchange, homeless = _exchange(replacements)
    for index, group in enumerate(optimizer.param_groups):
        new: list[nn.Parameter] = homeless if index == 0 else []
        for parameter in reversed(group["params"]):
            new = [*exchange.get(parameter, [parameter]), *new]
        new = list(dict.fromkeys(new))
        if "param_names" in group:
            old_names = dict(zip(group["params"], group["param_names"], strict=True))
            named = [old_names.get(p) or (names or {}).get(p, "") for p in new]
            journal.put(group, "param_names", named)
        journal.put_all(group["params"], new)
    surviving = {p for group in optimizer.param_groups for p in group["params"]}
    for parameter in exchange:
        if parameter not in surviving and parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            journal.on_undo(functools.partial(optimizer.state.__setitem__, parameter, state))


def _exchange(
    replacements: dict[nn.Module, nn.Module],
) -> tuple[dict[nn.Parameter, list[nn.Parameter]], list[nn.Parameter]]:
    """What each old parameter becomes, and the new ones of BNs that had none."""
    exchange: dict[nn.Parameter, list[nn.Parameter]] = {}
    homeless: list[nn.Parameter] = []
    for old, new in replacements.items():
        olds = _parameters(old)
        news = dict(new.named_parameters(recurse=False))
        extra = [p for name, p in news.items() if name not in olds]
        for name, parameter in olds.items():
            exchange.setdefault(parameter, []).extend([news[name]] if name in news else [])
        if olds:
            exchange[next(iter(olds.values()))] += extra
        else:
            homeless += extra
    return exchange, homeless


def _parameters(norm: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a BatchNorm by torch's names for them, whatever its class calls them."""
    state = state_of(norm)
    usual = {id(state.weight): "weight", id(state.bias): "bias"}
    return {usual.get(id(p), name): p for name, p in norm.named_parameters(recurse=False)}
