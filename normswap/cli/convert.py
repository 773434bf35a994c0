"""``normswap convert``: swap the BatchNorms of a model and write the result."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.completion import complete_target
from normswap.cli.console import print_json, print_table, progress, say, say_next
from normswap.cli.options import (
    ModelChoice,
    check_file,
    check_output,
    cli_command,
    force_option,
    json_option,
    known_fallback,
    known_target,
    model_options,
    report_option,
    skip_broken_option,
)
from normswap.cli.wording import without_arguments
from normswap.errors import PlanError
from normswap.reading import reading
from normswap.regular import read_text
from normswap.targets import FALLBACKS, STARTS, TARGETS

if TYPE_CHECKING:
    from torch import nn

    from normswap.calibration import Calibration
    from normswap.drift import Drift
    from normswap.planning import Plan, PlanEntry

_SETTINGS = {
    "groups": ("gn",),
    "window": ("cbn", "naive-cbn"),
    "through_history": ("cbn",),
}
"""What version 0.1 had in the place of ``gn(groups=16)``, and the targets that have it."""
_BESIDE_PLAN = ("init", "groups", "window", "through_history", "include", "exclude", "fallback")
"""Options that a plan has settled already."""
_SECONDS, _KEEP_SECONDS = 60.0, 180.0
_NOT_KEPT = ("calibrate_moves", "calibrate_all", "plan_file")
_CALIBRATION = ("calibrate_seconds", "calibrate_moves", "calibrate_all", "keep", "skip_broken")
_WIDTH = 76  # what click leaves of 80 columns, and does not fill by itself below a \\b
_TARGETS = "\n".join(
    [
        "\b\nTARGET is one of",
        *(
            textwrap.fill(
                meaning, _WIDTH, initial_indent=f"  {name:<10} ", subsequent_indent=" " * 13
            )
            for name, meaning in TARGETS.items()
        ),
        "Settings stand in brackets, as the plan prints them:",
        "gn(groups=16), brn(r_max=2, d_max=3).",
    ]
)


def _number_of_groups(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not (value.isdecimal() and int(value) > 0):
        raise click.BadParameter(f"got {value!r}; need a positive number or auto.")
    return int(value)


@cli_command("convert", epilog=_TARGETS)
@click.option(
    "--to",
    "target",
    callback=known_target,
    shell_complete=complete_target,
    metavar="TARGET",
    help="What BatchNorm becomes.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Apply a plan as --dry-run --json prints it, instead of --to.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--init",
    type=click.Choice(STARTS),
    default="match",
    show_default=True,
    help="Affine parameters: solved from BN's statistics (steady: after the convolutions before gn "
    "and ln are scaled by channel), BN's own, or 1 and 0.",
)
@click.option(
    "--groups",
    callback=_number_of_groups,
    hidden=True,
    help="Old spelling of --to 'gn(groups=N)'.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    hidden=True,
    help="Old spelling of --to 'cbn(window=N)'.",
)
@click.option(
    "--through-history",
    is_flag=True,
    default=None,
    hidden=True,
    help="Old spelling of --to 'cbn(through_history=True)'.",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Only layers of this name.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No layers of this name.")
@click.option(
    "--fallback",
    callback=known_fallback,
    metavar="|".join(FALLBACKS),
    help="What to do where the target cannot stand.",
)
@click.option(
    "--calibrate",
    "images",
    type=click.Path(path_type=Path),
    metavar="IMAGES",
    help="Bring the result closer to MODEL on a folder of unlabelled images.",
)
@skip_broken_option
@click.option(
    "--calibrate-seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Time for that [default: 60, with --keep 180].",
)
@click.option(
    "--calibrate-moves",
    type=click.Choice(("norms", "producers", "all")),
    help="What may move: the new layers, the convolutions in front of them too, or everything "
    "[default: producers where channels share statistics, else norms].",
)
@click.option(
    "--calibrate-all", is_flag=True, hidden=True, help="Old spelling of --calibrate-moves all."
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Convert as many layers as leave this share of MODEL's decisions on the images of "
    "--calibrate; the others become frozen, which needs no batch either.",
)
@report_option(
    "--costs",
    "With --keep: write what every layer costs by itself: a picture (.png), JSON (.json) or a "
    "table.",
)
@report_option(
    "--drift",
    "Write how far every layer is from the original: a picture (.png), JSON (.json) or a table. "
    "Measured with --calibrate, else predicted.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and change nothing.")
@force_option
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    target: str | None,
    plan_file: Path | None,
    output: Path | None,
    init: str,
    groups: int | str | None,
    window: int | None,
    through_history: bool | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    fallback: str | None,
    images: Path | None,
    skip_broken: bool,
    calibrate_seconds: float | None,
    calibrate_moves: str | None,
    calibrate_all: bool,
    keep: float | None,
    costs: Path | None,
    drift: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Swap MODEL's BatchNorms; write a directory.

    Every layer is planned before any is changed: --dry-run shows what becomes what, and why not.
    """
    _check_usage(click.get_current_context())
    _check_places(output if not dry_run else None, (drift, costs), force=force)
    import normswap

    settings = {"groups": groups, "window": window, "through_history": through_history}
    recipe = read_plan(plan_file) if plan_file else _with_old_options(str(target), settings)
    source = chosen.load()
    options: dict[str, Any] = {
        "example_inputs": chosen.inputs(source),
        "include": include or None,
        "exclude": exclude or None,
        "fallback": fallback,
        "init": init,
    }
    plan = _planned(source.model, recipe, options)
    if dry_run or output is None:  # the one excuse for having no output
        to = () if plan_file else ("--to", recipe)
        _show(plan, ("convert", *chosen.words(), *to, *_chosen_plan()), as_json=as_json)
        return
    if plan.idle is not None:
        raise plan.idle
    batch = chosen.images(source, images, skip_broken=skip_broken) if images else None
    asked = not (plan_file or as_json or images) and init == "match" and bool(_per_sample(plan))
    steadier = asked and _might_be_steadier(source.model, recipe, options)
    options["allow_nonfinite"] = chosen.allow_nonfinite
    report = None
    if keep is not None:
        share = (keep, calibrate_seconds or _KEEP_SECONDS, chosen.seed)
        result, found = _kept(source.model, recipe, options, batch, share)
    else:
        scope = "all" if calibrate_all else calibrate_moves
        work = (scope, calibrate_seconds or _SECONDS, chosen.seed)
        result, found, report = _converted(source.model, plan, options, batch, work)
    normswap.save(result.model, output, force=force)
    if drift is not None:
        found.write(drift)
    if costs is not None:
        result.write(costs)
    if as_json:
        facts = {"output": output, "plan": result.plan.to_json(), "kept": result.kept}
        calibration = report.to_json() if report else None
        facts |= {"drift": found.to_json(), "calibration": calibration}
        facts |= {} if keep is None else {"keep": result.to_json()}
        print_json(facts)
        return
    print_summary(result.plan)
    if keep is not None:
        _print_kept(result)
    _print_trust(result.plan, report, found, steadier=steadier)
    say("\n".join(f"wrote {file}" for file in (output, drift, costs) if file is not None))
    say_next(
        "finetune", output, *chosen.consent(), "--data", "DATA", "--batch-size", 2,
        "-o", f"{output}-tuned",
    )  # fmt: skip


