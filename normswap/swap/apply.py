"""Apply a plan to a model: all of it, or nothing."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from normswap.errors import PlanError, SwapError
from normswap.graph import CallSite, norms, qualified_names
from normswap.graph.numbers import check_numbers
from normswap.graph.vocabulary import REPLACEABLE, replaceable_op
from normswap.graph.wrappers import refuse_wrapped
from normswap.passage import statistics_of
from normswap.planning import Patterns, Plan, PlanEntry, Target, plan
from normswap.provenance import Provenance, provenance_of
from normswap.recipes import Recipe, recipe_of
from normswap.recipes.base import mark
from normswap.swap.check import check_run
from normswap.swap.journal import Journal
from normswap.swap.optimizer import check_optimizer, move_optimizer
from normswap.swap.references import put_at, replace_everywhere
from normswap.swap.relu_removal import edited_class

_log = logging.getLogger("normswap")


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did.

    Attributes:
        model: the model, converted in place; a new object only if the root itself was a BN.
        plan: what was decided, per site.
        replaced: name → new module.
        kept: name → why the BatchNorm stayed.
    """

    model: nn.Module
    plan: Plan
    replaced: dict[str, nn.Module]
    kept: dict[str, str]


def convert(
    model: nn.Module,
    target: Target | Plan,
    *,
    example_inputs: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    fallback: str | Recipe | None = None,
    init: str = "match",
    optimizer: Any = None,
    allow_nonfinite: bool = False,
) -> Conversion:
    """See :func:`normswap.convert`, which scales producers and decides what to keep as well.

    Raises:
        PlanError: a request that cannot be satisfied; see :func:`normswap.plan`.
        WalkError: the model cannot be run or understood, or not any more with its new layers.
        SwapError: the plan does not fit the model, or ``optimizer`` is none.
        ImpossibleNumbersError: weights or running statistics that are not finite, or negative
            variances.
    """
    if isinstance(target, Plan):
        _check_settled(include=include, exclude=exclude, fallback=fallback)
        if init not in {"match", *(entry.init for entry in target.swapped)}:
            _check_settled(init=init)
    else:
        target = plan(
            model,
            target,
            example_inputs=example_inputs,
            include=include,
            exclude=exclude,
            fallback=fallback,
            init=init,
        )
    if not allow_nonfinite:
        check_numbers(model)
    idle = target.idle
    if idle is not None:
        _log.warning("nothing was converted: %s", idle)
    return _applied(model, target, optimizer, example_inputs)


