"""Decide, per site, what becomes what and why not. Reads models, never changes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normswap import running
from normswap.errors import PlanError
from normswap.graph import (
    Graph,
    Removal,
    Site,
    matches,
    norms,
    qualified_names,
    scalable,
    walk,
)
from normswap.graph.numbers import dead_channels
from normswap.graph.vocabulary import REPLACEABLE
from normswap.planning.document import KEEP, Plan, PlanEntry
from normswap.provenance import provenance_of
from normswap.recipes import FrozenBatchNorm, Recipe, recipe_for
from normswap.recipes.base import has_statistics, looks_fresh
from normswap.targets import DEAD, FALLBACKS, STARTS

Target = str | Recipe | Mapping[str, "str | Recipe"]
Patterns = str | Sequence[str] | None


def plan(
    model: nn.Module,
    target: Target,
    *,
    example_inputs: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    fallback: str | Recipe | None = None,
    init: str = "match",
    graph: Graph | None = None,
    frozen: Mapping[str, str] | None = None,
    costs: Mapping[str, float] | None = None,
) -> Plan:
    """Say what would become what, and why not. Read-only.

    Args:
        model: any module, also on the meta device.
        target: a target, as in ``gn`` or ``gn(groups=16)``, a recipe, or a mapping from name
            patterns to either (the first pattern that matches counts; sites that no pattern
            matches are kept).
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments. May be left out for models from ``load_model``.
        include: shell-style patterns of the BatchNorm names to convert; None: all.
        exclude: patterns of names to leave alone.
        fallback: what a site becomes that the target cannot take: ``frozen``, ``keep``, ``brn``,
            ``gn`` (with settings, if wanted), ``error``, or a recipe. None: ``frozen`` for the
            per-sample targets, ``brn`` for cbn, ``keep`` otherwise.
        init: ``match`` (keep the pretrained function), ``steady`` (a match too, for which the
            convolutions before gn and ln are scaled by channel, so that what a sample does to its
            group's statistics is little), ``copy`` (γ and β as they are) or ``reset`` (1 and 0);
            it concerns the per-sample targets only.
        graph: what :func:`normswap.walk` said of this model, if it was walked already.
        frozen: sites that become ``frozen`` whatever their target, and why.
        costs: what the conversion of each site alone was found to cost, to be written down.

    Raises:
        PlanError: unknown target, fallback or init; a pattern that matches nothing; a model
            without BatchNorm; a recipe that does not fit a site; ``fallback="error"`` and a site
            that the target cannot take.
        WalkError: the model cannot be run or understood.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(plan(net, "gn", example_inputs=torch.zeros(1, 3, 8, 8)))
        Plan to gn: 1 BatchNorm layers: 1 gn
          1  BatchNorm2d(8) → gn(groups=4, max_groups=32, eps=1e-05)
    """
    choice = _Choice(target, fallback)
    _check_init(init)
    if graph is None:
        graph = walk(model, inputs_for(model, example_inputs), exclude=exclude)
    else:
        graph = replace(graph, sites=tuple(s for s in graph if not matches(s.names, exclude)))
    every = qualified_names(model)
    left_alone = (*_left_alone(every, graph), *_unreachable(graph))
    names = [site.names for site in graph] + [entry.names for entry in left_alone]
    if not names:
        record = provenance_of(model)
        done = ", ".join(str(applied.get("target")) for applied in record.plans)
        spec = (record.source or {}).get("spec", "its BatchNorm original")
        raise PlanError(
            "the model",
            got=f"one that is converted already, to {done}" if done else "no BatchNorm layer",
            need="at least one BatchNorm",
            hint=f"starting from {spec}" if done else "another model",
        )
    _check_patterns(names, include, "include")
    _check_patterns(names, exclude, "exclude")
    choice.check_patterns(names)
    modules = {n: m for m, found in every.items() for n in found}
    planner = _Planner(model, modules, choice, include, init, frozen or {})
    entries = [_with_cost(entry, costs or {}) for entry in _settle_removals(graph, planner)]
    entries = [*entries, *left_alone]
    return Plan(choice.label, tuple(entries), (*graph.notes, *_notes(entries, modules)))


class _Choice:
    """Which recipe a site is to get, and which if that one refuses."""

    def __init__(self, target: Target, fallback: str | Recipe | None) -> None:
        if isinstance(target, Mapping):
            self.rules = [(pattern, recipe_for(wanted)) for pattern, wanted in target.items()]
            self.mixed = True
        else:
            self.rules = [("*", recipe_for(target))]
            self.mixed = False
        self._asked = target
        if isinstance(fallback, str) and fallback.partition("(")[0].strip() not in FALLBACKS:
            raise PlanError(
                "fallback",
                got=repr(fallback),
                need="one of " + ", ".join(FALLBACKS) + ", or a recipe",
                hint="--fallback frozen (fallback='frozen')",
            )
        self.fallback = fallback

    @property
    def label(self) -> str:
        if isinstance(self._asked, Mapping):
            words = (f"{pattern}: {_in_words(wanted)}" for pattern, wanted in self._asked.items())
            return ", ".join(words)
        return _in_words(self._asked)

    def check_patterns(self, names: list[tuple[str, ...]]) -> None:
        if self.mixed:
            _check_patterns(names, [pattern for pattern, _ in self.rules], "target")

    def recipe(self, site: Site) -> Recipe | None:
        found = (recipe for pattern, recipe in self.rules if matches(site.names, pattern))
        return next(found, None) if self.mixed else self.rules[0][1]

    @property
    def open(self) -> bool:
        """Whether every recipe falls back as it does by itself."""
        return self.fallback is None

    def fallback_for(self, recipe: Recipe) -> str | Recipe:
        return recipe.fallback if self.fallback is None else self.fallback


def _in_words(target: str | Recipe) -> str:
    return target.strip() if isinstance(target, str) else target.target


class _Planner:
    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        choice: _Choice,
        include: Patterns,
        init: str,
        frozen: Mapping[str, str],
    ) -> None:
        self._model = model
        self._modules = modules
        self._choice = choice
        self._include = include
        self._steady = init == "steady"
        self._init = "match" if self._steady else init
        self._frozen = frozen

    def entry(self, site: Site) -> PlanEntry:
        if self._include is not None and not matches(site.names, self._include):
            return _kept(site, "not included")
        recipe = self._choice.recipe(site)
        if recipe is None:
            return _kept(site, "no pattern of the target matches it")
        if site.mixed:
            return _kept(site, "its inputs have different numbers of dimensions")
        refusal = recipe.refusal(site, self._model)
        if refusal is None and site.name in self._frozen:
            return self._entry_for(site, FrozenBatchNorm(), self._frozen[site.name])
        if refusal is None:
            return self._entry_for(site, recipe, None)
        return self._fall_back(site, recipe, f"no {recipe.target}: {refusal}")

    def _fall_back(self, site: Site, recipe: Recipe, reason: str) -> PlanEntry:
        fallback = self._choice.fallback_for(recipe)
        if fallback == "error":
            raise PlanError(
                site.name,
                got=reason,
                need=f"a site that {recipe.target} can take",
                hint="--fallback frozen (fallback='frozen') or "
                f"--exclude '{site.name}' (exclude={site.name!r})",
            )
        if fallback == KEEP or site.calls == 0:
            return _kept(site, reason)
        second = recipe_for(fallback)
        refusal = second.refusal(site, self._model)
        if refusal is None:
            return self._entry_for(site, second, reason)
        reason = f"{reason}; no {second.target}: {refusal}"
        # only a default goes on to the next: what a user names is all that he wants
        return self._fall_back(site, second, reason) if self._choice.open else _kept(site, reason)

    def _entry_for(self, site: Site, recipe: Recipe, reason: str | None) -> PlanEntry:
        settled = recipe.settle(site, self._modules[site.name])
        return PlanEntry(
            names=site.names,
            kind=site.kind,
            channels=site.channels,
            rank=site.rank,
            becomes=settled.target,
            recipe=settled,
            init=self._init,
            reason=reason,
            notes=(*site.notes, *self._dead(site), *settled.warnings(site, init=self._init)),
            producer=site.producer.name if settled.wired and site.producer else None,
            scaled=self._scaled(site, settled),
        )

    def _scaled(self, site: Site, settled: Recipe) -> str | None:
        """The producer whose scale the norm's channels share, where statistics say what it is."""
        norm = self._modules[site.name]
        state = norms.state_of(norm)
        if not self._steady or not has_statistics(state) or looks_fresh(state):
            return None
        groups = settled.sharing_at(state)
        shared = groups is not None and groups < state.channels
        return scalable(site, norm, self._model) if shared else None

    def _dead(self, site: Site) -> tuple[str, ...]:
        count = dead_channels(self._modules[site.name])
        return (f"{count} of {site.channels} {DEAD}",) if count else ()

    def with_removal(self, entry: PlanEntry, site: Site, removal: Removal | None) -> PlanEntry:
        """The entry with the activation that its layer takes, or why it takes none."""
        recipe = entry.recipe
        if recipe is None or not recipe.takes:
            return entry
        if removal is not None:
            return replace(entry, removal=removal)
        why = _without_removal(recipe, site)
        if not recipe.insists:
            return replace(entry, notes=(*entry.notes, why))
        instead = self._fall_back(site, recipe, why)
        again = instead.recipe is not None and instead.recipe.insists
        return _kept(site, why) if again else instead


def _with_cost(entry: PlanEntry, costs: Mapping[str, float]) -> PlanEntry:
    return replace(entry, cost=costs[entry.name]) if entry.name in costs else entry


def _kept(site: Site, reason: str) -> PlanEntry:
    return PlanEntry(
        names=site.names,
        kind=site.kind,
        channels=site.channels,
        rank=site.rank,
        becomes=KEEP,
        reason=reason,
        notes=site.notes,
    )


def _settle_removals(graph: Graph, planner: _Planner) -> list[PlanEntry]:
    """Decide which activations the new layers replace.

    An activation may be fed by several BNs (a module or a line of code used in a loop); it can go
    only if all of them get a layer that takes it. So start from every BN that might, and drop those
    that cannot until nothing changes.
    """
    entries = {site.name: planner.entry(site) for site in graph}
    sites = {site.name: site for site in graph}
    willing = {name for name, entry in entries.items() if _may_take(entry, sites[name])}
    while True:
        chosen = {name: _removal(sites[name], willing) for name in willing}
        closed = {name for name, removal in chosen.items() if removal is None}
        if not closed:
            break
        willing -= closed
    return [
        planner.with_removal(entry, sites[name], chosen.get(name))
        for name, entry in entries.items()
    ]


def _may_take(entry: PlanEntry, site: Site) -> bool:
    taken = site.activation is not None and site.activation.op
    return entry.recipe is not None and taken in entry.recipe.takes


def _removal(site: Site, willing: set[str]) -> Removal | None:
    assert site.activation is not None
    open_ways = (r for r in site.activation.ways if r.obstacle is None)
    return next((r for r in open_ways if willing.issuperset(r.feeders)), None)


def _without_removal(recipe: Recipe, site: Site) -> str:
    """Why an activation stays that ``recipe`` would take."""
    found = site.activation
    if found is None or found.op not in recipe.takes:
        wanted = " or ".join(REPLACEABLE[op] for op in sorted(recipe.takes))
        return f"no {recipe.takes_as}: no {wanted} alone consumes its output"
    obstacles = [r.obstacle for r in found.ways if r.obstacle]
    why = obstacles[-1] if obstacles else "it serves others too"
    return f"no {recipe.takes_as}: the {REPLACEABLE[found.op]} stays, {why}"


def _check_init(init: str) -> None:
    if init not in STARTS:
        raise PlanError(
            "init",
            got=repr(init),
            need="one of " + ", ".join(STARTS),
            hint="--init match (init='match')",
        )


def _left_alone(every: dict[nn.Module, tuple[str, ...]], graph: Graph) -> tuple[PlanEntry, ...]:
    walked = {name for site in graph for name in site.names}
    return tuple(
        PlanEntry(
            names=names,
            kind=type(module).__name__,
            channels=norms.channels_of(module),
            rank=norms.spatial_rank_of(module),
            becomes=KEEP,
            reason="excluded",
        )
        for module, names in every.items()
        if norms.is_batchnorm(module) and walked.isdisjoint(names)
    )


def _unreachable(graph: Graph) -> tuple[PlanEntry, ...]:
    """What normalises as a BatchNorm does and cannot be replaced is named all the same."""
    return tuple(
        PlanEntry(
            names=(other.name,),
            kind=other.kind,
            channels=other.channels,
            rank=other.rank,
            becomes=KEEP,
            reason=other.reason,
        )
        for other in graph.others
    )


def _notes(entries: list[PlanEntry], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    return (*_notes_on_dead_channels(entries, modules), *_notes_on_fallbacks(entries))


def _notes_on_dead_channels(
    entries: list[PlanEntry], modules: dict[str, nn.Module]
) -> tuple[str, ...]:
    """A channel that never varied gives β under BatchNorm; from its own statistics it may wake."""
    swapped = [entry for entry in entries if entry.recipe is not None]
    dead = {entry.name: dead_channels(modules[entry.name]) for entry in swapped}
    dead = {name: count for name, count in dead.items() if count}
    if not dead:
        return ()
    total = sum(entry.channels for entry in swapped if entry.name in dead)
    first = ", ".join(list(dead)[:3]) + (", …" if len(dead) > 3 else "")
    layers = "1 layer" if len(dead) == 1 else f"{len(dead)} layers"
    return (
        f"{sum(dead.values())} of {total} channels are dead (running variance 0) in {layers}: "
        f"{first}",
    )


def _notes_on_fallbacks(entries: list[PlanEntry]) -> tuple[str, ...]:
    """What private training (Opacus) needs to know of a per-sample conversion."""
    fallen = [e.recipe for e in entries if e.recipe is not None and e.reason is not None]
    count = sum(recipe.buffers_beside_parameters for recipe in fallen)
    if not count or not any(e.recipe is not None and e.recipe.per_sample for e in entries):
        return ()
    layers = "1 layer keeps" if count == 1 else f"{count} layers keep"
    return (
        f"{layers} trainable γ and β beside running statistics, which Opacus does not take: as the "
        "fallback it takes frozen(trainable=False), in Python FrozenBatchNorm(trainable=False)",
    )


def _check_patterns(names: list[tuple[str, ...]], patterns: Patterns, option: str) -> None:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if not any(matches(found, pattern) for found in names):
            nested = f"{pattern}.*"
            hint = nested if any(matches(n, nested) for n in names) else names[0][0] or "*"
            raise PlanError(
                option,
                got=f"{pattern!r}, which matches none of {len(names)} BatchNorm layers",
                need="a name or a shell-style pattern of names",
                hint=repr(hint),
            )


def inputs_for(model: nn.Module, example_inputs: Any) -> Any:
    """What to call ``model`` with: what was given, or zeros of the size that it remembers."""
    if example_inputs is not None:
        return example_inputs
    record = provenance_of(model)
    if record.preprocessing is not None:
        size, task = record.preprocessing["input_size"], (record.source or {}).get("task", "image")
        return running.example_inputs(model, lambda: torch.zeros(1, *size), str(task))
    raise PlanError(
        "example_inputs",
        got="None",
        need="what the model is called with",
        hint="example_inputs=torch.zeros(1, 3, 224, 224)",
    )


__all__ = ["Plan", "PlanEntry", "inputs_for", "plan"]
