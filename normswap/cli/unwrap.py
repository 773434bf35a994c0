"""``normswap unwrap``: weights and a few lines that do without normswap."""

from __future__ import annotations

from pathlib import Path

import click

from normswap.cli.console import print_json, say
from normswap.cli.options import ModelChoice, cli_command, force_option, json_option, model_options


@cli_command("unwrap")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder.")
@force_option
@json_option
@model_options
def command(*, chosen: ModelChoice, output: Path, force: bool, as_json: bool) -> None:
    """Write MODEL so that it loads without normswap.

    The folder gets model.py, whose build() returns the model, and model.pth, its weights. They need
    torch and the library that MODEL comes from, alone. The file is run once and compared.
    """
    import normswap

    source = chosen.load()
    normswap.unwrap(source.model, output, example_inputs=chosen.inputs(source), force=force)
    if as_json:
        print_json({"output": output})
        return
    say(f"wrote {output}: model.py and model.pth")
    say("next: from model import build  (in Python, in that folder; no normswap needed)")
