"""What a proof asks of a file: inputs, and what the model makes of them. The model is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normswap.onnx.proving.soundness import unsound
from normswap.onnx.proving.trials import (
    GroundTruth,
    Reference,
    Trial,
    model_mixes_rows,
    random_inputs,
    randomised,
    trials_for,
)
from normswap.onnx.subject import Subject
from normswap.onnx.writing.draft import Options


@dataclass(frozen=True)
class Expectation:
    """Trials, each with the outputs that are right.

    Attributes:
        subject: the model in its own precision.
        truth: how to ask it more.
        trials: the inputs.
        references: what the model makes of each; empty where it makes nonsense.
        mixed: the model itself gives a sample another output in another batch.
        nonsense: why nothing can be compared with this model; None if it can.
    """

    subject: Subject
    truth: GroundTruth
    trials: tuple[Trial, ...]
    references: tuple[Reference, ...] = ()
    mixed: bool = False
    nonsense: str | None = None


def expect(
    subject: Subject, options: Options, *, images: Any = None, tolerance: float | None = None
) -> Expectation:
    """Everything that a file of this model must give.

    Args:
        subject: the model.
        options: how it is exported.
        images: preprocessed images, beside random inputs.
        tolerance: largest error that passes, in place of the rule.
    """
    trials = trials_for(
        subject,
        static_batch=options.static_batch,
        dynamic_size=options.dynamic_size,
        images=images,
    )
    nonsense = unsound(subject, trials)
    truth = GroundTruth.of(subject, tolerance=tolerance, half=options.half)
    if nonsense is not None:
        return Expectation(subject, truth, tuple(trials), nonsense=nonsense)
    return _asked(truth, trials)


def expect_of_randomised(asked: Expectation, options: Options) -> Expectation:
    """The same of a copy whose statistics and affine values nothing can hide behind."""
    subject = randomised(asked.subject)
    rows = 2 if not options.static_batch else (subject.signature.batch or 1)
    trial = Trial(f"random inputs, batch {rows}", random_inputs(subject, rows), rows)
    truth = GroundTruth.of(subject, tolerance=asked.truth.tolerance, half=asked.truth.half)
    return _asked(truth, [trial])


def _asked(truth: GroundTruth, trials: Sequence[Trial]) -> Expectation:
    mixed = model_mixes_rows(truth.subject, trials)
    references = truth.references(trials, mixed=mixed)
    return Expectation(truth.subject, truth, tuple(trials), tuple(references), mixed)
