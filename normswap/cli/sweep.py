"""``normswap sweep``: accuracy against batch size, per target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.cli.console import print_json, print_table, progress, say, say_next
from normswap.cli.options import (
    ModelChoice,
    check_device,
    check_parent,
    cli_command,
    json_option,
    keep_others_out,
    model_options,
    targets_option,
)
from normswap.cli.tasks import metric_name
from normswap.cli.training import RunChoice, run_options
from normswap.errors import NormSwapError

if TYPE_CHECKING:
    from torch import nn


def _sizes(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    sizes = value.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise click.BadParameter(f"got {value!r}; need numbers such as 1,2,4.")
    return tuple(sorted({int(size) for size in sizes}))


@cli_command("sweep")
@targets_option(
    "bn,gn,frn,brn,cbn", "bn is the control; settings stand in brackets: gn(groups=16)."
)
@click.option(
    "--batch-sizes",
    callback=_sizes,
    default="1,2,4,8,16,32",
    show_default=True,
    metavar="N,…",
    help="Samples per forward.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs per cell."
)
@click.option("--from-scratch", is_flag=True, help="From random weights, not from MODEL's.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("normswap-sweep"),
    show_default=True,
    help="Directory for cells, table and picture; what is done there is not done again.",
)
@run_options
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    run: RunChoice,
    targets: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    seeds: int,
    from_scratch: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Measure accuracy against batch size, per target.

    Every cell starts from MODEL and sees the same number of samples, but for a lone last one that
    a batch of several leaves out; the learning rate grows with the batch size. --lr holds at the
    largest batch size.
    """
    check_parent(output)
    keep_others_out(output)
    from normswap.sweeps import PICTURE, sweep

    source = chosen.load()
    _check_original(chosen.spec, source.model)
    images = run.open(source, chosen.image_size, chosen.seed)
    options = run.options(
        batch_size=max(batch_sizes),
        seed=chosen.seed,
        device=check_device(chosen.device) if chosen.device else None,
    )
    with progress("sweep") as show:
        found = sweep(
            source.model,
            images.train,
            images.val,
            targets=targets,
            batch_sizes=batch_sizes,
            seeds=range(chosen.seed, chosen.seed + seeds),
            options=options,
            from_scratch=from_scratch,
            example_inputs=chosen.inputs(source),
            out=output,
            progress=show,
            task=images.task,
        )
    failed = [cell for cell in found.cells if cell.failure]
    if as_json:
        print_json({"output": output, **found.to_json()})
        click.get_current_context().exit(1 if len(failed) == len(found.cells) else 0)
    heading, *rows = found.rows()
    measured = metric_name(images.task)
    print_table(heading, rows, title=f"{measured} in % by batch size", numeric=heading[1:])
    for cell in failed:
        say(f"{cell.name} failed: {cell.failure}")
    if len(failed) == len(found.cells):
        click.get_current_context().exit(1)
    if found.recommendation is not None:
        say(f"recommended {found.recommendation}")
    say(f"the picture is {output / PICTURE}")
    best = max(found.targets, key=lambda target: found.point(target, batch_sizes[0]).mean or 0.0)
    say(f"best at batch {batch_sizes[0]}: {best}")
    if best == "bn":
        how = ("--data", run.images.data, "--batch-size", batch_sizes[0])
        say_next("finetune", *chosen.words(), *how, "-o", f"{chosen.short_name}-tuned")
    else:
        folder = f"{chosen.short_name}-{best.partition('(')[0]}"
        say_next("convert", *chosen.words(), "--to", best, "-o", folder)


def _check_original(spec: str, model: nn.Module) -> None:
    """Every cell starts from BatchNorm, which a per-sample conversion cannot give back."""
    from normswap.graph import batchnorms
    from normswap.provenance import provenance_of

    record = provenance_of(model)
    if record.plans and not batchnorms(model):
        raise NormSwapError(
            spec,
            got="a model whose BatchNorms have been replaced",
            need="its BatchNorm original",
            hint=str((record.source or {}).get("spec", "the spec that it was made from")),
        )
