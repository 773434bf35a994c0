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
    "Option": "recommendation",
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
    from normswap import layers as layers
    from normswap import recipes as recipes
    from normswap.artifact import Push as Push
    from normswap.artifact import load as load
    from normswap.artifact import load_model as load_model
    from normswap.artifact import push_to_hub as push_to_hub
    from normswap.artifact import save as save
    from normswap.calibration import Calibration as Calibration
    from normswap.calibration.calibrate import calibrate as calibrate
    from normswap.drift import Drift as Drift
    from normswap.drift import SiteDrift as SiteDrift
    from normswap.drift import measure_drift as measure_drift
    from normswap.errors import ArtifactError as ArtifactError
    from normswap.errors import BusyError as BusyError
    from normswap.errors import CalibrationError as CalibrationError
    from normswap.errors import CheckpointError as CheckpointError
    from normswap.errors import DataError as DataError
    from normswap.errors import ExportError as ExportError
    from normswap.errors import ImpossibleNumbersError as ImpossibleNumbersError
    from normswap.errors import InstallationError as InstallationError
    from normswap.errors import LayerError as LayerError
    from normswap.errors import NormSwapError as NormSwapError
    from normswap.errors import ParityError as ParityError
    from normswap.errors import PlanError as PlanError
    from normswap.errors import SpecError as SpecError
    from normswap.errors import SwapError as SwapError
    from normswap.errors import TrainingError as TrainingError
    from normswap.errors import WalkError as WalkError
    from normswap.graph import Graph as Graph
    from normswap.graph import Site as Site
    from normswap.graph import register_batchnorm as register_batchnorm
    from normswap.graph import walk as walk
    from normswap.keeping import apply_plan as apply_plan
    from normswap.keeping import convert as convert
    from normswap.onnx import Case as Case
    from normswap.onnx import OnnxModel as OnnxModel
    from normswap.onnx import Parity as Parity
    from normswap.onnx import export_onnx as export_onnx
    from normswap.onnx import load_onnx as load_onnx
    from normswap.onnx import verify_onnx as verify_onnx
    from normswap.passage import Passage as Passage
    from normswap.planning import Plan as Plan
    from normswap.planning import PlanEntry as PlanEntry
    from normswap.planning import plan as plan
    from normswap.progress import Progress as Progress
    from normswap.recipes import BatchNorm as BatchNorm
    from normswap.recipes import BatchRenorm as BatchRenorm
    from normswap.recipes import CrossIterationBatchNorm as CrossIterationBatchNorm
    from normswap.recipes import FilterResponseNorm as FilterResponseNorm
    from normswap.recipes import FrozenBatchNorm as FrozenBatchNorm
    from normswap.recipes import GroupNorm as GroupNorm
    from normswap.recipes import InstanceNorm as InstanceNorm
    from normswap.recipes import LayerNorm as LayerNorm
    from normswap.recipes import SyncBatchNorm as SyncBatchNorm
    from normswap.recommendation import Option as Option
    from normswap.recommendation import Recommendation as Recommendation
    from normswap.recommendation import recommend as recommend
    from normswap.sources import Source as Source
    from normswap.swap import Conversion as Conversion
    from normswap.sweeps import Sweep as Sweep
    from normswap.sweeps import sweep as sweep
    from normswap.training import Epoch as Epoch
    from normswap.training import FineTune as FineTune
    from normswap.training import History as History
    from normswap.training import Metrics as Metrics
    from normswap.training import TrainingInterrupted as TrainingInterrupted
    from normswap.training import TrainingProgress as TrainingProgress
    from normswap.training import evaluate as evaluate
    from normswap.training import finetune as finetune
    from normswap.unwrapping import unwrap as unwrap
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
