"""What a measurement leaves in a file: a picture, JSON or a table, as the file's name ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normswap.files import write_whole
from normswap.plain import plain


def write_report(
    path: str | Path, *, draw: Callable[[Path], Path], data: Mapping[str, Any], text: str
) -> Path:
    """Write a picture (``.png``, ``.svg``, ``.pdf``), JSON (``.json``) or else the text.

    Args:
        path: of the file.
        draw: draws the picture.
        data: what becomes JSON.
        text: the table.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in (".png", ".svg", ".pdf"):
        return draw(path)
    found = json.dumps(plain(data), indent=1) if kind == ".json" else text
    return write_whole(path, found + "\n")


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """One line for each row, its cells below one another.

    Example:
        >>> aligned([("site", "error"), ("bn1", "0.1")])
        ['site  error', 'bn1   0.1']
    """
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