def _per_sample(plan: Plan) -> list[PlanEntry]:
    """What is matched and not exact."""
    return [e for e in plan.swapped if e.recipe is not None and e.recipe.per_sample]


def _might_be_steadier(model: nn.Module, target: Any, options: dict[str, Any]) -> bool:
    """Whether there are producers that --init steady would scale."""
    return any(entry.scaled for entry in _planned(model, target, {**options, "init": "steady"}))


def _show(plan: Plan, words: tuple[Any, ...], *, as_json: bool) -> None:
    """A plan that is not applied, and the command that applies it."""
    if as_json:
        print_json(plan.to_json())
        return
    print_plan(plan)
    if plan.idle is None:
        say_next(*words, "-o", "converted")


def _chosen_plan() -> Iterator[object]:
    """The options that made a plan what it is, beside the target, as they were given."""
    context = click.get_current_context()
    for name in ("plan_file", "init", "include", "exclude", "fallback"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            value = context.params[name]
            for part in value if isinstance(value, tuple) else (value,):
                yield from (option, part)


def _planned(model: nn.Module, recipe: Any, options: dict[str, Any]) -> Plan:
    import normswap

    return recipe if isinstance(recipe, normswap.Plan) else normswap.plan(model, recipe, **options)


def _check_places(output: Path | None, pictures: tuple[Path | None, ...], *, force: bool) -> None:
    """Find out before long work whether the results can be written."""
    if output is not None:
        check_output(output, force=force)
        from normswap.artifact import check_target

        check_target(output, force=force)
    for file in pictures:
        if file is not None:
            check_file(file, force=force)


def _converted(
    model: nn.Module, plan: Plan, options: dict[str, Any], images: Any, work: tuple[Any, ...]
) -> tuple[Any, Drift, Calibration | None]:
    """Convert, and calibrate where there are images."""
    import normswap
    from normswap.copying import copied
    from normswap.drift import predict_drift
    from normswap.graph.norms import is_batchnorm

    teacher = None if images is None else copied(model)
    originals = {n: m for n, m in model.named_modules() if is_batchnorm(m)}
    result = normswap.convert(
        model,
        plan,
        example_inputs=options["example_inputs"],
        allow_nonfinite=options["allow_nonfinite"],
    )
    if teacher is None:
        return result, predict_drift(result.model, originals, plan), None
    scope, seconds, seed = work
    with progress("calibrating") as show:
        report: Calibration = normswap.calibrate(
            result.model,
            teacher,
            images,
            seconds=seconds,
            parameters=scope,
            seed=seed,
            progress=show,
        )
    return result, report.after, report


def _kept(
    model: nn.Module, target: Any, options: dict[str, Any], images: Any, work: tuple[Any, ...]
) -> tuple[Any, Drift]:
    """Convert what a share of the decisions allows."""
    import normswap
    from normswap.copying import copied
    from normswap.drift import measure_drift

    keep, seconds, seed = work
    teacher = copied(model)
    with progress("choosing layers") as show:
        result = normswap.convert(
            model,
            target,
            **options,
            keep=keep / 100,
            images=images,
            seconds=seconds,
            seed=seed,
            progress=show,
        )
    return result, measure_drift(result.model, teacher, images)


def _print_kept(result: Any) -> None:
    """The costs, the dearest last, and what is kept."""
    rows = [(*row[:2], row[2]) for row in result.rows]
    print_table(("layer", "became", "nats by itself"), rows, numeric=("nats by itself",))
    say(result.summary)


def _print_trust(plan: Plan, report: Calibration | None, drift: Drift, *, steadier: bool) -> None:
    """How far the result may be trusted as it is."""
    per_sample = _per_sample(plan)
    if report is not None:
        say(without_arguments(str(report)))
    elif not per_sample:
        say("in eval mode this is the original's function, to rounding")
        return
    elif any(entry.init != "match" for entry in per_sample):
        say("warning: nothing was matched: expect to train it like a new network")
        return
    warning = drift.warned("fine-tuning" if report else "calibration or fine-tuning")
    if warning:
        say(f"warning: {warning}")
        if steadier:
            say(
                "without images --init steady comes nearer (47 % of EfficientNet-Lite0's decisions "
                "in place of 34 %)"
            )


def _check_usage(context: click.Context) -> None:
    """Refuse options that contradict each other or would do nothing."""
    values = context.params
    if (values["target"] is None) == (values["plan_file"] is None):
        raise click.UsageError("Give either --to TARGET or --plan FILE.")
    if values["output"] is None and not values["dry_run"]:
        raise click.UsageError("Missing option '-o' (or --dry-run to print the plan only).")
    for name, partner in _without_effect(values):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            raise click.UsageError(f"{option} goes with {partner}.")


def _without_effect(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The options that do nothing here, and what they go with."""
    if values["plan_file"] is not None:
        yield from ((name, "--to TARGET; a plan has settled it") for name in _BESIDE_PLAN)
    if values["dry_run"]:
        yield from ((name, "-o, not with --dry-run") for name in ("drift", "images"))
    if values["images"] is None:
        yield from ((name, "--calibrate IMAGES") for name in _CALIBRATION)
    if values["keep"] is None:
        yield "costs", "--keep PERCENT"
    else:
        yield from ((name, "--calibrate IMAGES, not with --keep") for name in _NOT_KEPT)
    for name, targets in _SETTINGS.items():
        if values["target"] not in targets:
            yield name, f"--to {' or '.join(targets)}, not with --to {values['target']}"


def _with_old_options(target: str, settings: dict[str, Any]) -> str:
    """The target, with what an old option says of it."""
    given = [f"{name}={value}" for name, value in settings.items() if value is not None]
    return f"{target}({', '.join(given)})" if given else target


def read_plan(path: Path) -> Plan:
    """Read what ``--dry-run --json`` printed.

    Raises:
        PlanError: no such file, or it holds no plan.
    """
    from normswap.planning import Plan

    hint = "the output of `normswap convert MODEL --to TARGET --dry-run --json`"
    with reading(path, PlanError, need="a plan in JSON", hint=hint):
        return Plan.from_json(json.loads(read_text(path)), where=f"{path}, plan")


def print_plan(plan: Plan) -> None:
    """Every layer of a plan, one row each."""
    rows = [
        (
            entry.name or "(root)",
            entry.kind,
            entry.channels,
            entry.becomes,
            _settings(entry),
            "; ".join(text for text in (entry.reason, *entry.notes) if text),
        )
        for entry in plan.entries
    ]
    columns = ("name", "is", "C", "becomes", "with", "remarks")
    title = f"{len(rows)} BatchNorm layers, target {plan.target}"
    droppable = ("is", "with", "remarks")
    print_table(columns, rows, title=title, numeric=("C",), droppable=droppable)
    for note in plan.notes:
        say(f"note: {note}")


def _settings(entry: PlanEntry) -> str:
    """What a user would want to know of the recipe, the wiring and the activation."""
    from normswap.graph.vocabulary import REPLACEABLE

    recipe = entry.recipe
    settings = {} if recipe is None else recipe.to_json()
    parts = [f"{k}={v}" for k, v in settings.items() if k != "target" and v not in (None, False)]
    if recipe is not None and recipe.per_sample:
        parts.append(f"init={entry.init}")
    if entry.producer:
        parts.append(f"wired to {entry.producer}")
    if entry.removal:
        parts.append(f"takes the {REPLACEABLE[entry.removal.op]}'s place")
    return ", ".join(parts)


def print_summary(plan: Plan) -> None:
    """What became what and why, counted."""
    counts = Counter(
        (e.kind, e.becomes if e.recipe is None else e.recipe.short, e.reason or "")
        for e in plan.entries
    )
    rows = [(number, *what) for what, number in counts.most_common()]
    columns = ("layers", "were", "became", "because")
    print_table(columns, rows, numeric=("layers",), droppable=("because",))
    for note in plan.notes:
        say(f"note: {note}")
