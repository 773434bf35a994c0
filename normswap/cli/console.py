"""Where text goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from normswap.cli.wording import without_arguments
from normswap.cli.wrapping import fitted, wrapped
from normswap.plain import plain
from normswap.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal
_PIPE_WIDTH = 200
"""Rich takes 80 columns where there is no terminal, and cuts module names there. COLUMNS is not
asked: readline writes it into the environment of every child, and whoever reads a pipe wants all.
"""
_hushed: ContextVar[bool] = ContextVar("hushed", default=False)
_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """Keep stdout for results: what libraries print meanwhile goes to stderr."""
    token = _results.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def hush() -> None:
    """Say no more than errors: of several processes under a launcher one speaks for all."""
    _hushed.set(True)
    logging.getLogger("normswap").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Show normswap's messages and warnings, one line each; others' only when debugging."""
    logger = logging.getLogger("normswap")
    handler = _Stderr()
    handler.addFilter(lambda record: not hasattr(record, "returned"))  # printed as a result
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    token = _hushed.set(False)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", module=r"normswap\b")
                warnings.showwarning = _show_warning
            yield
    finally:
        _hushed.reset(token)
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Stderr(logging.Handler):
    """Writes to what stderr is at the time: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(
            at_words(visible(without_arguments(self.format(record))), sys.stderr) + "\n"
        )


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    text = f"warning: {one_line(without_arguments(str(message)))}"
    sys.stderr.write(at_words(text, sys.stderr) + "\n")


def one_line(text: str) -> str:
    """A text as one line that a terminal shows and does not obey: names come from files, too."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """A text that a terminal shows and does not obey; its lines stay lines."""
    return "".join(s if s.isprintable() or s == "\n" else ascii(s)[1:-1] for s in text)


def stdout() -> Console:
    """The console for results."""
    from rich.console import Console

    stream = _results.get() or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def forgiving(*streams: TextIO) -> None:
    """Signs that a terminal lacks become question marks, and no error."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)  # a test's stream may have none
        if reconfigure is not None and not _knows_every_sign(stream):
            reconfigure(errors="replace")


def _knows_every_sign(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def print_json(data: Any) -> None:
    """Print plain data as JSON, for a program to read, and for a terminal that obeys none of it."""
    if _hushed.get():
        return
    stream = _results.get() or sys.stdout
    escaped = not _knows_every_sign(stream)  # a program reads it: nothing may be lost
    text = json.dumps(plain(data), indent=2, ensure_ascii=escaped)
    stream.write("".join(map(_in_json, text)) + "\n")


def _in_json(sign: str) -> str:
    """A sign of JSON; what would not be seen can only be part of a string, and is escaped there."""
    return sign if sign == "\n" or sign.isprintable() else json.dumps(sign)[1:-1]


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    numeric: Sequence[str] = (),
    droppable: Sequence[str] = (),
) -> None:
    """Print a table that fits the width without breaking a name.

    Args:
        columns: their headings; the first column and the numbers never wrap, the others wrap
            between words.
        rows: one sequence of cells per row.
        title: a line above.
        numeric: columns that are set flush right.
        droppable: columns to leave out, the least important first, until the rest fits; a line
            below says which. Those that are empty are left out anyway.
    """
    if _hushed.get():
        return
    heads = [visible(column) for column in columns]
    table_rows = [["" if cell is None else visible(str(cell)) for cell in row] for row in rows]
    empty = [c for c in droppable if not any(row[columns.index(c)] for row in table_rows)]
    shown = [index for index, column in enumerate(columns) if column not in empty]
    whole = [column in numeric or index == 0 for index, column in enumerate(columns)]
    natural, least = _measured([heads, *table_rows], whole)
    console = stdout()
    left_out: list[str] = []
    for column in droppable:
        if _around(shown) + sum(least[index] for index in shown) <= console.width:
            break
        if column not in empty:
            left_out.append(column)
            shown.remove(columns.index(column))
    room = console.width - _around(shown)
    widths = fitted([natural[i] for i in shown], [least[i] for i in shown], room)
    console.width = max(console.width, sum(widths) + _around(shown))
    table = _table(
        title, [(width, columns[i] in numeric) for i, width in zip(shown, widths, strict=True)]
    )
    for made, i, width in zip(table.columns, shown, widths, strict=True):
        made.header = _broken(heads[i], width)
    for row in table_rows:
        table.add_row(*(_broken(row[i], width) for i, width in zip(shown, widths, strict=True)))
    console.print(table)
    if left_out:
        say(f"left out for want of width: {', '.join(left_out)} (a wider terminal or --json)")


def _measured(lines: Sequence[Sequence[str]], whole: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Of each column the width of its widest cell, and what it needs with every word whole."""
    from rich.cells import cell_len

    natural = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    words = [
        [word for cell in cells for word in cell.split()] for cells in zip(*lines, strict=True)
    ]
    longest = [max(map(cell_len, found), default=0) for found in words]
    return natural, [n if w else least for n, w, least in zip(natural, whole, longest, strict=True)]


def _around(shown: Sequence[int]) -> int:
    """Cells that a table of these columns has beside their text: the box and the padding."""
    return 3 * len(shown) + 1


def _table(title: str | None, columns: Sequence[tuple[int, bool]]) -> Table:
    """An empty table of columns of these widths, flush right or not."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = None if title is None else Text(visible(title))
    table = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for width, right in columns:
        table.add_column(width=width, justify="right" if right else "left", no_wrap=True)
    return table


def _broken(cell: str, width: int) -> Text:
    from rich.text import Text

    return Text("\n".join(wrapped(cell, width)))


def say(text: str) -> None:
    """Lines of result text; on a terminal they are broken between words."""
    say_line(at_words(visible(text), _results.get() or sys.stdout))


def say_line(text: str) -> None:
    """Result text as it is, to be copied."""
    if not _hushed.get():
        stdout().print(visible(text), markup=False, soft_wrap=True)


def at_words(text: str, stream: TextIO) -> str:
    """A text whose lines a terminal would break inside words, broken between them."""
    if not stream.isatty():
        return text
    from rich.console import Console

    return "\n".join(wrapped(text, Console(file=stream).width, "  "))


def suggest(*words: object) -> None:
    """``say_next`` where somebody looks: what a program reads of a result ends with the result."""
    if stdout().is_terminal:
        say_next(*words)


def say_next(*words: object) -> None:
    """The command that a user would give next, as a line to copy."""
    say_line(f"next: normswap {shlex.join(map(str, words))}")


@contextlib.contextmanager
def progress(title: str) -> Iterator[ProgressCallback]:
    """Show how far a long step has come.

    A bar with the time left on a terminal; elsewhere a plain line every ten seconds.
    """
    if _hushed.get():
        yield _silent
        return
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[message]}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, message="")

        def show(now: Progress) -> None:
            bar.update(task, completed=now.done, total=now.total, message=now.message)

        yield show


def _silent(now: Progress) -> None:
    del now


class _Lines:
    """Progress where there is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = self.last = time.monotonic()

    def __call__(self, now: Progress) -> None:
        time_now = time.monotonic()
        if time_now - self.last < _LINE_EVERY or not 0 < now.share < 1:
            return
        self.last = time_now
        left = (time_now - self.start) * (1 / now.share - 1)
        share = f"{100 * now.share:.0f} %, {left:.0f} s left"
        sys.stderr.write(f"{self.title}: {share} {now.message}".rstrip() + "\n")
