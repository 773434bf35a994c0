"""What a shell offers behind the cursor: targets, and models by name. No torch.

The names come from timm and torchvision, which take seconds to import; so they are kept in the
user's cache (``$XDG_CACHE_HOME/normswap``) under the versions of the two.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.errors import NormSwapError
from normswap.targets import TARGETS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_PREFIXES = ("timm/", "torchvision/", "hf-hub:", "python:")
_ARTEFACT = "normswap.json"


def complete_target(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The targets that begin so, each with its line; the last of several with commas."""
    from click.shell_completion import CompletionItem

    before, comma, last = incomplete.rpartition(",")
    return [
        CompletionItem(f"{before}{comma}{name}", help=meaning)
        for name, meaning in TARGETS.items()
        if name.startswith(last)
    ]


def complete_model(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Prefixes, then the names behind them, and folders that hold a converted model."""
    from click.shell_completion import CompletionItem

    if incomplete.startswith(_PREFIXES[:2]):
        return [CompletionItem(name) for name in model_names() if name.startswith(incomplete)]
    found = [prefix for prefix in _PREFIXES if prefix.startswith(incomplete)]
    folder = Path(incomplete if incomplete.endswith(os.sep) else os.path.dirname(incomplete))  # noqa: PTH120 - keeps "./"
    with contextlib.suppress(OSError):
        found += [
            str(path) if (path / _ARTEFACT).is_file() else f"{path}{os.sep}"
            for path in sorted(folder.iterdir())
            if path.is_dir() and str(path).startswith(incomplete) and path.name[0] != "."
        ]
    return [CompletionItem(text) for text in found]


def model_names() -> list[str]:
    """All that ``normswap list`` knows."""
    from normswap.whereabouts import cache

    key = " ".join(f"{name} {_version(name)}" for name in ("timm", "torchvision"))
    kept = cache("models.txt")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        first, *names = kept.read_text().splitlines()
        if first == key:
            return names
    try:
        from normswap.sources import list_models

        names = list_models(None)
    except (ImportError, NormSwapError):
        return []
    with contextlib.suppress(OSError, NormSwapError):
        from normswap.files import write_whole

        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, "\n".join([key, *names]))
    return names


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
