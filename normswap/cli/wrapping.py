"""Text and columns that fit a width with every word whole; widths are those of a terminal's cells.

rich does the same, but lost the end of a line where a column shrank after its text was divided.
"""

from __future__ import annotations

from collections.abc import Sequence


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """The lines of a text, broken between words; a word that is wider than all stays whole.

    Args:
        text: a break in it stays one; a line that fits keeps its spaces.
        width: cells of a line.
        indent: what each line after the first of a broken one begins with.

    Example:
        >>> wrapped("the end of a line", 8)
        ['the end', 'of a', 'line']
        >>> wrapped("features.denseblock4 → frozen", 10, "  ")
        ['features.denseblock4', '  → frozen']
    """
    return [part for line in text.split("\n") for part in _parts(line, width, indent)]


def _parts(line: str, width: int, indent: str) -> list[str]:
    from rich.cells import cell_len

    if cell_len(line) <= width:
        return [line]
    begin = line[: len(line) - len(line.lstrip())]
    parts: list[str] = []
    current = ""
    for word in line.split():
        longer = f"{current} {word}" if current else f"{indent if parts else begin}{word}"
        if current and cell_len(longer) > width:
            parts.append(current)
            current = f"{indent}{word}"
        else:
            current = longer
    return [*parts, current]


def fitted(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths of columns that need no more room than there is, the widest shrunk first.

    Args:
        natural: what each column would like.
        least: what each column needs.
        room: for all of them; where the least widths need more, these.

    Example:
        >>> fitted([10, 30, 20], [10, 5, 8], 40)
        [10, 15, 15]
    """
    widths = list(natural)
    while sum(widths) > room:
        shrinking = [i for i, width in enumerate(widths) if width > least[i]]
        if not shrinking:
            break
        widths[max(shrinking, key=lambda i: widths[i])] -= 1
    return widths
