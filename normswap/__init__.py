"""Swap the BatchNorm of pretrained models for normalisers that work at batch size 1 to 8.

Every name below is loaded on first use, so that ``import normswap`` and ``normswap --help`` stay
free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "walk": "graph",
    "Graph": "graph",
    "Site": "graph",
    "plan": "planning",
    "Plan": "planning",
    "convert": "swap",
    "apply_plan": "swap",
    "Conversion": "swap",
    "GroupNorm": "recipes",
    "LayerNorm": "recipes",
    "InstanceNorm": "recipes",
    "FilterResponseNorm": "recipes",
    "BatchRenorm": "recipes",
    "CrossIterationBatchNorm": "recipes",
    "SyncBatchNorm": "recipes",
    "FrozenBatchNorm": "recipes",
    "BatchNorm": "recipes",
    "load_model": "artifact",
    "save": "artifact",
    "load": "artifact",
    "calibrate": "calibration",
    "Calibration": "calibration",
    "measure_drift": "drift",
    "finetune": "training",
    "FineTune": "training",
    "evaluate": "training",
    "export_onnx": "onnx",
    "verify_onnx": "onnx",
    "Parity": "onnx",
    "NormSwapError": "errors",
}

__all__ = ["__version__", "layers", *sorted(_HOME)]

if TYPE_CHECKING:
    from normswap import layers


def __getattr__(name: str) -> Any:
    if name == "layers":
        return importlib.import_module("normswap.layers")
    if name in _HOME:
        value = getattr(importlib.import_module(f"normswap.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'normswap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
