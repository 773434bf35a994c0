"""``normswap unwrap``: weights and a few lines that do without normswap."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from normswap.cli.console import print_json, say, say_line
from normswap.cli.options import (
    ModelChoice,
    check_output,
    cli_command,
    force_option,
    json_option,
    model_options,
)


@cli_command("unwrap")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder.")
@force_option
@json_option
@model_options
def command(*, chosen: ModelChoice, output: Path, force: bool, as_json: bool) -> None:
    """Write MODEL so that it loads without normswap.

    The folder gets model.py, whose build() returns the model, and model.pth, its weights. They need
    torch and the library that MODEL comes from, alone. What is known of the images (mean, std,
    size, crop) and the names of the classes stand in model.py too. The file is run once and
    compared.
    """
    check_output(output, force=force)
    import normswap
    from normswap.provenance import provenance_of

    source = chosen.load()
    normswap.unwrap(source.model, output, example_inputs=chosen.inputs(source), force=force)
    if as_json:
        print_json({"output": output})
        return
    say(f"wrote {output}: model.py and model.pth; its model was run and gives what this one gives")
    record = provenance_of(source.model)
    known = {
        "PREPROCESSING": (record.preprocessing, "what images have to be"),
        "CLASS_NAMES": (record.class_names, "the names of its outputs"),
    }
    names = [name for name, (value, _) in known.items() if value]
    for name in names:
        say(f"model.py also has {name}: {known[name][1]}")
    code = f"import model; {''.join(f'print(model.{name}); ' for name in names)}model.build()"
    say_line(f"next: cd {shlex.quote(str(output))} && python -c {shlex.quote(code)}")
