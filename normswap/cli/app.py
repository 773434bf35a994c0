"""The command group: commands are imported when they are asked for, and errors end here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import click

import normswap
from normswap.cli.boundary import exit_code
from normswap.cli.console import forgiving
from normswap.cli.options import debug_option

COMMANDS = (
    "list", "inspect", "recommend", "convert", "finetune", "evaluate", "predict", "export",
    "verify", "sweep", "bench", "unwrap", "push", "demo",
)  # fmt: skip
"""In the order of the help text; each is ``command`` in the file of its name."""


class Commands(click.Group):
    """A group that imports a command's file when the command is first asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """All names, in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the file of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"normswap.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, with the nearest names where there is no such command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1, cutoff=0.4) or COMMANDS
            ctx.fail(f"got the command {args[0]!r}; did you mean {', '.join(near)}?")
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and turn every exception into one line and an exit code."""
        forgiving(sys.stdout, sys.stderr)
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, False, **extra)
        sys.exit(
            exit_code(
                lambda: super(Commands, self).main(
                    arguments, prog_name or "normswap", complete_var, False, **extra
                ),
                debug="--debug" in arguments,
            )
        )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(normswap.__version__, prog_name="normswap", message="%(prog)s %(version)s")
def app() -> None:
    """Swap a model's BatchNorm for a normaliser that works at batch size 1 to 8.

    \b
    MODEL is one of
      timm/NAME[.TAG]                 timm/resnet50.a1_in1k
      torchvision/NAME[:WEIGHTS]      torchvision/resnet50:IMAGENET1K_V2
      hf-hub:ORG/REPO                 hf-hub:timm/resnet18.a1_in1k
      python:PACKAGE.MODULE:FACTORY   python:mine.models:defect_net
      DIR                             what `normswap convert -o DIR` wrote

    Results go to stdout (with --json: JSON alone), progress and messages to stderr. Exit codes:
    0 done, 1 error, 2 wrong usage, 3 the ONNX file is not the model, 130 interrupted.
    """  # noqa: D301 - click reads the backspace as "do not wrap"


app.params.append(debug_option())


def main() -> None:
    """The console script ``normswap``."""
    app()
