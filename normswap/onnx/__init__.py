"""ONNX out, proven equal to the model it came from.

``export_onnx`` writes a file under its final name only after a proof; ``verify_onnx`` repeats the
proof, or the file's own self-test where torch is not installed. This room refuses to give a file
that failed its proof the name that was asked for.

Every name is loaded on first use, so that verification needs numpy, onnx and onnxruntime alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.onnx.export import export_onnx
    from normswap.onnx.file.parity import Case, Parity
    from normswap.onnx.runtime import OnnxModel, load_onnx
    from normswap.onnx.verify import verify_onnx

_HOME = {
    "export_onnx": "export",
    "verify_onnx": "verify",
    "load_onnx": "runtime",
    "OnnxModel": "runtime",
    "Parity": "file.parity",
    "Case": "file.parity",
}

__all__ = ["Case", "OnnxModel", "Parity", "export_onnx", "load_onnx", "verify_onnx"]

if not TYPE_CHECKING:  # a type checker that saw this would believe in every name

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(f"normswap.onnx.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'normswap.onnx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
