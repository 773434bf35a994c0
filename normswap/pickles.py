"""What a pickle would make, told from its opcodes alone. Nothing of it is run; no torch.

Forty opcodes that put a tuple into itself, twice each, are a key whose hash takes a day.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

_MOST_PARTS, _PARTS_EACH = 1_000_000, 100
"""A pickle may unfold to a million parts, and a hundred for each of its opcodes."""
_OLD_PARTS = 5
"""Pickles in a row in a file of torch before 1.6; raw tensors follow."""
_MARK = object()
_SHARED = {"GET", "BINGET", "LONG_BINGET"}
_KEPT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_HASHED = {"SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"}
_ONE = {"LIST", "DICT", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_CHANGED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


def unfolds(path: Path) -> bool:
    """Whether a file of ``torch.save``, or a bare pickle, holds far more than it seems to.

    Raises:
        OSError: it cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    with archive.open(name) as stream:
                        if _unfolds(stream):
                            return True
        return False
    with path.open("rb") as stream:
        return any(_unfolds(stream) for _ in range(_OLD_PARTS))


def _unfolds(stream: IO[bytes]) -> bool:
    """Follow the opcodes of one pickle with sizes in the place of objects."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    parts = opcodes = 0
    try:
        for code, argument, _ in pickletools.genops(stream):
            opcodes += 1
            name = code.name
            if name in _KEPT:
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
                continue
            taken = _take(stack, code)
            size = 1 + sum(item for item in taken if item is not _MARK)
            if name in _HASHED:
                parts += size
            if max(parts, size) > _MOST_PARTS + _PARTS_EACH * opcodes:
                return True
            _give(stack, code, argument, taken, size, memo)
    except (ValueError, IndexError, EOFError):
        return False  # broken: whoever loads it says so
    return False


def _take(stack: list[Any], code: Any) -> list[Any]:
    """What an opcode takes from the stack; all down to the mark where it says so."""
    wanted = [item.name for item in code.stack_before]
    if "mark" not in wanted:
        return [stack.pop() for _ in wanted][::-1]
    taken = []
    while (item := stack.pop()) is not _MARK:
        taken.append(item)
    below = [stack.pop() for _ in wanted[: wanted.index("mark")]]
    return [*below[::-1], *taken[::-1]]


def _give(
    stack: list[Any], code: Any, argument: Any, taken: list[Any], size: int, memo: dict[Any, Any]
) -> None:
    name = code.name
    if name == "MARK":
        stack.append(_MARK)
    elif name == "DUP":
        stack += taken * 2
    elif name in _SHARED:
        stack.append(memo.get(argument, 1))
    elif name in _CHANGED:
        stack.append(taken[0])
    elif code.stack_after:
        stack.append(1 if name in _ONE else size)
