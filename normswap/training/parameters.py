"""Which parameters train and which decay; what the loop must know of normalisation layers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normswap import layers
from normswap.errors import TrainingError
from normswap.graph import norms
from normswap.recipes import Recipe, recipe_of

log = logging.getLogger("normswap")

_USUAL_BATCH, _USUAL_MOMENTUM = 32, 0.1
"""Samples of a batch, and the momentum that is made for it."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, or the threshold behind one.

    Example:
        >>> is_norm(nn.GroupNorm(1, 4)), is_norm(nn.Conv2d(4, 4, 1))
        (True, False)
    """
    return norms.is_norm(module) or isinstance(module, layers.ThresholdedLinearUnit)


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


def relative_steps(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split groups so that a step changes every weight by the same part of its own size.

    Adam's steps are as large as the rate, whatever they are taken from: what a kernel of root mean
    square 0.5 does not notice rewrites one of 0.05, and a pretrained network has both. The rate of
    a kernel or matrix is multiplied by its root mean square over 0.35; vectors (γ, β, biases) keep
    theirs. Sizes count in powers of two, so that there are few groups.

    Args:
        groups: of :func:`parameter_groups`, before any training: the sizes are those of now.

    Returns:
        Groups with timm's ``lr_scale``, which its schedulers know.
    """
    found: list[dict[str, Any]] = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            scale = _size(parameter) / _USUAL_SIZE if parameter.ndim > 1 else 1.0
            by_scale.setdefault(2.0 ** round(math.log2(scale)), []).append(parameter)
        found += [
            {**group, "params": by_scale[scale], "lr_scale": scale}
            for scale in sorted(by_scale, reverse=True)
        ]
    return found


_USUAL_SIZE = 0.35


