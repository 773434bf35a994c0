"""Swap the BatchNorm of pretrained models for normalisers that work at batch size 1 to 8.

    convert     a model, in place, to one of the targets (``"gn"``, ``"gn(groups=16)"``, a recipe)
    calibrate   bring it back to the original on unlabelled images
    finetune    train it at batch size 1 to 8
    export_onnx write it out, proven equal

Public is what ``__all__`` names, with ``normswap.layers`` (to build models with) and
``normswap.recipes`` (targets with settings). Every name is loaded on first use, so that ``import
normswap`` and ``normswap --help`` stay free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "Push": "artifact",
    "load": "artifact",
    "load_model": "artifact",
    "push_to_hub": "artifact",
    "save": "artifact",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "Drift": "drift",
    "SiteDrift": "drift",
    "measure_drift": "drift",
    "ArtifactError": "errors",
    "BusyError": "errors",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "ImpossibleNumbersError": "errors",
    "InstallationError": "errors",
    "LayerError": "errors",
    "NormSwapError": "errors",
    "ParityError": "errors",
    "PlanError": "errors",
    "SpecError": "errors",
    "SwapError": "errors",
    "TrainingError": "errors",
    "WalkError": "errors",
    "Graph": "graph",
    "Site": "graph",
    "register_batchnorm": "graph",
    "walk": "graph",
    "Case": "onnx",
    "OnnxModel": "onnx",
    "Parity": "onnx",
    "export_onnx": "onnx",
    "load_onnx": "onnx",
    "verify_onnx": "onnx",
    "Passage": "passage",
    "Plan": "planning",
    "PlanEntry": "planning",
    "plan": "planning",
    "Source": "sources",
    "Conversion": "swap",
    "apply_plan": "keeping",
    "convert": "keeping",
    "Option": "verdict",
    "Recommendation": "recommendation",
    "recommend": "recommendation",
    "Sweep": "sweeps",
    "sweep": "sweeps",
    "Epoch": "training",
    "FineTune": "training",
    "History": "training",
    "Metrics": "training",
    "Progress": "progress",
    "TrainingInterrupted": "training",
    "TrainingProgress": "training",
    "evaluate": "training",
    "finetune": "training",
    "unwrap": "unwrapping",
    # recipes under their names of version 0.1; they live in normswap.recipes
    "BatchNorm": "recipes",
    "BatchRenorm": "recipes",
    "CrossIterationBatchNorm": "recipes",
    "FilterResponseNorm": "recipes",
    "FrozenBatchNorm": "recipes",
    "GroupNorm": "recipes",
    "InstanceNorm": "recipes",
    "LayerNorm": "recipes",
    "SyncBatchNorm": "recipes",
}

__all__ = [
    "ArtifactError",
    "BusyError",
    "Calibration",
    "CalibrationError",
    "Case",
    "CheckpointError",
    "Conversion",
    "DataError",
    "Drift",
    "Epoch",
    "ExportError",
    "FineTune",
    "Graph",
    "History",
    "ImpossibleNumbersError",
    "InstallationError",
    "LayerError",
    "Metrics",
    "NormSwapError",
    "OnnxModel",
    "Option",
    "Parity",
    "ParityError",
    "Passage",
    "Plan",
    "PlanEntry",
    "PlanError",
    "Progress",
    "Push",
    "Recommendation",
    "Site",
    "SiteDrift",
    "Source",
    "SpecError",
    "SwapError",
    "Sweep",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingProgress",
    "WalkError",
    "__version__",
    "apply_plan",
    "calibrate",
    "convert",
    "evaluate",
    "export_onnx",
    "finetune",
    "layers",
    "load",
    "load_model",
    "load_onnx",
    "measure_drift",
    "plan",
    "push_to_hub",
    "recipes",
    "recommend",
    "register_batchnorm",
    "save",
    "sweep",
    "unwrap",
    "verify_onnx",
    "walk",
]

if TYPE_CHECKING:
    from normswap import layers, recipes
    from normswap.artifact import Push, load, load_model, push_to_hub, save
    from normswap.calibration import Calibration
    from normswap.calibration.calibrate import calibrate
    from normswap.drift import Drift, SiteDrift, measure_drift
    from normswap.errors import (
        ArtifactError,
        BusyError,
        CalibrationError,
        CheckpointError,
        DataError,
        ExportError,
        ImpossibleNumbersError,
        InstallationError,
        LayerError,
        NormSwapError,
        ParityError,
        PlanError,
        SpecError,
        SwapError,
        TrainingError,
        WalkError,
    )
    from normswap.graph import Graph, Site, register_batchnorm, walk
    from normswap.keeping import apply_plan, convert
    from normswap.onnx import Case, OnnxModel, Parity, export_onnx, load_onnx, verify_onnx
    from normswap.passage import Passage
    from normswap.planning import Plan, PlanEntry, plan
    from normswap.progress import Progress
    from normswap.recipes import BatchNorm as BatchNorm
    from normswap.recipes import BatchRenorm as BatchRenorm
    from normswap.recipes import CrossIterationBatchNorm as CrossIterationBatchNorm
    from normswap.recipes import FilterResponseNorm as FilterResponseNorm
    from normswap.recipes import FrozenBatchNorm as FrozenBatchNorm
    from normswap.recipes import GroupNorm as GroupNorm
    from normswap.recipes import InstanceNorm as InstanceNorm
    from normswap.recipes import LayerNorm as LayerNorm
    from normswap.recipes import SyncBatchNorm as SyncBatchNorm
    from normswap.recommendation import Recommendation, recommend
    from normswap.sources import Source
    from normswap.swap import Conversion
    from normswap.sweeps import Sweep, sweep
    from normswap.training import (
        Epoch,
        FineTune,
        History,
        Metrics,
        TrainingInterrupted,
        TrainingProgress,
        evaluate,
        finetune,
    )
    from normswap.unwrapping import unwrap
    from normswap.verdict import Option
else:  # a type checker that saw this would believe in every name

    def __getattr__(name: str) -> Any:
        if name in ("layers", "recipes"):
            return importlib.import_module(f"normswap.{name}")
        if name in _HOME:
            value = getattr(importlib.import_module(f"normswap.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
