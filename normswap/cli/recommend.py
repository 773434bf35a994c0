"""``normswap recommend``: which target, on this model, these images, this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.cli.console import print_json, print_table, progress, say, say_next
from normswap.cli.options import (
    ModelChoice,
    batch_size_option,
    check_file,
    cli_command,
    force_option,
    json_option,
    model_options,
    report_option,
    skip_broken_option,
    targets_option,
)

if TYPE_CHECKING:
    from normswap.recommendation import Recommendation


@cli_command("recommend")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="IMAGES",
    help="A folder of your images, at any depth; labels are not looked at.",
)
@skip_broken_option
@batch_size_option(2, "Images in a training step.")
@targets_option(
    "gn,frn,brn,cbn,frozen", "What is compared; settings stand in brackets: gn(groups=16)."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=90.0,
    show_default=True,
    help="Time for all of it, once the model and the images are read.",
)
@report_option("--picture", "Write what was measured: a picture (.png), JSON (.json) or a table.")
@force_option
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    data: Path | None,
    skip_broken: bool,
    batch_size: int,
    targets: tuple[str, ...],
    seconds: float,
    picture: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Say which target suits MODEL, your images and a batch size.

    Measured on this machine, without training: what each target keeps, what it costs, and what
    BatchNorm's own statistics do at that batch size. The answer may be to keep BatchNorm.
    """
    if picture is not None:
        check_file(picture, force=force)
    if skip_broken and data is None:
        raise click.UsageError("--skip-broken goes with --data IMAGES.")
    import normswap

    source = chosen.load()
    images = chosen.images(source, data, skip_broken=skip_broken) if data else None
    with progress("recommend") as show:
        found = normswap.recommend(
            source.model,
            images,
            batch_size=batch_size,
            targets=targets,
            example_inputs=chosen.inputs(source),
            seconds=seconds,
            seed=chosen.seed,
            progress=show,
        )
    if picture is not None:
        found.write(picture)
    if as_json:
        print_json({"model": chosen.spec, **found.to_json()})
        return
    _print(chosen.spec, found)
    if picture is not None:
        say(f"wrote {picture}")
    say_next(*_next(chosen, found, data))


def _print(spec: str, found: Recommendation) -> None:
    from normswap.recommendation import COLUMNS

    size = "×".join(map(str, found.image))
    print_table(
        COLUMNS,
        found.rows(),
        title=f"{spec}, batch {found.batch_size} of {size}",
        numeric=COLUMNS[1:-1],
        droppable=("error", "state", "memory", "matched"),
    )
    say(
        "error: predicted, median layer; matched, calibrated: decisions of the original kept, "
        "of so many images; training, inference: time beside BatchNorm"
    )
    if found.effect is not None and found.effect.sites:
        say(
            f"BatchNorm on {found.effect.images} images: their means lie {found.effect.shift:.2f} "
            f"running standard deviations from the running ones; means of batches of "
            f"{found.batch_size} spread by {found.effect.noise:.2f} (medians over the layers)"
        )
    for sentence in found.unknown:
        say(f"note: {sentence}")
    say(f"recommended{'' if found.firm else ', not firmly'}: {found.target}: {found.reason}")
    if found.over:
        say(f"note: {found.over}")


def _next(chosen: ModelChoice, found: Recommendation, data: Path | None) -> Iterator[object]:
    """The line to run."""
    name = chosen.short_name
    if found.target == "bn":
        folder = "DATA" if data is None else data
        yield from ("finetune", *chosen.words(), "--data", folder)
        yield from ("--batch-size", found.batch_size, "-o", f"{name}-tuned")
        return
    yield from ("convert", *chosen.words(), "--to", found.target)
    if any(o.target == found.target and o.per_sample for o in found.options):
        yield from ("--calibrate", "IMAGES" if data is None else data)
    yield from ("-o", f"{name}-{found.target.partition('(')[0]}")
