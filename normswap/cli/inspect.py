"""``normswap inspect``: every BatchNorm of a model and what each target would do there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.console import print_json, print_table, say, say_next
from normswap.cli.options import ModelChoice, cli_command, json_option, model_options
from normswap.targets import DEAD, TARGETS

if TYPE_CHECKING:
    from normswap.graph import Graph, Site
    from normswap.planning import Plan


@cli_command("inspect")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No layers of this name.")
@json_option
@model_options
def command(*, chosen: ModelChoice, exclude: tuple[str, ...], as_json: bool) -> None:
    """Show every BatchNorm of MODEL.

    What feeds it, what follows it, and where a target would become something else there.
    """
    import normswap

    source = chosen.load()
    inputs = chosen.inputs(source)
    graph = normswap.walk(source.model, inputs, exclude=exclude or None)
    plans = {
        target: normswap.plan(source.model, target, graph=graph)
        for target in TARGETS
        if target != "bn"
    }
    if as_json:
        print_json(
            {
                "model": chosen.spec,
                **graph.to_json(),
                "targets": {target: plan.to_json() for target, plan in plans.items()},
            }
        )
        return
    _print_sites(graph, plans)
    _print_targets(plans, graph.notes)
    for note in (*graph.notes, *(f"{other.name}: {other.reason}" for other in graph.others)):
        say(f"note: {note}")
    say_next("convert", *chosen.words(), "--to", "gn", "-o", "converted")


def _print_sites(graph: Graph, plans: Mapping[str, Plan]) -> None:
    print_table(
        ("name", "kind", "C", "map", "producer", "activation", "cannot take"),
        [_site_row(site, plans) for site in graph],
        title=f"{len(graph)} BatchNorm layers",
        numeric=("C", "map"),
        droppable=("kind", "activation", "producer", "cannot take"),
    )


def _site_row(site: Site, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
    size = "never ran" if site.spatial is None else "×".join(map(str, site.spatial)) or "none"
    producer = f"{site.producer.op} {site.producer.name}" if site.producer else site.no_producer
    return (
        " = ".join(name or "(root)" for name in site.names),
        site.kind,
        site.channels,
        size,
        producer,
        _activation(site),
        _exceptions(site, plans),
    )


def _activation(site: Site) -> str:
    if site.activation is None:
        return ""
    place = "fused" if site.activation.fused else site.activation.name or "functional"
    return f"{site.activation.op} ({place})"


def _exceptions(site: Site, plans: Mapping[str, Plan]) -> str:
    """The targets that would become something else here: ``gn, ln → frozen``."""
    others: dict[str, list[str]] = {}
    for target, plan in plans.items():
        for entry in plan.entries:
            if entry.name == site.name and entry.becomes != target:
                others.setdefault(entry.becomes, []).append(target)
    return "; ".join(f"{', '.join(targets)} → {becomes}" for becomes, targets in others.items())


def _print_targets(plans: Mapping[str, Plan], said: Collection[str]) -> None:
    """What is true of one target stands in its row, what is true of several below, once."""
    remarks = {target: list(_remarks(plan, said)) for target, plan in plans.items()}
    sharing: dict[str, list[str]] = {}
    for target, found in remarks.items():
        for remark in found:
            sharing.setdefault(remark, []).append(target)
    rows = []
    for target, plan in plans.items():
        taken = [entry for entry in plan.entries if entry.becomes == target]
        own = "; ".join(remark for remark in remarks[target] if len(sharing[remark]) == 1)
        rows.append((target, f"{len(taken)} of {len(plan.entries)}", own))
    print_table(("target", "layers", "remarks"), rows, title="What each target would do")
    for remark, targets in sharing.items():
        if len(targets) > 1:
            say(f"{'all' if len(targets) == len(plans) else ', '.join(targets)}: {remark}")


def _remarks(plan: Plan, said: Collection[str]) -> Iterator[str]:
    """What is special about a target in this model, each thing once.

    Not how many channels of each layer are dead: the plan's own notes count them.
    """
    removals = sum(entry.removal is not None for entry in plan.entries)
    if removals:
        yield f"takes the place of {removals} ReLUs"
    counts = Counter(
        f"{entry.reason} → {entry.becomes}" if entry.reason else note
        for entry in plan.entries
        for note in ([n for n in entry.notes if not n.endswith(DEAD)] or [""])
        if entry.reason or note
    )
    yield from (f"{number} × {remark}" for remark, number in counts.items())
    yield from (note for note in plan.notes if note not in said)
