"""``normswap push``: an artefact to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from normswap.cli.console import print_json, print_table, say, say_next
from normswap.cli.options import cli_command, json_option


@cli_command("push")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private/--public", default=None, help="Of a new repository [default: the hub's].")
@click.option("--revision", metavar="BRANCH", help="Branch to push to [default: the main one].")
@click.option("--dry-run", is_flag=True, help="Show files and card; ask no network.")
@json_option
def command(
    *,
    directory: Path,
    repo: str,
    private: bool | None,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload DIRECTORY to the Hugging Face Hub.

    A directory that normswap wrote: its three files and no others, in one commit. The token is the
    one of `hf auth login` or HF_TOKEN.
    """
    from normswap.artifact import push_to_hub

    found = push_to_hub(directory, repo, private=private, revision=revision, dry_run=dry_run)
    if as_json:
        print_json(found.to_json())
        return
    rows = [(name, f"{size / 1e6:.2f} MB") for name, size in found.files.items()]
    print_table(("file", "size"), rows, title=found.spec, numeric=("size",))
    if dry_run:
        say(found.card)
        say_next("push", directory, repo)
        return
    say(f"uploaded: {found.url}")
    say_next("inspect", found.spec if revision is None else f"{found.spec}@{revision}")
