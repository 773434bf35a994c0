"""Which parameters train, and which of them decay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normswap.errors import TrainingError

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_OWN_LAYERS = "normswap.layers"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's, normswap's, or one that looks like it.

    Example:
        >>> is_norm(nn.GroupNorm(1, 4)), is_norm(nn.Conv2d(4, 4, 1))
        (True, False)
    """
    if isinstance(module, _NORMS) or type(module).__module__.startswith(_OWN_LAYERS):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and all(item.ndim <= 1 for item in own)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: what decays, and what must not.

    Norm parameters (γ, β, τ, ε), biases and every other vector or scalar do not decay, nor does
    what the model itself names in timm's ``no_weight_decay()``.

    Args:
        model: parameters that do not require a gradient are left out.
        weight_decay: of the first group.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(net, 0.1)]
        [(1, 0.1), (3, 0.0)]
    """
    of_norms = {
        id(parameter)
        for module in model.modules()
        if is_norm(module)
        for parameter in module.parameters(recurse=False)
    }
    listed: Any = getattr(model, "no_weight_decay", tuple)
    exempt = listed()
    decaying: list[nn.Parameter] = []
    steady: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        held = parameter.ndim <= 1 or id(parameter) in of_norms or name in exempt
        (steady if held else decaying).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": steady, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def classifier_of(model: nn.Module) -> nn.Module:
    """The layer that makes the logits: timm's ``get_classifier()``, else the last one with weights.

    Example:
        >>> classifier_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 10)))
        Linear(in_features=4, out_features=10, bias=True)
    """
    if hasattr(model, "get_classifier"):
        ask: Any = model.get_classifier
        found = ask()
        parts = found if isinstance(found, (tuple, list)) else [found]
        heads = [part for part in parts if isinstance(part, nn.Module) and _trains(part)]
        if heads:
            return heads[0] if len(heads) == 1 else nn.ModuleList(heads)
    last = [
        module
        for module in model.modules()
        if any(item.ndim > 1 for item in module.parameters(recurse=False))
    ]
    if not last:
        raise TrainingError(
            "freeze_backbone",
            got=f"{type(model).__name__} without a weight matrix",
            need="a classifier to train",
            hint="freeze_backbone=False",
        )
    return last[-1]


@contextlib.contextmanager
def training_mode(
    model: nn.Module, *, freeze_backbone: bool = False, norms_only: bool = False
) -> Iterator[None]:
    """Put the model into training mode with only the wanted parameters trainable, for a while.

    A frozen backbone runs in eval mode: its running statistics stand still too. The flags of every
    module and parameter come back when the block ends, also when it raises.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        if freeze_backbone:
            _train_only(model, set(classifier_of(model).parameters()))
        elif norms_only:
            norms = (module for module in model.modules() if is_norm(module))
            _train_only(model, {item for m in norms for item in m.parameters(recurse=False)})
        if not _trains(model):
            raise TrainingError(
                type(model).__name__,
                got="no parameter that requires a gradient",
                need="at least one",
                hint="another choice of freeze_backbone or norms_only, or model.requires_grad_()",
            )
        start_training(model, freeze_backbone=freeze_backbone)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def start_training(model: nn.Module, *, freeze_backbone: bool) -> None:
    """Training mode for the parts that train."""
    model.train(not freeze_backbone)
    if freeze_backbone:
        classifier_of(model).train()


def _train_only(model: nn.Module, wanted: set[nn.Parameter]) -> None:
    for parameter in model.parameters():
        if parameter not in wanted:
            parameter.requires_grad_(False)


def _trains(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())
