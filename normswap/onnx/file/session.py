"""Run an ONNX file with onnxruntime, here or in a process of its own. Free of torch.

A file whose hash is not the recorded one may make onnxruntime crash or hang: such a file runs in
a child process with a time and a memory limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
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
CHILD_SECONDS = 300
CHILD_BYTES = 8 << 30


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
class Here:
    """Runs files in this process.

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
        try:
            session = open_session(path, level, self.provider)
        except Exception as error:  # noqa: BLE001  onnxruntime raises half a dozen unrelated types
            return [Failed(one_line(error))] * len(batches)
        return [_run(session, batch) for batch in batches]


@dataclass(frozen=True)
class Apart:
    """Runs files in a child process, which may crash, hang or eat memory without harm.

    Attributes:
        provider: execution provider.
        seconds: time limit of one call.
    """

    provider: str = CPU
    seconds: float = CHILD_SECONDS

    def run(
        self, path: Path, levels: Sequence[str], batches: Sequence[Sequence[Array]]
    ) -> list[Found]:
        """What every batch gives at every optimisation level."""
        with tempfile.TemporaryDirectory(prefix="normswap-") as name:
            folder = Path(name)
            request = {
                "path": str(path.resolve()),
                "levels": list(levels),
                "provider": self.provider,
                "batches": [len(batch) for batch in batches],
            }
            (folder / "request.json").write_text(json.dumps(request))
            for index, batch in enumerate(batches):
                for position, array in enumerate(batch):
                    np.save(folder / f"in-{index}-{position}.npy", array, allow_pickle=False)
            problem = self._spawn(folder)
            if problem is not None:
                return [[Failed(problem)] * len(batches)] * len(levels)
            flat = _read_answer(folder, len(batches) * len(levels))
        return [flat[i : i + len(batches)] for i in range(0, len(flat), len(batches))]

    def _spawn(self, folder: Path) -> str | None:
        try:
            done = subprocess.run(
                children.command("normswap.onnx.file.worker", str(folder)),
                env=children.environment(),
                cwd=folder,
                capture_output=True,
                timeout=self.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"onnxruntime did not finish within {self.seconds:.0f} s"
        if done.returncode != 0:
            return f"onnxruntime crashed on this file (exit status {done.returncode})"
        return None


def _read_answer(folder: Path, count: int) -> Found:
    answer = json.loads((folder / "answer.json").read_text())
    found: Found = []
    for index, item in enumerate(answer[:count]):
        if isinstance(item, str):
            found.append(Failed(item))
            continue
        names = [folder / f"out-{index}-{position}.npy" for position in range(int(item))]
        found.append([np.load(name, allow_pickle=False) for name in names])
    return found


def open_session(path: Path, level: str, provider: str = CPU) -> Any:
    """An onnxruntime session that logs nothing and runs deterministically."""
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
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def threads() -> int:
    """As many threads as OMP_NUM_THREADS allows, else one per core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else (os.cpu_count() or 1)


def _run(session: Any, batch: Sequence[Array]) -> Outputs | Failed:
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(batch):
        return Failed(f"the file has {len(names)} inputs ({', '.join(names)}), not {len(batch)}")
    try:
        outputs = session.run(None, dict(zip(names, batch, strict=True)))
    except Exception as error:  # noqa: BLE001  see above
        return Failed(one_line(error))
    return [np.asarray(output) for output in outputs]


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
        "provider", got=repr(name), need=f"one of {', '.join(have)}", hint=f"provider={CPU!r}"
    )
