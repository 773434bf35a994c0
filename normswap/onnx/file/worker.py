"""The child process that runs a file nobody vouches for: ``session.worker`` starts it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from normswap import children
from normswap.onnx.file.selftest import SelfTest
from normswap.onnx.file.session import Failed, LocalSession, open_here, pack, unpack
from normswap.onnx.file.verifying import run_self_test

Answer = tuple[dict[str, Any], list[bytes]]


class Worker:
    """Opens one file after another, and runs the one that is open."""

    session: LocalSession | None = None

    def answer(self, request: dict[str, Any], data: list[bytes]) -> Answer:
        """Do what is asked: ``open``, ``run`` or ``self-test``."""
        try:
            return self._answer(request, data)
        except MemoryError:
            return {"failed": "it needs more memory than it may take"}, []

    def _answer(self, request: dict[str, Any], data: list[bytes]) -> Answer:
        if request["do"] == "self-test":
            test = SelfTest.from_json(request["test"])
            cases = run_self_test(Path(request["path"]), test, request["provider"])
            return {"cases": [asdict(case) for case in cases]}, []
        if request["do"] == "open":
            return self._open(Path(request["path"]), request["level"], request["provider"]), []
        assert self.session is not None
        found = self.session.run(unpack(request["arrays"], data))
        if isinstance(found, Failed):
            return {"failed": found.message}, []
        head, packed = pack(found)
        return {"arrays": head}, packed

    def _open(self, path: Path, level: str, provider: str) -> dict[str, Any]:
        self.session = None  # the one before gives its memory back first
        opened = open_here(path, level, provider)
        if isinstance(opened, Failed):
            return {"failed": opened.message}
        self.session = opened
        return {
            key: [[value.name, value.type, value.shape] for value in values]
            for key, values in (("inputs", opened.inputs), ("outputs", opened.outputs))
        }


if __name__ == "__main__":
    children.serve(Worker().answer)
