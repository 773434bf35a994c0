"""``normswap export``: an ONNX file that is proven equal to the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.console import print_json, say, say_next
from normswap.cli.options import (
    ModelChoice,
    check_file,
    cli_command,
    force_option,
    json_option,
    model_options,
    skip_broken_option,
)
from normswap.cli.verify import print_parity
from normswap.errors import ParityError

if TYPE_CHECKING:
    from normswap.onnx import Parity


@cli_command("export")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file.")
@click.option("--opset", type=click.IntRange(18), default=20, show_default=True, help="ONNX opset.")
@click.option("--static-batch", is_flag=True, help="Fix the batch size at 1.")
@click.option("--dynamic-size", is_flag=True, help="Let height and width vary too.")
@click.option("--half", is_flag=True, help="float16, with the normalisers in float32.")
@click.option("--tolerance", type=float, help="Largest error that passes, of the output's scale.")
@click.option("--images", type=click.Path(path_type=Path), help="Prove it on these images too.")
@skip_broken_option
@click.option("--input-name", multiple=True, metavar="NAME", help="Input's name. [default: image]")
@click.option(
    "--output-name",
    multiple=True,
    metavar="NAME",
    help="Output's name, once per output. [default: logits, or the model's own keys]",
)
@click.option("--allow-mismatch", is_flag=True, help="Write the file even if the proof fails.")
@force_option
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    output: Path,
    images: Path | None,
    skip_broken: bool,
    input_name: tuple[str, ...],
    output_name: tuple[str, ...],
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write MODEL as a proven ONNX file.

    The proof runs onnxruntime beside torch at several batch sizes; of a detector, on several images
    one by one. If it fails, no file is written and the exit code is 3.
    """
    if skip_broken and images is None:
        raise click.UsageError("--skip-broken goes with --images.")
    check_file(output, force=force)
    source = chosen.load()
    batch = chosen.images(source, images, skip_broken=skip_broken) if images else None
    import normswap

    try:
        parity = normswap.export_onnx(
            source.model,
            output,
            example_inputs=chosen.inputs(source),
            images=batch,
            input_names=input_name or None,
            output_names=output_name or None,
            **options,
        )
    except ParityError as error:
        _report(getattr(error, "parity", None), None, as_json=as_json)
        raise
    _report(parity, output, as_json=as_json)


def _report(parity: Parity | None, file: Path | None, *, as_json: bool) -> None:
    """The proof, also where it failed and no file was written."""
    if parity is None:
        return
    if as_json:
        print_json({"file": file, **parity.to_json()})
        return
    print_parity(parity)
    if file is not None:
        say(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
        say_next("verify", file)
