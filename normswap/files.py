"""Files that are whole or not there, one writer at a time, and hashes. Free of torch.

Whatever is unfinished lies beside its target as ``.NAME.TOKEN.KIND``, with a token drawn anew:

    next    (without a token) a run that will replace a folder's content when it has ended
    part    a file that is being written
    draft   a folder that is being written
    ready   a folder that is whole and takes its target's place; without its mark, what was there
    old     what version 0.1 moved away while it replaced an artefact

``.NAME.lock`` says that somebody writes. Who holds it may take every such name of this target for
one that a killed process left: it is finished (``ready``), undone (``old``) or removed. Files that
belong to somebody else are never moved, and whoever made a folder may have put such names in it:
links are nobody's leftovers, and a folder is ``ready`` only if its mark holds the number that this
file system gave the folder. That number cannot be packed into an archive or a repository.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normswap.errors import BusyError
from normswap.regular import open_regular, read_text

_log = logging.getLogger("normswap")

_NAME = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.(?P<kind>part|draft|ready|old)")
_MARK = ".whole"  # in a folder that is ready: see ``_Mark``
_LEAVING, _BRIEF = 0.2, 10.0  # seconds for who is just leaving, and for who writes one file
_AT_FDCWD, _EXCHANGE = -100, 2  # Linux: fcntl.h, fs.h

_held: dict[Path, int] = {}  # what this process writes, and in which thread


# ------------------------------------------------------------------------------------- one writer


@contextlib.contextmanager
def sole_writer(
    target: str | Path, *, patience: float = _LEAVING, through_links: bool = True
) -> Iterator[None]:
    """Be the only one who writes a file or folder, and put right what a killed writer left.

    Who writes a folder writes what is in it, too. The lock goes with the process.

    Args:
        target: need not exist.
        patience: seconds to wait for another writer.
        through_links: a link's target is meant, not the link; the folders above it always are.

    Raises:
        BusyError: another process, or another thread of this one, is writing it.
    """
    path = _absolute(target) if through_links else _unfollowed(target)
    owner = next((p for p in (path, *path.parents) if p in _held), None)
    if owner is not None:
        if owner == path and _held[path] != threading.get_ident():
            raise _busy(target)
        if path.is_dir():
            _settle(path)
        yield
        return
    with _parents(path), _locked(path, target, patience):
        mine = dict.fromkeys((path, _next(path)), threading.get_ident())
        _held.update(mine)
        try:
            if _next(path).is_symlink():  # no run of ours is worked out elsewhere
                _next(path).unlink()
            for name in mine:
                _settle(name)
            yield
        finally:
            for name in mine:
                del _held[name]


def _absolute(target: str | Path) -> Path:
    return Path(os.path.realpath(target))


def _unfollowed(target: str | Path) -> Path:
    """The name itself, whatever it points to: who replaces a file replaces a link in its place."""
    path = Path(target)
    return _absolute(path.parent) / path.name


def _busy(target: str | Path) -> BusyError:
    return BusyError(
        str(target),
        got="another run that is writing it",
        need="one at a time",
        hint="again when that one has ended, or another output",
    )


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders above a path; those that were made for nothing go again."""
    made = [folder for folder in path.parents if not folder.exists()]
    if made:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty was not made for nothing
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path, target: str | Path, patience: float) -> Iterator[None]:
    from filelock import FileLock, Timeout

    file = home(path) / f".{path.name}.lock"
    lock = FileLock(file, timeout=patience, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout as error:
        _check_writable(path, target)
        raise _busy(target) from error
    except OSError as error:  # the lock's name says nothing to who named the target
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is held: who waits sees that it has gone
            file.unlink()
        lock.release()


def _check_writable(path: Path, target: str | Path) -> None:
    """A lock that is never got is somebody's, or cannot be made: try a file that nobody holds.

    Raises:
        OSError: nothing can be made there.
    """
    trial = _fresh(path, "part")
    try:
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        why = os.strerror(error.errno or errno.EACCES)
        text = f"nothing can be made in its folder: {why}"
        raise PermissionError(errno.EACCES, text, str(target)) from error
    trial.unlink()


def home(target: Path) -> Path:
    """Where what belongs to a target may be written: beside it, else in it."""
    parent = target.parent
    if not target.is_dir():
        return parent
    mounted = target.stat().st_dev != parent.stat().st_dev  # nothing can be renamed into it
    return target if mounted or not os.access(parent, os.W_OK | os.X_OK) else parent


# ------------------------------------------------------------------------- what killed ones leave


def contents(folder: Path) -> set[str]:
    """The names in a folder, without those that are unfinished."""
    if not folder.is_dir():
        return set()
    name = _absolute(folder).name
    names = {path.name for path in folder.iterdir()} - {_MARK, f".{name}.lock", f".{name}.next"}
    return {name for name in names if not _NAME.fullmatch(name)}


def current(folder: Path, name: str) -> Path:
    """Where a file of a folder is to be read: one that is ready may still be on its way."""
    for place in _left(_absolute(folder), "ready"):
        if _mark_of(place) is not None and (place / name).exists():
            return place / name
    return folder / name


def _left(target: Path, *kinds: str) -> list[Path]:
    """What belongs to a target and is of these kinds, beside it or, of a folder, in it."""
    found = []
    for place in (target.parent, target):
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                mine = match and match["kind"] in kinds and match["target"] == target.name
                if match and mine and _is_of(match["kind"], entry):
                    found.append(place / entry.name)
    return sorted(found)


def _is_of(kind: str, entry: os.DirEntry[str] | Path) -> bool:
    """Whether a name's kind is what lies there; a link is neither."""
    if entry.is_symlink():
        return False
    return entry.is_file() if kind == "part" else entry.is_dir()


def _settle(target: Path) -> None:
    for place in _left(target, "ready"):
        _complete(place, target)
    if _mark_of(target) is not None:
        remove(target / _MARK)
    for place in _left(target, "old"):
        _bring_back(place, target)
    for place in _left(target, "part", "draft"):
        remove(place)
    if target.is_dir():  # who writes the folder writes its files
        for path in list(target.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match and match["kind"] == "part" and _is_of("part", path):
                remove(path)


def _complete(ready: Path, target: Path) -> None:
    mark = _mark_of(ready)
    if mark is not None:
        _move_in(ready, target, mark)
    elif os.path.lexists(ready / _MARK):
        _log.warning("%s is left alone: it was not made where it lies", ready)
        return
    remove(ready)


def _bring_back(old: Path, target: Path) -> None:
    """End what version 0.1 had begun: what lay beside the artefact goes back to its place."""
    if not target.exists():
        old.rename(target)
        return
    for path in old.iterdir():
        if not (target / path.name).exists():
            path.rename(target / path.name)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------- whole or nothing


def write_whole(path: str | Path, content: str | bytes | Callable[[Path], Any]) -> Path:
    """Write a file under its name only when all of it is on the disk.

    Args:
        path: final name; a file or a link of that name is replaced, its folder is made. What a
            link points to is somebody else's.
        content: text, bytes, or what writes to the path that it is given.

    Raises:
        BusyError: another process is writing it.
        OSError: it cannot be written; an earlier file is untouched then.
    """
    final = _unfollowed(path)
    if final.exists() and not final.is_file():  # a folder, a device
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with sole_writer(final, patience=_BRIEF, through_links=False):
        if not final.parent.exists():  # in a folder that is being written
            final.parent.mkdir(parents=True)
        part = _fresh(final, "part")
        try:
            if callable(content):
                content(part)
            else:
                part.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(part)
            part.replace(final)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename in (None, str(part)):
                error.filename = str(path)  # of which the caller knows
            raise
        flush(final.parent)
    return Path(path)


@contextlib.contextmanager
def scratch_folder(target: str | Path) -> Iterator[Path]:
    """A folder beside a target, for its one writer, gone at the end whatever happens.

    Raises:
        BusyError: another run is writing the target.
        OSError: nothing can be written there.
    """
    path = _absolute(target)
    with sole_writer(path):
        draft = _fresh(path, "draft")
        if not path.parent.exists():  # in a folder that is being written
            path.parent.mkdir(parents=True)
        draft.mkdir()  # not tempfile's: that one would be closed to other users for good
        try:
            yield draft
        finally:
            remove(draft)


@contextlib.contextmanager
def draft_folder(target: str | Path, own: Collection[str]) -> Iterator[Path]:
    """A folder that becomes the target's content when the block ends well, all or nothing.

    Args:
        target: may exist.
        own: the names that the old content and the new may have; what else is there stays.

    Raises:
        BusyError: another run is writing it.
        OSError: it cannot be written; the target is as it was then.
    """
    with scratch_folder(target) as draft:
        yield draft
        put_in_place(draft, _absolute(target), own)
        remove(next_folder(target))  # it was to replace what is there no more


def next_folder(target: str | Path) -> Path:
    """Where a run that will replace the target's content is worked out; it is the writer's own."""
    return _next(_absolute(target))


def _next(path: Path) -> Path:
    return home(path) / f".{path.name}.next"


def final_name(path: Path) -> str:
    """The name that a folder goes by, also where it will replace one of that name."""
    return path.name[1:-5] if re.fullmatch(r"\..+\.next", path.name) else path.name


def put_in_place(draft: Path, target: Path, own: Collection[str]) -> None:
    """Give a folder the content of a draft beside it: see ``draft_folder``.

    The draft is declared whole by one rename. Then names are exchanged, where the system can do
    that and nothing but ``own`` is in the folder; else the files move in, and a writer that is
    killed meanwhile leaves a folder that ``current`` reads as the new one and the next completes.
    """
    there = contents(target)
    whole = draft.parent != target and there <= set(own)  # nothing else would be moved along
    _flush_all(draft)
    if whole and target.exists():
        shutil.copymode(target, draft)
    if whole and not there and _renamed(draft, target):
        flush(target.parent)
        return
    ready, mark = _ready(draft, target, _Mark(False, (there & set(own)) - contents(draft)))
    if whole and _exchange(ready, target):
        flush(target.parent)
        remove(target / _MARK)
    else:
        _move_in(ready, target, mark)
    remove(ready)


def put_files_in_place(draft: Path, target: str | Path, gone: Collection[str] = ()) -> None:
    """Give a file the content of its namesake in a draft, together with those that it refers to.

    Args:
        draft: from ``scratch_folder``; what is in it besides the file should have new names, so
            that the old file is whole until the new one takes its name.
        target: the file.
        gone: names beside it that nobody needs any more.
    """
    path = _absolute(target)
    _flush_all(draft)
    ready, mark = _ready(draft, path, _Mark(True, gone))
    _move_in(ready, path, mark)
    remove(ready)


def _flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


@dataclass(frozen=True)
class _Mark:
    """What a folder that is ready says of itself.

    Attributes:
        file: its target is a file and not a folder; it holds that file and what it refers to.
        gone: names that the new content has no more.
    """

    file: bool
    gone: Collection[str]

    def text(self, folder: Path) -> str:
        kind = "file" if self.file else "folder"
        return "\n".join([f"{folder.stat().st_ino} {kind}", *sorted(self.gone)])


def _mark_of(folder: Path) -> _Mark | None:
    """The mark of a folder that was made where it lies; None for any other."""
    if not os.path.lexists(folder / _MARK):
        return None
    try:
        head, *gone = read_text(folder / _MARK).split("\n")
        number, kind = head.split(" ")
        if number != str(folder.stat().st_ino):
            return None
    except (OSError, ValueError):
        return None
    return _Mark(kind == "file", gone)


def _ready(draft: Path, target: Path, mark: _Mark) -> tuple[Path, _Mark]:
    """Declare a draft whole: from here on it will be in place, whoever is killed."""
    (draft / _MARK).write_text(mark.text(draft), encoding="utf-8")
    flush(draft / _MARK)
    ready = _fresh(target, "ready")
    draft.rename(ready)
    flush(ready.parent)
    return ready, mark


def _move_in(ready: Path, target: Path, mark: _Mark) -> None:
    place = target.parent if mark.file else target
    place.mkdir(exist_ok=True)
    # names in this folder alone: paths there may not be
    gone = [name for name in mark.gone if name not in ("", ".", "..") and name == Path(name).name]
    if mark.file:  # beside a file lies what is not its own
        gone = [name for name in gone if name.startswith(f"{target.name}.")]
    moved = [path for path in sorted(ready.iterdir()) if path.name != _MARK]
    for path in sorted(moved, key=lambda path: path.name == target.name):  # it refers to the others
        if path.is_dir():  # a name can be taken from a file, not from a folder that is not empty
            remove(place / path.name)
        path.replace(place / path.name)
    for name in gone:
        remove(place / name)
    flush(place)


def _renamed(draft: Path, target: Path) -> bool:
    """The draft takes a name that is free, or an empty folder's where the system allows that."""
    try:
        draft.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not target.is_dir():
            raise
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Two names change places in one step; False where the system has no such call."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _LINUX else None
    if call is None:
        return False
    sys.audit("normswap.exchange", str(one), str(other))  # Python announces no call by ctypes
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(other))


_LINUX = sys.platform == "linux"


def _fresh(target: Path, kind: str) -> Path:
    return home(target) / f".{target.name}.{os.urandom(4).hex()}.{kind}"


def flush(path: Path) -> None:
    """Wait until a file or a folder's names are on the disk."""
    if path.is_dir() and os.name == "nt":  # it cannot be opened there, and a rename needs no help
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------- hashes


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(data: Mapping[str, Any], seal: str = "sha256") -> str:
    """SHA-256 of plain data, without the field that holds it.

    Example:
        >>> data = {"a": 1}
        >>> json_digest({**data, "sha256": json_digest(data)}) == json_digest(data)
        True
    """
    content = {key: value for key, value in data.items() if key != seal}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def weights_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over the names, types, shapes and bytes of the tensors in a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if hasattr(tensor, "detach"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def content_digest(value: Any) -> str:
    """SHA-256 of what a checkpoint may hold: tensors and plain values, nested in any way."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if hasattr(value, "detach"):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}\n".encode())
        for key, entry in value.items():
            _feed(digest, key)
            _feed(digest, entry)
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__} {len(value)}\n".encode())
        for entry in value:
            _feed(digest, entry)
    else:
        text = repr(value)
        digest.update(f"{type(value).__name__} {len(text)} {text}\n".encode())


def _bytes(tensor: Any) -> Any:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