def _check_settled(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise PlanError(
            given[0],
            got="it together with a finished plan, which has settled it",
            need="one or the other",
            hint=f"plan(model, target, {given[0]}=…)",
        )


def apply_plan(model: nn.Module, plan: Plan, *, optimizer: Any = None) -> Conversion:
    """See :func:`normswap.apply_plan`, which looks after steady scales as well.

    Raises:
        SwapError: the plan names modules that are not there or are something else.
    """
    return _applied(model, plan, optimizer, None)


@torch.inference_mode(mode=False)  # what is built in that mode can never be trained
def _applied(model: nn.Module, plan: Plan, optimizer: Any, example_inputs: Any) -> Conversion:
    refuse_wrapped(model)
    if optimizer is not None:
        check_optimizer(optimizer)
    old = {entry.name: _module_of(model, entry) for entry in plan.swapped}
    new = {entry.name: _build(old[entry.name], entry) for entry in plan.swapped}
    replacements = {old[name]: new[name] for name in new}
    _tell_of_others(model, plan)
    record = provenance_of(model)
    with Journal() as journal:
        _remove_activations(model, plan, journal)
        converted = replace_everywhere(model, replacements, journal)
        _wire(converted, plan, old, new, journal)
        if optimizer is not None:
            names = {parameter: name for name, parameter in converted.named_parameters()}
            move_optimizer(optimizer, replacements, journal, names)
        _record(converted, record, plan, old, journal)
        if example_inputs is not None and replacements:
            check_run(converted, example_inputs, replacements)
    # Nothing can fail any more: layers that are gone let go of what they were wired to.
    for module in replacements:
        recipe = recipe_of(module)
        if recipe is not None:
            recipe.let_go(module)
    return Conversion(converted, plan, new, plan.kept)


def _tell_of_others(model: nn.Module, plan: Plan) -> None:
    """A BatchNorm that a plan does not name stays, which its reader should know."""
    named = {name for entry in plan for name in entry.names}
    others = [
        names[0]
        for module, names in qualified_names(model).items()
        if norms.is_batchnorm(module) and not named.intersection(names)
    ]
    if others:
        _log.warning("%d BatchNorms are not in the plan and stay: %s", len(others), others[0])


def _module_of(model: nn.Module, entry: PlanEntry) -> nn.Module:
    try:
        module = model.get_submodule(entry.name)
    except AttributeError:
        module = None
    found = "no such module" if module is None else type(module).__name__
    if module is not None and norms.is_batchnorm(module) and found == entry.kind:
        norms.check_known(module, entry.name)
        channels = norms.channels_of(module)
        if channels == entry.channels:
            return module
        found = f"{channels} channels"
    hint = "a new plan for this model"
    if found == entry.kind:
        found += ", which nobody has declared to be a BatchNorm"
        hint = f"declaring it as before: --batchnorm 'package.module:{entry.kind}(…)'"
        hint += f" (normswap.register_batchnorm({entry.kind}, …))"
    raise SwapError(
        entry.name or "the model",
        got=found,
        need=f"the {entry.kind} of {entry.channels} channels that the plan was made for",
        hint=hint,
    )


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SwapError(
            name,
            got="no such module",
            need="the modules that the plan was made for",
            hint="a new plan for this model",
        ) from error


def _build(norm: nn.Module, entry: PlanEntry) -> nn.Module:
    assert entry.recipe is not None  # it is not kept
    taken = None if entry.removal is None else entry.removal.op
    new = entry.recipe.build(norm, rank=entry.rank, init=entry.init, activation=taken)
    return mark(new, entry.recipe.target)


def _remove_activations(model: nn.Module, plan: Plan, journal: Journal) -> None:
    calls: dict[str, dict[CallSite, str]] = defaultdict(dict)
    gone: dict[str, str] = {}
    for entry in plan.swapped:
        removal = entry.removal
        if removal is not None and removal.how == "call" and removal.call is not None:
            calls[removal.call.owner].setdefault(removal.call, removal.op)
        elif removal is not None:
            gone.update(dict.fromkeys(removal.names, removal.op))
    for owner, found in calls.items():
        module = _named(model, owner)
        try:
            journal.reclass(module, edited_class(module, found))
        except KeyError as error:
            raise SwapError(
                owner or "the model",
                got=f"no call at {error}",
                need="the place of the activation that the plan was made for",
                hint="a new plan for this model",
            ) from error
    identities: dict[nn.Module, nn.Identity] = {}
    modules = {n: m for m, names in qualified_names(model).items() for n in names}
    for name, op in gone.items():
        activation = modules.get(name)
        if activation is None or replaceable_op(activation) != op:
            raise SwapError(
                name,
                got="no such module" if activation is None else type(activation).__name__,
                need=f"the {REPLACEABLE[op]} that the plan was made for",
                hint="a new plan for this model",
            )
        identity = identities.setdefault(activation, nn.Identity())
        identity.training = activation.training
        put_at(model, name, identity, journal)


def _wire(
    model: nn.Module,
    plan: Plan,
    old: dict[str, nn.Module],
    new: dict[str, nn.Module],
    journal: Journal,
) -> None:
    number = 0
    for entry in plan.swapped:
        layer = new[entry.name]
        recipe = entry.recipe
        if entry.producer is not None and recipe is not None and recipe.wired:
            producer = _named(model, entry.producer)
            journal.on_undo(recipe.wire(layer, producer, norm=old[entry.name], init=entry.init))
            recipe.stagger(layer, number)
            number += 1


def _record(
    model: nn.Module, record: Provenance, plan: Plan, old: dict[str, nn.Module], journal: Journal
) -> None:
    if not plan.swapped:
        return
    found = {
        entry.name: statistics_of(
            norms.state_of(old[entry.name]),
            entry.recipe,
            entry.rank,
            None if entry.removal is None else entry.removal.op,
        )
        for entry in plan.swapped
        if entry.recipe is not None
    }
    known = {name: item for name, item in found.items() if item is not None}
    changed = replace(
        record,
        plans=(*record.plans, plan.to_json()),
        statistics={**record.statistics, **known},
    )
    journal.put(vars(model), "_normswap_provenance", changed)


__all__ = ["Conversion", "apply_plan", "convert"]
