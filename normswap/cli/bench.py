"""``normswap bench``: what each target costs beside BatchNorm, all in one run."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from normswap.cli.console import print_json, print_table, say, say_next
from normswap.cli.options import (
    ModelChoice,
    batch_size_option,
    cli_command,
    json_option,
    known_targets,
    model_options,
    targets_option,
)
from normswap.cli.tasks import TASKS
from normswap.targets import split_targets

if TYPE_CHECKING:
    from normswap.benchmark import Comparison, Ratio


def _split(ctx: click.Context, parameter: click.Parameter, value: str) -> dict[str, str]:
    """The callback of ``--to``: label → target, where version 0.1 wrote ``cbn:4``."""
    old = {
        name: re.sub(r"^((?:naive-)?cbn):(\d+)$", r"\1(window=\2)", name)
        for name in split_targets(value)
    }
    known_targets(ctx, parameter, ",".join(old.values()))
    return old


@cli_command("bench")
@targets_option(
    "gn,frn,brn,cbn(window=4),cbn(window=8)", "Settings stand in brackets.", callback=_split
)
@batch_size_option(2, "Images in a training step and an inference.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=15, show_default=True,
    help="Measurements of each; they take turns.",
)  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Measure torch.compile of each too.")
@click.option("--amp", type=click.Choice(["bf16", "fp16"]), help="Mixed precision.")
@click.option("--channels-last", is_flag=True, help="Keep images and weights in that order.")
@click.option("--no-onnx", is_flag=True, help="Leave onnxruntime out.")
@click.option(
    "--task",
    type=click.Choice(TASKS),
    help="detection: MODEL takes a list of images, and learns from boxes. [default: what it says]",
)
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    targets: dict[str, str],
    batch_size: int,
    rounds: int,
    compiled: bool,
    amp: str | None,
    channels_last: bool,
    no_onnx: bool,
    task: str | None,
    as_json: bool,
) -> None:
    """Measure what each target costs on MODEL.

    Training step, inference, memory and onnxruntime latency, as quartiles of the ratio to BatchNorm
    over rounds in which all variants take turns.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    from normswap.benchmark import compare, one_box_each
    from normswap.provenance import provenance_of
    from normswap.running import channels_last as put_last
    from normswap.running import put_channels_last
    from normswap.sources import architecture_of

    source = chosen.load()
    converted = provenance_of(source.model).plans
    model = architecture_of(source.model) if converted else source.model
    source = replace(source, task="detection") if task == "detection" else source
    inputs = source.example_inputs(batch_size, chosen.image_size, chosen.seed)
    detects = source.task == "detection"
    if detects and not no_onnx:
        logging.getLogger("normswap").info("a detector: onnxruntime is left out")
    if channels_last:
        put_channels_last(model)
        inputs = tree_map_only(torch.Tensor, put_last, inputs)
    found = compare(
        model,
        targets,
        inputs,
        rounds=rounds,
        compiled=compiled,
        onnx=not (no_onnx or detects),
        training_inputs=(inputs, one_box_each(inputs)) if detects else None,
        amp=amp,
        progress=lambda now: logging.getLogger("normswap").info(now.message),
    )
    if as_json:
        print_json({"model": chosen.spec, "batch_size": batch_size, **found.to_json()})
    else:
        _print(chosen.spec, batch_size, found)
        say_next(
            "recommend", *chosen.words(), "--data", "IMAGES", "--batch-size", batch_size,
        )  # fmt: skip


def _print(spec: str, batch_size: int, found: Comparison) -> None:
    columns = ("training step", "inference", "onnxruntime", "kept for backward", "extra state")
    base = found.rows[0].kept or 1
    print_table(
        ("target", *columns, "note"),
        [
            (
                f"{row.target}, compiled" if row.compiled else row.target,
                _quartiles(row.training),
                _quartiles(row.inference),
                _quartiles(row.onnx),
                f"{row.kept / base:.3f}" if row.kept else "",
                f"{row.state / 1e6:.1f} MB" if row.state else "",
                row.note,
            )
            for row in found.rows
        ],
        title=f"{spec}, batch {batch_size}, {found.device}: ratio to BatchNorm, quartiles of "
        f"{found.rounds} rounds",
        numeric=columns,
        droppable=("extra state", "kept for backward", "onnxruntime", "note"),
    )
    say(
        f"BatchNorm itself: {found.training_seconds * 1e3:.0f} ms a training step, "
        f"{found.inference_seconds * 1e3:.0f} ms an inference"
    )


def _quartiles(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.lower:.2f} {ratio.median:.2f} {ratio.upper:.2f}"
