"""``normswap demo``: the whole job on bundled data."""

from __future__ import annotations

from pathlib import Path

import click

from normswap.cli.console import print_json, print_table, say, say_next
from normswap.cli.options import check_output, cli_command, force_option, json_option

RESULTS = "results.json"  # what the tour leaves; a folder that holds it may be written over


@cli_command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="normswap-demo",
    show_default=True,
    help="Folder for what it makes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For all random numbers.")
@force_option
@json_option
def command(*, output: Path, seed: int, force: bool, as_json: bool) -> None:
    """Take the tour: no downloads, two minutes.

    Trains a small BatchNorm network, converts it to GroupNorm with and without moment matching,
    fine-tunes it at batch size 2, exports it to ONNX with proof, and compares.
    """
    check_output(output, force=force or (output / RESULTS).is_file())
    from normswap.tour import take_tour

    tour = take_tour(output, seed=seed)
    if as_json:
        print_json(tour.to_json())
        return
    print_table(
        ("stage", "accuracy", "of BN's", "ONNX error", "latency"),
        [
            (
                stage.name,
                f"{100 * stage.accuracy:.1f} %",
                f"{100 * stage.share:.1f} %",
                None if stage.onnx_error is None else f"{stage.onnx_error:.1e}",
                None if stage.latency_ms is None else f"{stage.latency_ms:.2f} ms",
            )
            for stage in tour.stages
        ],
        title="Handwritten digits, ResNet-20",
        numeric=("accuracy", "of BN's", "ONNX error", "latency"),
    )
    say(f"took {tour.seconds:.0f} s; everything is in {output}, the picture is {tour.picture}")
    say_next("predict", output / "gn.onnx", output / "digits" / "val" / "3")
