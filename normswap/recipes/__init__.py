"""One recipe per family of targets: what it accepts, how it matches, what it builds."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from torch import nn

from normswap.errors import PlanError
from normswap.graph.norms import is_batchnorm
from normswap.recipes.base import RECIPES, Recipe, target_of
from normswap.recipes.batch_norm import BatchNorm, FrozenBatchNorm, SyncBatchNorm
from normswap.recipes.batch_renorm import BatchRenorm
from normswap.recipes.cross_iteration_batch_norm import (
    CrossIterationBatchNorm,
    NaiveCrossIterationBatchNorm,
)
from normswap.recipes.evo_norm import EvoNorm
from normswap.recipes.filter_response_norm import FilterResponseNorm
from normswap.recipes.ghost_batch_norm import GhostBatchNorm
from normswap.recipes.group_norm import GroupNorm, InstanceNorm, LayerNorm
from normswap.recipes.group_norm_ws import WeightStandardisedGroupNorm
from normswap.targets import TARGETS, read_target


def recipe_for(target: str | Recipe) -> Recipe:
    """The recipe behind a target, as in ``gn`` or ``gn(groups=16)``; a recipe is returned as it is.

    Raises:
        PlanError: for an unknown name, with the closest known ones; for a setting that the target
            does not have, or a value that it cannot take.

    Example:
        >>> recipe_for("brn(r_max=2)").r_max, str(recipe_for("ln"))
        (2, 'ln')
    """
    if isinstance(target, Recipe):
        return target
    try:
        name, settings = read_target(str(target))
    except ValueError as error:
        raise PlanError(
            "target", got=str(error), need="a name, with settings in brackets", hint="gn(groups=16)"
        ) from error
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.4) or ["gn"]
        raise PlanError(
            "target",
            got=repr(target),
            need="one of " + ", ".join(TARGETS),
            hint=" or ".join(close),
        )
    known = [f.name for f in fields(RECIPES[name])]
    if strange := [setting for setting in settings if setting not in known]:
        close = difflib.get_close_matches(strange[0], known, n=1, cutoff=0.4) or known[:1]
        raise PlanError(
            str(target),
            got=f"{strange[0]}, which {name} does not have",
            need=f"settings among {', '.join(known)}" if known else "no settings",
            hint=f"{name}({close[0]}=…)" if close else name,
        )
    return RECIPES[name](**settings)


def recipe_of(layer: nn.Module) -> Recipe | None:
    """The recipe that makes layers like ``layer``; None for a module that no recipe makes.

    Example:
        >>> recipe_of(nn.GroupNorm(2, 8)).target, recipe_of(nn.ReLU())
        ('gn', None)
    """
    marked = RECIPES.get(target_of(layer) or "")
    if marked is not None:
        return marked.read(layer)
    makers = {made: recipe for recipe in RECIPES.values() for made in recipe.layers}
    found = next((makers[cls] for cls in type(layer).__mro__ if cls in makers), None)
    if found is not None:
        return found.read(layer)
    return BatchNorm() if is_batchnorm(layer) else None


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """The recipe that :meth:`Recipe.to_json` wrote down.

    Raises:
        PlanError: if the data does not describe a recipe.
    """
    arguments = dict(data)
    name = arguments.pop("target", None)
    cls = RECIPES.get(name) if isinstance(name, str) else None
    known = {f.name for f in fields(cls)} if cls is not None else set()
    if cls is None or set(arguments) - known:
        strange = ", ".join(sorted(map(str, set(arguments) - known))) or repr(name)
        raise PlanError(
            "recipe",
            got=f"{strange} in {data}",
            need="a target and its hyper-parameters",
            hint="a plan written by this version of normswap",
        )
    return cls(**{**cls.formerly, **arguments})


__all__ = [
    "RECIPES",
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "EvoNorm",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "NaiveCrossIterationBatchNorm",
    "Recipe",
    "SyncBatchNorm",
    "WeightStandardisedGroupNorm",
    "recipe_for",
    "recipe_from_json",
    "recipe_of",
]
