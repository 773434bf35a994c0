"""What a pickle would make, told from its opcodes alone. Nothing of it is run; no torch.

Forty opcodes that put a tuple into itself, twice each, are a key whose hash takes a day. Thirty
bytes ask for a ``bytearray`` of any size, and a tensor of stride 0 is a number repeated for ever.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

_MOST_PARTS, _PARTS_EACH = 1_000_000, 100
"""A pickle may unfold to a million parts, and a hundred for each of its opcodes."""
_OLD_PARTS = 5
"""Pickles in a row in a file of torch before 1.6; raw tensors follow."""
_ZIP = b"PK\x03\x04"
"""By these bytes torch knows an archive."""
_MARK = object()
_SHARED = {"GET", "BINGET", "LONG_BINGET"}
_KEPT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_HASHED = {"SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"}
_ONE = {"LIST", "DICT", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_CHANGED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX"}
_STRIDED = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor"}
_WRAPPING = "_rebuild_from_type_v2"


class _Item(int):
    """The number of parts of an object that is not made.

    Attributes:
        name: of a class or function.
        value: of a number or a text.
        parts: of a tuple.
    """

    name: str = ""
    value: Any = None
    parts: tuple[_Item, ...] | None = None


def unfolds(path: Path) -> bool:
    """Whether a file of ``torch.save``, or a bare pickle, holds far more than it seems to.

    Raises:
        OSError: it cannot be read.
        zipfile.BadZipFile: it is an archive that can be read in two ways.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(len(_ZIP)) != _ZIP:
            stream.seek(0)
            return any(_unfolds(stream, size) for _ in range(_OLD_PARTS))
    with zipfile.ZipFile(path) as archive:
        for entry in _entries(archive):
            if entry.filename.lower().endswith(".pkl"):
                with archive.open(entry) as stream:
                    if _unfolds(stream, size):
                        return True
    return False


def _entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """What is in an archive for torch too: it minds no case, and takes the first of two."""
    found = archive.infolist()
    if len({entry.filename.lower() for entry in found}) < len(found):
        raise zipfile.BadZipFile("an archive with the same name twice")
    if min((entry.header_offset for entry in found), default=0) > 0:
        raise zipfile.BadZipFile("an archive behind another")
    return found


def _unfolds(stream: IO[bytes], size_of_file: int) -> bool:
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
            if name in _CALLS and _makes_more(taken[0], taken[1], size_of_file):
                return True
            _give(stack, code, argument, taken, size, memo)
    except (ValueError, IndexError, EOFError, AttributeError):
        return False  # broken: whoever loads it says so
    return False


def _makes_more(function: Any, arguments: Any, size_of_file: int) -> bool:
    """Whether a call that torch lets through makes more than a file of that size can hold."""
    name, given = function.name.rpartition(" ")[2], arguments.parts
    if name == "bytearray":  # of bytes, or of text and its encoding; else of any size
        return given is None or not all(_is_text(item) for item in given)
    if name == _WRAPPING and given is not None and len(given) > 2:
        return _makes_more(given[0], given[2], size_of_file)
    if name in _STRIDED:
        shape = given[2].parts if given is not None and len(given) > 2 else None
        return shape is None or _volume(shape) > size_of_file
    return bool(name == "Tensor" or name.endswith("Storage"))


def _is_text(item: _Item) -> bool:
    return isinstance(item.value, str | bytes | bytearray) or item.name.endswith(" encode")


def _volume(shape: tuple[_Item, ...]) -> float:
    edges = [item.value for item in shape]
    return math.prod(edges) if all(isinstance(edge, int) for edge in edges) else math.inf


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
        stack.append(memo.get(argument, _Item(1)))
    elif name in _CHANGED:
        stack.append(taken[0])
    elif code.stack_after:
        stack.append(_made(name, argument, taken, size))


def _made(name: str, argument: Any, taken: list[Any], size: int) -> _Item:
    made = _Item(1 if name in _ONE else size)
    if name == "GLOBAL":
        made.name = argument
    elif name in _TUPLES:
        made.parts = tuple(item for item in taken if item is not _MARK)
    elif name in _CALLS:  # what it gives is known of one function alone, which makes bytes of text
        made.name = " encode" if taken[0].name == "_codecs encode" else ""
    else:
        made.value = argument
    return made
