"""One recipe per family of targets: what it accepts, how it matches, what it builds."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from torch import nn

from normswap.errors import PlanError
from normswap.graph.norms import is_batchnorm
from normswap.recipes.base import RECIPES, Recipe
from normswap.recipes.batch_norm import BatchNorm, FrozenBatchNorm, SyncBatchNorm
from normswap.recipes.batch_renorm import BatchRenorm
from normswap.recipes.cross_iteration_batch_norm import (
    CrossIterationBatchNorm,
    NaiveCrossIterationBatchNorm,
)
from normswap.recipes.evo_norm import EvoNorm
from normswap.recipes.filter_response_norm import FilterResponseNorm
from normswap.recipes.group_norm import GroupNorm, InstanceNorm, LayerNorm
from normswap.targets import TARGETS


def recipe_for(target: str | Recipe) -> Recipe:
    """The recipe behind a target's name; a recipe is returned as it is.

    Raises:
        PlanError: for an unknown name, with the closest known ones.
    """
    if isinstance(target, Recipe):
        return target
    if target in RECIPES:
        return RECIPES[target]()
    close = difflib.get_close_matches(str(target), TARGETS, n=2, cutoff=0.4) or ["gn"]
    raise PlanError(
        "target",
        got=repr(target),
        need="one of " + ", ".join(TARGETS),
        hint=" or ".join(close),
    )


def recipe_of(layer: nn.Module) -> Recipe | None:
    """The recipe that makes layers like ``layer``; None for a module that no recipe makes.

    Example:
        >>> recipe_of(nn.GroupNorm(2, 8)).target, recipe_of(nn.ReLU())
        ('gn', None)
    """
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
    return cls(**arguments)


__all__ = [
    "RECIPES",
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "EvoNorm",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "NaiveCrossIterationBatchNorm",
    "Recipe",
    "SyncBatchNorm",
    "recipe_for",
    "recipe_from_json",
    "recipe_of",
]
