"""The child process that runs a file nobody vouches for: ``children.command``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from normswap.onnx.file.session import CHILD_BYTES, Failed, Here


def main(folder: Path) -> None:
    """Read the request in ``folder``, run it, write the answer there."""
    request: dict[str, Any] = json.loads((folder / "request.json").read_text())
    if request["provider"] == "CPUExecutionProvider":  # GPU drivers reserve far more than they use
        _limit_memory()
    batches = [
        [np.load(folder / f"in-{index}-{i}.npy", allow_pickle=False) for i in range(count)]
        for index, count in enumerate(request["batches"])
    ]
    found = Here(request["provider"]).run(Path(request["path"]), request["levels"], batches)
    answer: list[str | int] = []
    for index, item in enumerate(item for level in found for item in level):
        if isinstance(item, Failed):
            answer.append(item.message)
            continue
        for position, array in enumerate(item):
            np.save(folder / f"out-{index}-{position}.npy", array, allow_pickle=False)
        answer.append(len(item))
    (folder / "answer.json").write_text(json.dumps(answer))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
