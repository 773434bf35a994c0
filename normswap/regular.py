"""Read files that somebody else may have put there: regular ones, of a size that is sane. No torch.

Opening a FIFO waits until somebody writes into it; a device, or a link to one, never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MOST_TEXT = 64 << 20
"""Bytes of the largest text that is read whole: records, plans and metrics are far smaller."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: str | Path) -> int:
    """Make sure, without opening it, that a path is a regular file or a link to one.

    Returns:
        Its size in bytes.

    Raises:
        OSError: it is none, or there is nothing.
    """
    return _size(path, Path(path).stat())


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading, and nothing that could block or never end.

    Raises:
        OSError: it is none, or cannot be read.
    """
    check_regular(path)  # before it is opened: that alone moves some devices
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _size(path, os.fstat(handle))  # what was opened may be another thing than was looked at
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: str | Path) -> str:
    """The text of a regular file, in UTF-8.

    Raises:
        OSError: it is none, or larger than ``MOST_TEXT``.
        UnicodeDecodeError: it is no text.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_TEXT:
            raise OSError(errno.EFBIG, f"{size} bytes, more than any such file has", str(path))
        return file.read(MOST_TEXT).decode("utf-8")


def _size(path: str | Path, status: os.stat_result) -> int:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "a directory", str(path))
    if kind != stat.S_IFREG:
        got = _KINDS.get(kind, "something else")
        raise OSError(errno.EINVAL, f"{got}, no regular file", str(path))
    return status.st_size
