"""Reading what nobody vouches for: whatever goes wrong becomes one line.

The line is ``FILE: got X; need Y. Try Z.``

A file from elsewhere can fail in more ways than its reader lists: text that is no text, JSON nested
a thousand deep, a pickle that ends early, a list where a mapping belongs. One mechanism for all of
them, so that no reader has to guess which exceptions its parts raise. No torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from normswap.errors import NormSwapError, in_short


class Malformed(ValueError):  # noqa: N818 - said inside of a reader; it never leaves ``reading``
    """What a reader finds wrong with a file, in words that fit behind "got"."""


@contextlib.contextmanager
def reading(
    where: str | Path, error: type[NormSwapError], *, need: str, hint: str, what: str = ""
) -> Iterator[None]:
    """Turn any failure of the block into one error that names the file.

    Args:
        where: the file.
        error: the class to raise.
        need: what the file should hold.
        hint: what to try.
        what: what is at fault, where that is not the file as a whole.

    Raises:
        NormSwapError: of the class ``error``; one that the block itself raises passes as it is.

    Example:
        >>> from normswap.errors import PlanError
        >>> with reading("plan.json", PlanError, need="a plan", hint="another file"):
        ...     {}["entries"]
        Traceback (most recent call last):
        normswap.errors.PlanError: plan.json: got no field 'entries'; need a plan. Try another file.
    """
    try:
        yield
    except NormSwapError:
        raise
    except Exception as problem:
        wrong = what_is_wrong(problem)
        got = f"{what} ({wrong})" if what else wrong
        raise error(str(where), got=got, need=need, hint=hint) from problem


def check_no_link(folder: Path, error: type[NormSwapError]) -> None:
    """What a run keeps in its output lies there: whoever made the output may have put a link in.

    Raises:
        NormSwapError: of the class ``error``.
    """
    if folder.is_symlink():
        raise error(
            str(folder),
            got="a link to another place",
            need="a folder of the run's own",
            hint="removing the link, or another output",
        )


def what_is_wrong(problem: Exception) -> str:
    """A failure of reading in words that fit behind "got".

    Example:
        >>> what_is_wrong(RecursionError())
        'data nested deeper than any such file is'
    """
    pickle = sys.modules.get("pickle")  # who did not import it has not met its errors
    words = {**_WORDS, **({} if pickle is None else {pickle.UnpicklingError: _PICKLE})}
    for kind, text in words.items():
        if isinstance(problem, kind):
            return text
    if isinstance(problem, UnicodeEncodeError):
        return "text that is no Unicode"
    if isinstance(problem, UnicodeDecodeError):
        return f"bytes that are no UTF-8 text (at byte {problem.start})"
    if isinstance(problem, json.JSONDecodeError):
        return f"no JSON ({problem.msg}, line {problem.lineno}, column {problem.colno})"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    if isinstance(problem, KeyError):
        return f"no field {str(problem)[:60]}"
    text, name = in_short(problem), type(problem).__name__
    return text if text == name or isinstance(problem, Malformed) else f"{name}: {text}"


_WORDS = {
    RecursionError: "data nested deeper than any such file is",
    MemoryError: "more data than there is memory for",
}
_PICKLE = "no pickle that can be read to its end"
"""torch's own text advises to run whatever code is in it."""
