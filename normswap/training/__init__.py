"""Fine-tuning and scoring: the small-batch loop on accelerate, with exact resume.

This room knows normalisation layers and classifiers in general, and no architecture.
"""

from normswap.training.checkpoints import read_checkpoint, write_checkpoint
from normswap.training.execution import TrainingInterrupted
from normswap.training.loop import finetune
from normswap.training.options import FineTune
from normswap.training.parameters import (
    classifier_of,
    is_norm,
    parameter_groups,
    relative_steps,
    steady_statistics,
)
from normswap.training.records import (
    Epoch,
    History,
    TrainingProgress,
    draw_learning_curve,
    read_metrics,
)
from normswap.training.scoring import evaluate
from normswap.training.tasks import Metrics
from normswap.training.tasks.distillation import distillation_loss

__all__ = [
    "Epoch",
    "FineTune",
    "History",
    "Metrics",
    "TrainingInterrupted",
    "TrainingProgress",
    "classifier_of",
    "distillation_loss",
    "draw_learning_curve",
    "evaluate",
    "finetune",
    "is_norm",
    "parameter_groups",
    "read_checkpoint",
    "read_metrics",
    "relative_steps",
    "steady_statistics",
    "write_checkpoint",
]