def _size(weight: Tensor) -> float:
    """Root mean square; at least what a layer begins with, as some begin at 0."""
    inputs = max(weight.numel() // max(len(weight), 1), 1)
    found = float(weight.detach().float().square().mean().sqrt()) if weight.numel() else 0.0
    least = 1 / math.sqrt(3 * inputs)
    return max(found, least) if math.isfinite(found) else least  # the run will say what is wrong


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
            hint="leaving --freeze-backbone out (freeze_backbone=False)",
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
            wanted = {item for part in _heads(model) for item in part.parameters()}
            _train_only(model, wanted)
        elif norms_only:
            found = (module for module in model.modules() if is_norm(module))
            _train_only(model, {item for m in found for item in m.parameters(recurse=False)})
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


@contextlib.contextmanager
def steady_statistics(
    model: nn.Module, samples: int, momentum: float | None = None
) -> Iterator[None]:
    """Let running statistics go over at least as many samples as in batches of 32, for a while.

    A momentum of 0.1 is made for such batches. At batch 2 the statistics would be those of the last
    20 samples or so, and what a model computes in eval mode would hang on which these were. By the
    scaling rule of exponential averages it becomes ``1 − 0.9^(b/32)``; a smaller one stays.

    Args:
        model: its layers' ``momentum`` comes back when the block ends.
        samples: b, in one forward of one process.
        momentum: for every layer in place of the rule.

    Reference:
        Busbridge et al., "How to Scale Your EMA", arXiv 2307.13813, definition 1.2.
    """
    own = averaging(model)
    largest = 1.0 - (1.0 - _USUAL_MOMENTUM) ** (samples / _USUAL_BATCH)
    try:
        for module, usual in own.items():
            vars(module)["momentum"] = min(usual, largest) if momentum is None else momentum
        yield
    finally:
        for module, usual in own.items():
            vars(module)["momentum"] = usual


def averaging(model: nn.Module) -> dict[nn.Module, float]:
    """The layers that keep running statistics, and with what momentum."""
    own: dict[nn.Module, float] = {}
    for module in model.modules():
        usual = getattr(module, "momentum", None)
        if isinstance(usual, float) and isinstance(getattr(module, "running_mean", None), Tensor):
            own[module] = usual
    return own


def start_training(model: nn.Module, *, freeze_backbone: bool) -> None:
    """Training mode for the parts that train."""
    model.train(not freeze_backbone)
    if freeze_backbone:
        model.training = _has_backbone(model)  # a detector asks whether it is to give losses
        for part in _heads(model):
            part.train()


def _heads(model: nn.Module) -> list[nn.Module]:
    """What trains on a backbone that stands still: the classifier, or all that is no backbone."""
    if not _has_backbone(model):
        return [classifier_of(model)]
    return [part for name, part in model.named_children() if name != "backbone"]


def _has_backbone(model: nn.Module) -> bool:
    """Whether a part says so itself, as in torchvision's detection and segmentation models."""
    own = isinstance(getattr(model, "backbone", None), nn.Module)
    return own and not hasattr(model, "get_classifier")


def _train_only(model: nn.Module, wanted: set[nn.Parameter]) -> None:
    for parameter in model.parameters():
        if parameter not in wanted:
            parameter.requires_grad_(False)


def _trains(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def norm_state(model: nn.Module) -> dict[str, Any]:
    """Iteration counters, schedules and histories, which are no part of the state dict."""
    schedules = {name: recipe.schedule(layer) for name, layer, recipe in _scheduled(model)}
    return {"schedules": schedules, "layers": layers.training_state(model)}


def load_norm_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put back what ``norm_state`` gave."""
    # version 0.1 kept CBN's apart
    apart = {name: {"burn_in": length} for name, length in state.get("burn_ins", {}).items()}
    schedules = {**state["schedules"], **apart}
    for name, layer, recipe in _scheduled(model):
        recipe.set_schedule(layer, schedules[name])
    layers.load_training_state(model, state["layers"])


def scale_schedules(model: nn.Module, iterations: int) -> None:
    """Fit the schedules of BRN and CBN into a run.

    BRN with running statistics and no schedule starts open: its statistics are already good. BRN
    with fresh running statistics gets the paper's schedule in proportion (plain BN for 4 % of the
    run, r open at 31 %, d at 19 %). CBN with fresh running statistics and no burn-in gets one of
    30 % of the run: its first-order prediction does not reach as far as weights move at first.
    Any other schedule keeps its iterations unless it would take more than 30 % of the run; then it
    is shortened to that.

    Args:
        model: changed in place.
        iterations: training forwards of the run.
    """
    for name, layer, recipe in _scheduled(model):
        own, wanted = recipe.schedule(layer), recipe.fitted_schedule(layer, iterations)
        if wanted != own:
            recipe.set_schedule(layer, wanted)
            log.info("%s: schedule %s of %d iterations, not %s", name, wanted, iterations, own)


def _scheduled(model: nn.Module) -> Iterator[tuple[str, nn.Module, Recipe]]:
    for name, module in model.named_modules():
        recipe = recipe_of(module)
        if recipe is not None and recipe.schedule(module):
            yield name, module, recipe


def pace_of(model: nn.Module) -> float:
    """By how much the normalisation layers of a model want a larger learning rate than usual."""
    found = (recipe_of(module) for module in model.modules())
    return max((recipe.pace for recipe in found if recipe is not None), default=1.0)


def check_norms(model: nn.Module, device: torch.device, world: int) -> None:
    """Refuse what cannot train here, before it starts.

    Raises:
        TrainingError: SyncBatchNorm over several processes on the CPU.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and device.type == "cpu":
            if world > 1:
                raise TrainingError(
                    name,
                    got="SyncBatchNorm on the CPU",
                    need="a GPU for each process",
                    hint="another target; gn and frn need no synchronisation",
                )
            log.warning("%s: SyncBatchNorm in one process on the CPU is plain BatchNorm", name)
            return


def notes_on_norms(model: nn.Module, world: int) -> list[str]:
    """What several processes share of the normalisation layers, in words."""
    if world == 1:
        return []
    found = [recipe for module in model.modules() if (recipe := recipe_of(module)) is not None]
    notes = ["each process normalises its own batch; gradients are averaged over all of them"]
    if not all(recipe.per_sample for recipe in found):
        notes.append(
            "running statistics are those of the first process, handed to all before each forward"
        )
    return notes + list(dict.fromkeys(recipe.apart for recipe in found if recipe.apart))
