"""A full disk is called a full disk, whoever meets it and whatever he makes of it. No torch.

torch's exporter wraps the system's error, torch's own writer hides it behind one about positions in
an archive, safetensors has a class without its number. What is behind an error is still there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from normswap.errors import NormSwapError

_FULL = {errno.ENOSPC: "a full disk", errno.EDQUOT: "a full quota"}


def full(error: BaseException | None) -> str | None:
    """What is full, where an error comes from that; None where it comes from something else.

    Example:
        >>> full(OSError(errno.ENOSPC, "No space left on device"))
        'a full disk (No space left on device)'
        >>> full(OSError(errno.EACCES, "Permission denied"))
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for number, words in _FULL.items():
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
                return f"{words} ({os.strerror(number)})"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextlib.contextmanager
def room_for(where: str | Path, error: type[NormSwapError]) -> Iterator[None]:
    """Say in one line that there is no room, where that is what a block fails of.

    Args:
        where: what is being written.
        error: the class to raise.

    Raises:
        NormSwapError: of the class ``error``. Whatever has another cause passes as it is.
    """
    try:
        yield
    except Exception as problem:
        got = full(problem)
        if got is None:
            raise
        raise error(
            str(where),
            got=got,
            need="room for what is written there",
            hint="freeing disk space, or another disk",
        ) from problem
