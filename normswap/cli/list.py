"""``normswap list``: which models there are, and how many BatchNorms they hold."""

from __future__ import annotations

import click

from normswap.cli.console import print_json, print_table, progress, say, suggest
from normswap.cli.options import cli_command, json_option
from normswap.errors import NormSwapError, SpecError
from normswap.progress import Progress

_COUNTED = 50  # a model is built for each count, about a third of a second


@cli_command("list")
@click.argument("pattern", default="")
@click.option(
    "--count", is_flag=True, help=f"Count BatchNorms however many match (else ≤ {_COUNTED})."
)
@json_option
def command(*, pattern: str, count: bool, as_json: bool) -> None:
    """List models, with their BatchNorm counts.

    PATTERN is part of a name, or a shell pattern such as 'timm/resnet*'; one with a dot in it looks
    at timm's weight tags too, such as 'resnet50.*'.
    """
    from normswap.sources import list_models

    names = list_models(pattern or None)
    if not names:
        raise SpecError(
            repr(pattern),
            got="no model of that name",
            need="part of a name or a shell pattern",
            hint="normswap list resnet",
        )
    counted = count or len(names) <= _COUNTED
    counts = _counts(names) if counted else dict.fromkeys(names)
    if as_json:
        print_json([{"model": name, "batchnorms": counts[name]} for name in names])
    elif counted:
        rows = [(name, "?" if number is None else number) for name, number in counts.items()]
        print_table(("model", "BatchNorms"), rows, numeric=("BatchNorms",))
    else:
        for name in names:
            say(name)
    if not as_json:
        suggest("inspect", names[0])


def _counts(names: list[str]) -> dict[str, int | None]:
    from normswap.sources import count_batchnorms

    counts: dict[str, int | None] = {}
    with progress("counting") as show:
        for number, name in enumerate(names, start=1):
            try:
                counts[name] = count_batchnorms(name)
            except NormSwapError:
                counts[name] = None  # a tag without weights, or a library that is too old for it
            show(Progress(number, len(names), name))
    return counts
