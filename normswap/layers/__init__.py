"""Normalisers that train with small batches: one file each, torch only.

They know of tensors and of the layer before them, never of models. ``GroupNorm``
and ``InstanceNorm`` are torch's own.
"""

from __future__ import annotations

from normswap.layers.batch_renorm import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    BatchRenormAct2d,
)
from normswap.layers.batch_statistics import TracksBatches
from normswap.layers.cross_iteration_batch_norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    CrossIterationBatchNormAct2d,
)
from normswap.layers.evo_norm import EvoNorm1d, EvoNorm2d, EvoNorm3d, EvoNormAct2d
from normswap.layers.filter_response_norm import (
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
    FilterResponseNormAct2d,
    filter_response_norm,
    plain_filter_response_norm,
)
from normswap.layers.frozen_batch_norm import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
)
from normswap.layers.fused import GroupNormAct, InstanceNormAct2d, fuse, fused_classes
from normswap.layers.ghost_batch_norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormAct2d,
)
from normswap.layers.producers import patches, producer_problem
from normswap.layers.sync_batch_norm import SyncBatchNorm
from normswap.layers.thresholded_linear_unit import ThresholdedLinearUnit
from normswap.layers.training_state import load_training_state, training_state
from normswap.layers.weight_standardisation import (
    WeightStandardisedConv1d,
    WeightStandardisedConv2d,
    WeightStandardisedConv3d,
    fold_weights,
    standardised_classes,
)

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormAct2d",
    "CrossIterationBatchNorm1d",
    "CrossIterationBatchNorm2d",
    "CrossIterationBatchNorm3d",
    "CrossIterationBatchNormAct2d",
    "EvoNorm1d",
    "EvoNorm2d",
    "EvoNorm3d",
    "EvoNormAct2d",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "FilterResponseNormAct2d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenBatchNormAct2d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormAct2d",
    "GroupNormAct",
    "InstanceNormAct2d",
    "SyncBatchNorm",
    "ThresholdedLinearUnit",
    "TracksBatches",
    "WeightStandardisedConv1d",
    "WeightStandardisedConv2d",
    "WeightStandardisedConv3d",
    "filter_response_norm",
    "fold_weights",
    "fuse",
    "fused_classes",
    "load_training_state",
    "patches",
    "plain_filter_response_norm",
    "producer_problem",
    "standardised_classes",
    "training_state",
]
