"""What a network must give whose outputs are numbers in an order: every one of them is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from normswap.errors import ExportError
from normswap.onnx.file.parity import Case, Parity, deviation, relative_error
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import MAX_STORED, MAX_TOLERANCE, Expected, SelfTest, TestInput
from normswap.onnx.file.session import LEVELS, Failed, Outputs, Runner
from normswap.onnx.proving.expectation import (
    Evidence,
    Expectation,
    GroundTruth,
    Reference,
    unsound,
)
from normswap.onnx.proving.trials import Trial, random_inputs, trials_for
from normswap.onnx.subject import Input, Subject
from normswap.onnx.writing.draft import Options
from normswap.running import watched

SQUARE_LIMIT = 255.0
"""Inputs above this have squares that float16 cannot hold (65504)."""

Run = tuple[Trial, Reference, Outputs | Failed]
"""What was asked, what is right, and what came."""


@dataclass(frozen=True)
class Rows(Expectation):
    """Trials, each with the outputs that are right.

    Attributes:
        references: what the model makes of each trial; empty where it makes nonsense.
        mixed: the model itself gives a sample another output in another batch.
        rows: of the inputs that are made for the randomised copy.
        notes: facts about the model that are worth a line in a report.
    """

    references: tuple[Reference, ...] = ()
    mixed: bool = False
    rows: int = 2
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, subject: Subject, options: Options, *, images: Any = None, tolerance: float | None
    ) -> Rows:
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
            return cls(truth, tuple(trials), nonsense)
        rows = (subject.signature.batch or 1) if options.static_batch else 2
        notes = _overflow_notes(subject, trials) if options.half else ()
        return cls._asked(truth, trials, rows, notes=notes)

    @classmethod
    def _asked(cls, truth: GroundTruth, trials: Sequence[Trial], rows: int, **facts: Any) -> Rows:
        mixed = truth.mixes_rows(trials)
        references = tuple(truth.references(trials, mixed=mixed))
        return cls(truth, tuple(trials), references=references, mixed=mixed, rows=rows, **facts)

    def of_randomised(self) -> Rows:
        """The same of a copy whose statistics and affine values nothing can hide behind."""
        inputs = random_inputs(self.subject, self.rows)
        trial = Trial(f"random inputs, batch {self.rows}", inputs, self.rows)
        return self._asked(self.truth.randomised(), [trial], self.rows, randomised=True)

    def examine(
        self, file: OnnxFile, runner: Runner, program: torch.export.ExportedProgram | None = None
    ) -> Evidence:
        """Every trial at every optimisation level, and each sample alone against in a batch."""
        levels = runner.run(file.path, LEVELS, [trial.inputs for trial in self.trials])
        cases = [] if program is None else self._program_cases(program)
        failing: Trial | None = None
        for level, found in zip(LEVELS, levels, strict=True):
            runs = list(zip(self.trials, self.references, found, strict=True))
            for run in runs:
                fresh = self._cases(*run, f"onnxruntime {level}")
                cases += fresh
                if failing is None and not all(case.passed for case in fresh):
                    failing = run[0]
            cases += self._row_cases(runs, level)
        notes = []
        if self.mixed:
            notes.append("the model itself gives a sample another output in another batch")
        if self.truth.double is None:
            notes.append("the model cannot run in float64: its own precision is the reference")
        return Evidence(cases, failing, (*notes, *self.notes))

    def _program_cases(self, program: torch.export.ExportedProgram) -> list[Case]:
        """The stage between torch and ONNX: what torch.export made of the model."""
        pairs = list(zip(self.trials, self.references, strict=True))
        trial, reference = next((pair for pair in pairs if pair[0].batch == 2), pairs[0])
        outputs: Outputs | Failed
        try:
            outputs = replace(self.subject, model=program.module()).run(trial.inputs)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            outputs = Failed(f"{type(error).__name__}: {error}")
        return self._cases(trial, reference, outputs, "exported program")

    def _cases(
        self, trial: Trial, reference: Reference, outputs: Outputs | Failed, stage: str
    ) -> list[Case]:
        def case(name: str, **facts: Any) -> Case:
            return Case(trial.name, stage, name, trial.batch, randomised=self.randomised, **facts)

        names = self.subject.outputs
        if isinstance(outputs, list) and len(outputs) != len(names):
            outputs = Failed(f"{len(outputs)} outputs where the model has {len(names)}")
        if isinstance(outputs, Failed):
            return [case(names[0]).broken(outputs.message)]
        cases = []
        for index, name in enumerate(names):
            limit = reference.tolerances[index]
            result = deviation(outputs[index], reference.outputs[index], tie=limit)
            error = reference.torch_errors[index]
            made = case(name, torch_error=error, tolerance=limit, **asdict(result))
            cases.append(made.judged())
        return cases

    def _row_cases(self, runs: Sequence[Run], level: str) -> Iterator[Case]:
        """Each sample of the pool alone against what it gives among the others."""
        pooled = [
            (trial, reference, outputs)
            for trial, reference, outputs in runs
            if trial.rows is not None and isinstance(outputs, list)
        ]
        if len(pooled) < 2:
            return
        whole, reference, together = max(pooled, key=lambda run: run[0].batch)
        for trial, _, outputs in pooled:
            if trial is whole:
                continue
            errors = [
                relative_error(alone, many[trial.rows])
                for alone, many in zip(outputs, together, strict=True)
                if many.ndim and many.shape[0] == whole.batch
            ]
            worst, limit = max(errors, default=0.0), max(reference.tolerances)
            yield Case(
                f"batch {trial.batch} against batch {whole.batch}, onnxruntime {level}",
                "row independence",
                "every output",
                trial.batch,
                worst,
                max(reference.torch_errors),
                limit,
                randomised=self.randomised,
                passed=worst <= limit,
            )

    def self_test(self, file: OnnxFile, parity: Parity) -> SelfTest:
        """The example's shapes, judged as the proof was; inputs without rows keep their values.

        Raises:
            ExportError: the model gives NaN or infinity on such inputs.
        """
        del file
        proven: dict[str, float] = {}
        for case in parity.cases:
            if not case.randomised:
                proven[case.output] = max(case.tolerance, proven.get(case.output, 0.0))
        signature = self.subject.signature
        inputs = tuple(_test_input(1000 + i, item) for i, item in enumerate(signature.inputs))
        arrays = [item.make() for item in inputs]
        reference = self.truth.reference(Trial("self-test", arrays, signature.batch or 1))
        if not all(np.isfinite(array).all() for array in reference.outputs):
            raise ExportError(
                type(self.subject.model).__name__,
                got="NaN or Inf from the model itself on random inputs",
                need="a finite output, to record a self-test by",
                hint="example_inputs of the shape and range that the model is made for",
            )
        outputs = tuple(
            Expected.of(name, array, min(MAX_TOLERANCE, max(limit, proven.get(name, 0.0))), error)
            for name, array, limit, error in zip(
                self.subject.outputs,
                reference.outputs,
                reference.tolerances,
                reference.torch_errors,
                strict=True,
            )
        )
        return SelfTest(inputs, outputs)


def _test_input(seed: int, item: Input) -> TestInput:
    array = item.example
    whole = array.dtype.kind != "f" and array.size > 0
    span = (int(array.min()), int(array.max())) if whole else (0, 0)
    kept = None
    if not item.rows and array.size <= MAX_STORED:
        kept = tuple(array.reshape(-1).tolist())
    return TestInput(item.shape, str(array.dtype), seed, *span, kept)


def _overflow_notes(subject: Subject, trials: Sequence[Trial]) -> tuple[str, ...]:
    """Norms whose inputs are so large that float16 cannot hold their squares.

    Real images say most about magnitudes; without them, what there is.
    """
    seen: dict[str, float] = {}

    def see(name: str, inputs: tuple[object, ...]) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.numel():
                seen[name] = max(seen.get(name, 0.0), float(value.abs().max()))

    with watched(subject.model, see, subject.norms, before=True):
        for trial in [trial for trial in trials if "images" in trial.name] or trials:
            subject.run(trial.inputs)
    return tuple(
        f"{name}: inputs up to {value:.0f} have squares that float16 cannot hold; "
        "its statistics are in float32"
        for name, value in seen.items()
        if value > SQUARE_LIMIT
    )
