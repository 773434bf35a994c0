"""Run an ONNX file with onnxruntime, here or in a process of its own. Free of torch.

A file that was not made here may make onnxruntime crash, hang or eat memory, also one whose hash is
right: whoever made it wrote that too. Such a file runs in a child process with a time and a memory
limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from normswap import children
from normswap.errors import ExportError, in_short
from normswap.onnx.file.parity import Array

LEVELS = ("off", "basic", "all")
"""onnxruntime's graph optimisation levels, from none to everything."""

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Failed:
    """A run that gave no output.

    Attributes:
        message: onnxruntime's own words, in one line.
    """

    message: str


Outputs = list[Array]
Found = list[Outputs | Failed]
"""One list of outputs per batch, or why there is none."""


class Runner(Protocol):
    """Runs a file on batches of inputs."""

    def run(
        self, path: Path, levels: Sequence[str], batches: Sequence[Sequence[Array]]
    ) -> list[Found]:
        """What every batch gives at every optimisation level."""


@dataclass(frozen=True)
class Value:
    """An input or output of a graph, as onnxruntime declares it.

    Attributes:
        name: its name.
        type: for example ``tensor(float)``.
        shape: one entry per axis; a name or None where its size is open.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class Session(Protocol):
    """An opened file."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def run(self, batch: Sequence[Array]) -> Outputs | Failed:
        """What the file makes of one batch."""


