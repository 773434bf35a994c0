"""Where checkpoints lay, known to this machine alone.

An artefact names its checkpoint without a folder, so that no path leaves the machine. So that the
original can be had again all the same, its place is kept in the user's cache
(``$XDG_CACHE_HOME/normswap``), by the hash of the weights. It is a hint and no more: what lies
there is hashed before it is believed, and nothing fails where no cache can be kept.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from normswap.errors import BusyError
from normswap.files import write_whole
from normswap.regular import read_text

_MOST = 500


def note_checkpoint(digest: str, path: str | Path) -> None:
    """Remember where the checkpoint with weights of this hash lies."""
    places = {**_places(), digest: str(Path(path).resolve())}
    kept = dict(list(places.items())[-_MOST:])
    with contextlib.suppress(OSError, BusyError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), json.dumps(kept, indent=1))


def find_checkpoint(digest: str, name: str) -> Path:
    """Where the checkpoint lies, as far as is known; else ``name`` itself."""
    known = _places().get(digest)
    return Path(known) if known is not None and Path(known).is_file() else Path(name)


def cache(name: str) -> Path:
    """A file of that name in the user's cache, which need not be there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "normswap" / name


def _file() -> Path:
    return cache("checkpoints.json")


def _places() -> dict[str, str]:
    try:
        found = json.loads(read_text(_file()))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)}
