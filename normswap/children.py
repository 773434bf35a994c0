"""Child processes of normswap: the same packages as here, and nothing else of where they start.

``python -m`` puts the current folder before Python's own library, so that a ``json.py`` beside a
file under test would run. A child gets the folders that this process imports from, behind Python's
own and without the current one, and of the environment only what names no code. No torch.

Whatever runs somebody else's file runs in a ``Child``: it ends when its time is over, and cannot
take more memory than it is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

SECONDS = 120.0
"""How long somebody else's file may take by default."""
FOREVER = 1e7
"""Seconds, beyond what a system can wait for."""
MEMORY = 8 << 30
"""How many bytes of address space it may take by default; where the system can limit that."""

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the package: a checkout or ``site-packages``."""

_KEPT = {
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHASHSEED", "PYTHONUTF8"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUSERBASE"),
    *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "PATHEXT", "USERPROFILE", "APPDATA", "LOCALAPPDATA"),
    *("NUMBER_OF_PROCESSORS", "PROCESSOR_ARCHITECTURE"),
}
_KEPT_FAMILIES = ("LC_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "CUDA", "NVIDIA_", "ORT_")
_PATHS = {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}

_START = (
    "import sys; {limit}"
    "at = next((i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)); "
    "sys.path[at:at] = [p for p in {folders!r} if p not in sys.path]; "
    "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)

_LIMIT = (
    "import resource; resource.setrlimit(resource.RLIMIT_AS, ({memory},) * 2); "
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
)


def command(module: str, *arguments: str, memory: int | None = None) -> list[str]:
    """The command line that runs a module of ours in a child process.

    Args:
        module: for example ``"normswap.onnx.file.worker"``.
        arguments: its ``sys.argv[1:]``.
        memory: bytes of address space that it may take; None is no limit.
    """
    limit = _LIMIT.format(memory=memory) if memory is not None and os.name == "posix" else ""
    start = _START.format(folders=_importable(), module=module, limit=limit)
    return [sys.executable, "-P", "-c", start, *arguments]


def _importable() -> list[str]:
    """Where this process imports from, without the current folder unless the package lies there."""
    folders = [Path(entry) for entry in sys.path if entry and Path(entry).is_absolute()]
    here = Path.cwd()
    kept = [str(ROOT), *(str(f) for f in folders if f.exists() and f.resolve() != here)]
    return list(dict.fromkeys(kept))


def environment() -> dict[str, str]:
    """What of this process's environment a child may see: no variable that names code to run."""
    found = {}
    for name, value in os.environ.items():
        if name.upper() not in _KEPT and not name.upper().startswith(_KEPT_FAMILIES):
            continue
        if name.upper() in _PATHS:  # an empty or relative entry means the current folder
            value = os.pathsep.join(p for p in value.split(os.pathsep) if Path(p).is_absolute())
        found[name] = value
    return found


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Meanwhile children that other libraries start get no current folder on their path either."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


class Clock:
    """What is left of a stretch of time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; never below 0."""
        return max(0.0, self._end - time.monotonic())


class ChildError(Exception):
    """A child that was too slow, or that ended before it answered."""


class Child:
    """A process that answers one request after another, within its limits.

    The module's own loop is ``serve``.

    Args:
        module: as for ``command``.
        memory: bytes of address space that it may take; None is no limit.
    """

    def __init__(self, module: str, *, memory: int | None = MEMORY) -> None:
        import subprocess  # a tenth of what --help takes

        self._process = subprocess.Popen(
            command(module, memory=memory),
            env=environment(),
            cwd=ROOT,  # which is on its path in any case
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # Python's own last words; the module's output goes nowhere
        )
        self._memory = memory
        self.close = weakref.finalize(self, _end, self._process)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def ask(
        self, request: dict[str, Any], data: Sequence[bytes] = (), *, clock: Clock
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request and wait for the answer.

        Args:
            request: plain data.
            data: what goes with it.
            clock: how long it may take; the child is ended after that.

        Returns:
            The answer, and what came with it.

        Raises:
            ChildError: no answer in time, or none at all.
        """
        answer: list[tuple[dict[str, Any], list[bytes]]] = []
        talk = threading.Thread(target=self._talk, args=(request, data, answer), daemon=True)
        talk.start()
        talk.join(clock.left)
        late = talk.is_alive()
        if late:
            self._process.kill()
            talk.join()
        if answer:
            return answer[0]
        self.close()
        if late:
            raise ChildError(f"did not finish within its timeout of {clock.seconds:g} s")
        raise ChildError(f"crashed on this file (exit status {self._process.returncode})")

    def _talk(self, request: dict[str, Any], data: Sequence[bytes], answer: list[Any]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(
            OSError, ValueError, EOFError, LookupError, TypeError
        ):  # it is gone
            send(self._process.stdin, request, data)
            answer.append(receive(self._process.stdout, most=self._memory))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def serve(answer: Any) -> None:
    """The loop of a child's module: requests from standard input, answers to standard output.

    Args:
        answer: called with each request and its data; gives the answer and its data.
    """
    output = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries print is no answer
        os.dup2(nowhere, stream)
    with contextlib.suppress(EOFError):
        while True:
            send(output, *answer(*receive(sys.stdin.buffer)))


def send(stream: IO[bytes], message: dict[str, Any], data: Sequence[bytes]) -> None:
    """One line of JSON, and then the data whose sizes it states."""
    head = {"message": message, "sizes": [len(item) for item in data]}
    stream.write(json.dumps(head).encode() + b"\n")
    for item in data:
        stream.write(item)
    stream.flush()


def receive(stream: IO[bytes], *, most: int | None = None) -> tuple[dict[str, Any], list[bytes]]:
    """The inverse of ``send``.

    Args:
        stream: where it comes from.
        most: bytes that the data may have in all.

    Raises:
        EOFError: the other side has gone.
        ValueError: this is no message, or it is too large.
    """
    line = stream.readline()
    if not line:
        raise EOFError
    head = json.loads(line)
    if most is not None and sum(head["sizes"]) > most:
        raise ValueError("more data than there may be")
    data = [stream.read(size) for size in head["sizes"]]
    if [len(item) for item in data] != head["sizes"]:
        raise EOFError
    return head["message"], data