class LocalSession:
    """An onnxruntime session in this process, which logs nothing and runs deterministically.

    Args:
        path: the file.
        level: of ``LEVELS``.
        provider: execution provider.
    """

    def __init__(self, path: Path, level: str, provider: str = CPU) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = {
            "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        }[level]
        options.log_severity_level = 4
        options.intra_op_num_threads = threads()
        providers = [provider] if provider == CPU else [provider, CPU]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.inputs, self.outputs = (
            tuple(Value(item.name, item.type, tuple(item.shape)) for item in items)
            for items in (self._session.get_inputs(), self._session.get_outputs())
        )

    def run(self, batch: Sequence[Array]) -> Outputs | Failed:
        """What the file makes of one batch."""
        names = [value.name for value in self.inputs]
        if len(names) != len(batch):
            return Failed(
                f"the file has {len(names)} inputs ({', '.join(names)}), not {len(batch)}"
            )
        try:
            found = self._session.run(None, dict(zip(names, batch, strict=True)))
            outputs = [np.asarray(output) for output in found]
        except Exception as error:  # noqa: BLE001  onnxruntime raises half a dozen unrelated types
            return Failed(one_line(error))
        if any(output.dtype.kind not in "biuf" for output in outputs):
            return Failed("an output that is no tensor of numbers")
        return outputs


def open_here(path: Path, level: str, provider: str = CPU) -> LocalSession | Failed:
    """Open a file in this process."""
    try:
        return LocalSession(path, level, provider)
    except Exception as error:  # noqa: BLE001  as above
        return Failed(one_line(error))


class RemoteSession:
    """A session in a child process.

    Args:
        child: whose module is ``normswap.onnx.file.worker``.
        path: the file.
        level: of ``LEVELS``.
        provider: execution provider.
        clock: called for the time that a request has.

    Attributes:
        failed: why onnxruntime did not open the file, or stopped; None while all is well.
    """

    def __init__(
        self,
        child: children.Child,
        path: Path,
        level: str,
        provider: str,
        clock: Callable[[], children.Clock],
    ) -> None:
        self._child, self._clock = child, clock
        self.failed: Failed | None = None
        request = {"do": "open", "path": str(path.resolve()), "level": level, "provider": provider}
        answer, _ = self._ask(request)
        self.inputs, self.outputs = (
            tuple(Value(name, kind, tuple(shape)) for name, kind, shape in answer.get(key, []))
            for key in ("inputs", "outputs")
        )

    def run(self, batch: Sequence[Array]) -> Outputs | Failed:
        """What the file makes of one batch."""
        if self.failed is not None:
            return self.failed
        head, data = pack(batch)
        answer, found = self._ask({"do": "run", "arrays": head}, data)
        return Failed(answer["failed"]) if "failed" in answer else unpack(answer["arrays"], found)

    def _ask(
        self, request: dict[str, Any], data: Sequence[bytes] = ()
    ) -> tuple[dict[str, Any], list[bytes]]:
        try:
            answer, found = self._child.ask(request, data, clock=self._clock())
        except children.ChildError as error:
            answer, found = {"failed": f"onnxruntime {error}"}, []
            self.failed = Failed(answer["failed"])
        if request["do"] == "open" and "failed" in answer:
            self.failed = Failed(answer["failed"])
        return answer, found


def open_apart(path: Path, level: str, provider: str, seconds: float) -> RemoteSession | Failed:
    """Open a file in a child process, where opening and each batch may take ``seconds``."""
    child = start_worker(provider)
    session = RemoteSession(child, path, level, provider, lambda: children.Clock(seconds))
    if session.failed is not None:
        child.close()
    return session.failed or session


def pack(arrays: Sequence[Array]) -> tuple[list[Any], list[bytes]]:
    """Arrays as plain data and bytes."""
    plain = [np.ascontiguousarray(array) for array in arrays]
    return [[a.dtype.str, list(a.shape)] for a in plain], [a.tobytes() for a in plain]


def unpack(head: Sequence[Any], data: Sequence[bytes]) -> list[Array]:
    """The inverse of ``pack``."""
    return [
        np.frombuffer(item, dtype=kind).reshape(shape)
        for (kind, shape), item in zip(head, data, strict=True)
    ]


@dataclass(frozen=True)
class Here:
    """Runs files in this process: those that were made here.

    Attributes:
        provider: execution provider, as ``resolve_provider`` names it.
    """

    provider: str = CPU

    def run(
        self, path: Path, levels: Sequence[str], batches: Sequence[Sequence[Array]]
    ) -> list[Found]:
        """What every batch gives at every optimisation level."""
        return [self._run_at(path, level, batches) for level in levels]

    def _run_at(self, path: Path, level: str, batches: Sequence[Sequence[Array]]) -> Found:
        session = open_here(path, level, self.provider)
        if isinstance(session, Failed):
            return [session] * len(batches)
        return [session.run(batch) for batch in batches]


@dataclass(frozen=True)
class Apart:
    """Runs files in a child process, which may crash, hang or eat memory without harm.

    Attributes:
        provider: execution provider.
        seconds: time limit of one call.
    """

    provider: str = CPU
    seconds: float = children.SECONDS

    def run(
        self, path: Path, levels: Sequence[str], batches: Sequence[Sequence[Array]]
    ) -> list[Found]:
        """What every batch gives at every optimisation level."""
        clock = children.Clock(self.seconds)
        child = start_worker(self.provider)
        found: list[Found] = []
        gone: Failed | None = None
        try:
            for level in levels:
                if gone is not None:
                    found.append([gone] * len(batches))
                    continue
                session = RemoteSession(child, path, level, self.provider, lambda: clock)
                found.append([session.run(batch) for batch in batches])
                gone = session.failed if child.gone else None
        finally:
            child.close()
        return found


def start_worker(provider: str) -> children.Child:
    """A child that opens and runs files; whoever starts it closes it."""
    # GPU drivers reserve far more address space than they use
    memory = children.MEMORY if provider == CPU else None
    return children.Child("normswap.onnx.file.worker", memory=memory)


def check_timeout(timeout: float | None) -> None:
    """Raise for a time in which nothing can be run.

    Raises:
        ExportError: it is not above 0.
    """
    if timeout is not None and not 0 < timeout <= children.FOREVER:
        raise ExportError(
            "timeout",
            got=str(timeout),
            need=f"seconds, above 0 and at most {children.FOREVER:g}",
            hint=f"--timeout {children.SECONDS:g} (timeout={children.SECONDS:g})",
        )


def threads() -> int:
    """As many threads as OMP_NUM_THREADS allows, else one per core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else (os.cpu_count() or 1)


def one_line(error: BaseException) -> str:
    """The first line of an error, without onnxruntime's error-code prefix."""
    text = in_short(error, 1000)
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text[:400]


def resolve_provider(name: str | None) -> str:
    """The execution provider that ``name`` means: ``cuda`` is ``CUDAExecutionProvider``.

    Raises:
        ExportError: a provider that this onnxruntime does not have.
    """
    import onnxruntime

    have: list[str] = onnxruntime.get_available_providers()
    if name is None:
        return CPU
    short = name.lower().removesuffix("executionprovider")
    for candidate in have:
        if candidate.lower().removesuffix("executionprovider") == short:
            return candidate
    raise ExportError(
        "provider",
        got=repr(name),
        need=f"one of {', '.join(have)}",
        hint=f"--provider cpu (provider={CPU!r})",
    )
