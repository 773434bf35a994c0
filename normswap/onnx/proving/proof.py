"""The proof: torch eager against onnxruntime, stage by stage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from normswap.errors import ExportError, in_short
from normswap.graph.norms import is_batchnorm, state_of
from normswap.onnx.file.metadata import Metadata
from normswap.onnx.file.parity import (
    MARGIN,
    NOT_FINITE,
    Array,
    Case,
    Divergence,
    Parity,
    compare,
    passes,
    relative_error,
    summarise,
    tolerance_for,
)
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.session import LEVELS, Failed, Here, Outputs, Runner
from normswap.onnx.proving import blame
from normswap.onnx.proving.detections import (
    DetectorExpectation,
    examine_detector,
    expect_detections,
    expect_of_randomised_detector,
)
from normswap.onnx.proving.evidence import Evidence
from normswap.onnx.proving.expectation import Expectation, expect, expect_of_randomised
from normswap.onnx.proving.overflow import wide_inputs
from normswap.onnx.proving.trials import Reference, Trial
from normswap.onnx.subject import Subject, subject_of
from normswap.onnx.writing.draft import Draft, Options
from normswap.onnx.writing.program import write_program


def asked_of(
    subject: Subject, options: Options, *, images: Any = None, tolerance: float | None = None
) -> Expectation:
    """Everything that a file of a model must give; of a detector, what it must find."""
    ask = expect_detections if subject.detector else expect
    return ask(subject, options, images=images, tolerance=tolerance)


def prove_draft(draft: Draft, asked: Expectation) -> Parity:
    """The whole proof of a freshly exported file, and of an export of a randomised copy."""
    if asked.nonsense is not None:
        return _no_proof(asked.nonsense)
    evidence = _examine(draft.file, asked, Here())
    cases = _program_cases(draft, asked) + evidence.cases
    if all(case.passed for case in cases):
        cases += _randomised_cases(asked, draft.options)
    bad = next((case for case in cases if not case.passed), None)
    notes = evidence.notes
    if draft.options.half:
        notes += _overflow_notes(asked.subject, asked.trials)
    if bad is None:
        return summarise(cases, notes=notes)
    divergence, explained = None, _batch_statistics(asked.subject.model, bad) or _sensitive(cases)
    if evidence.failing is not None and explained is None:
        limit = tolerance_for(0.0, half=draft.options.half)
        divergence = blame.against_program(draft, evidence.failing.inputs, asked.subject, limit)
    return _failed(cases, bad, divergence, explained, None, notes)


def _batch_statistics(model: nn.Module, bad: Case) -> str | None:
    """Why a sample's output depends on the others of its batch, where a norm makes it do so."""
    if bad.stage != "row independence":
        return None
    untracked = [
        name or "the model"
        for name, module in model.named_modules()
        if is_batchnorm(module) and state_of(module).mean is None
    ]
    if not untracked:
        return None
    return (
        f"{', '.join(untracked[:3])}: a BatchNorm without running statistics "
        "(track_running_stats=False) normalises by the batch's own, so that a sample's output "
        "depends on the others in its batch; replace it, or train it with running statistics"
    )


def _overflow_notes(subject: Subject, trials: Sequence[Trial]) -> tuple[str, ...]:
    """Real images say most about magnitudes; without them, what there is."""
    images = [trial for trial in trials if "images" in trial.name] or list(trials)
    found = wide_inputs(subject, [trial.inputs for trial in images])
    return tuple(
        f"{name}: inputs up to {value:.0f} have squares that float16 cannot hold; "
        "its statistics are in float32"
        for name, value in found.items()
    )


def prove_file(
    file: OnnxFile,
    model: nn.Module,
    example_inputs: Any,
    metadata: Metadata | None,
    *,
    runner: Runner,
    images: Any = None,
    tolerance: float | None = None,
) -> Parity:
    """The proof of a file that was written before, against the model it should be.

    The file holds the model's own weights, so the randomised copy is exported here, as the file
    was: that stage speaks of the exporter, the others of the file.

    Raises:
        ExportError: no example inputs, and none recorded in the file.
    """
    if example_inputs is None:
        example_inputs = _recorded_inputs(file, metadata)
    subject = _named_as(file, subject_of(model, example_inputs))
    options = _options(file, metadata, subject)
    asked = asked_of(subject, options, images=images, tolerance=tolerance)
    if asked.nonsense is not None:
        return _no_proof(asked.nonsense)
    evidence = _examine(file, asked, runner)
    cases, notes = evidence.cases, evidence.notes
    if all(case.passed for case in cases):
        try:
            cases = cases + _randomised_cases(asked, options)
        except ExportError as error:
            notes += (f"the randomised copy was not tried: {in_short(error)}",)
    identity = None if metadata is None else metadata.intact
    problem = metadata.problem if metadata is not None else None
    bad = next((case for case in cases if not case.passed), None)
    if bad is None:
        stage = "identity" if problem else None
        return summarise(cases, failure=problem, stage=stage, identity=identity, notes=notes)
    divergence, explained = None, _batch_statistics(subject.model, bad) or _sensitive(cases)
    if evidence.failing is not None and explained is None:
        divergence = _blame(file, subject, options, evidence.failing, runner)
    return replace(_failed(cases, bad, divergence, explained, problem, notes), identity=identity)


def _no_proof(nonsense: str) -> Parity:
    """The verdict on a model that nothing can be compared with."""
    failure = f"the model itself: {nonsense}; a proof against that is no proof"
    return summarise([], failure=failure, stage="model", cause="network")


def _sensitive(cases: Sequence[Case]) -> str | None:
    """That torch is as far from float64 as the file, where that alone is what failed."""
    errors: dict[str, float] = {}
    for case in cases:
        errors[case.output] = max(case.torch_error, errors.get(case.output, 0.0))
    bad = [case for case in cases if not case.passed]
    if any(case.problem or case.error > MARGIN * errors[case.output] for case in bad):
        return None
    worst = max(errors[case.output] for case in bad)
    return (
        f"this is the network and not the file: torch's own run is {worst:.1e} from float64 on "
        "such inputs, and the file is no further away than rounding explains"
    )


def _failed(
    cases: list[Case],
    bad: Case,
    divergence: Divergence | None,
    explained: str | None,
    problem: str | None,
    notes: tuple[str, ...],
) -> Parity:
    parts = [f"function: {bad.describe()}"]
    if explained is not None:
        parts.insert(0, explained)
    if divergence is not None:
        parts.append(divergence.describe())
    if problem is not None:
        parts.append(problem)
    return summarise(
        cases,
        failure="; ".join(parts),
        stage=bad.stage,
        divergence=divergence,
        notes=notes,
        cause="file" if explained is None and bad.problem != NOT_FINITE else "network",
    )


def _examine(file: OnnxFile, asked: Expectation, runner: Runner, *, copy: bool = False) -> Evidence:
    """Every trial at every optimisation level, and each sample alone against in a batch."""
    if isinstance(asked, DetectorExpectation):
        return examine_detector(file, asked, runner, copy=copy)
    trials, references = asked.trials, asked.references
    cases: list[Case] = []
    failing: Trial | None = None
    runs = runner.run(file.path, LEVELS, [trial.inputs for trial in trials])
    for level, found in zip(LEVELS, runs, strict=True):
        for trial, reference, outputs in zip(trials, references, found, strict=True):
            fresh = _cases(asked, trial, reference, outputs, f"onnxruntime {level}", copy=copy)
            cases += fresh
            if failing is None and not all(case.passed for case in fresh):
                failing = trial
        cases += _row_cases(trials, references, found, level, copy=copy)
    notes = []
    if asked.mixed:
        notes.append("the model itself gives a sample another output in another batch")
    if asked.truth.double is None:
        notes.append("the model cannot run in float64: its own precision is the reference")
    return Evidence(cases, failing, tuple(notes))


def _cases(
    asked: Expectation,
    trial: Trial,
    reference: Reference,
    outputs: Outputs | Failed,
    stage: str,
    *,
    copy: bool,
) -> list[Case]:
    def case(name: str, **facts: Any) -> Case:
        return Case(trial.name, stage, name, trial.batch, randomised=copy, **facts)

    names = asked.subject.outputs
    if isinstance(outputs, list) and len(outputs) != len(names):
        outputs = Failed(f"{len(outputs)} outputs where the model has {len(names)}")
    if isinstance(outputs, Failed):
        facts = {"error": float("inf"), "torch_error": 0.0, "tolerance": 0.0}
        return [case(names[0], **facts, passed=False, problem=outputs.message)]
    cases = []
    for index, name in enumerate(names):
        error = reference.torch_errors[index]
        limit = reference.tolerances[index]
        result = compare(outputs[index], reference.outputs[index], tie=limit)
        made = case(
            name,
            error=result.error,
            torch_error=error,
            tolerance=limit,
            cosine=result.cosine,
            decided=result.decided,
            agreed=result.agreed,
            ties=result.ties,
            problem=result.problem,
        )
        cases.append(replace(made, passed=passes(made)))
    return cases


def _row_cases(
    trials: Sequence[Trial],
    references: Sequence[Reference],
    found: Sequence[Outputs | Failed],
    level: str,
    *,
    copy: bool,
) -> list[Case]:
    pooled = [
        (trial, reference, outputs)
        for trial, reference, outputs in zip(trials, references, found, strict=True)
        if trial.rows is not None and isinstance(outputs, list)
    ]
    if len(pooled) < 2:
        return []
    whole, reference, together = max(pooled, key=lambda item: item[0].batch)
    cases = []
    for trial, _, outputs in pooled:
        if trial is whole:
            continue
        errors = [
            relative_error(alone, many[trial.rows])
            for alone, many in zip(outputs, together, strict=True)
            if many.ndim and many.shape[0] == whole.batch
        ]
        worst, limit = max(errors, default=0.0), max(reference.tolerances)
        cases.append(
            Case(
                f"batch {trial.batch} against batch {whole.batch}, onnxruntime {level}",
                "row independence",
                "every output",
                trial.batch,
                worst,
                max(reference.torch_errors),
                limit,
                randomised=copy,
                passed=worst <= limit,
            )
        )
    return cases


def _program_cases(draft: Draft, asked: Expectation) -> list[Case]:
    """The stage between torch and ONNX: what torch.export made of the model."""
    if draft.program is None:
        return []
    pairs = list(zip(asked.trials, asked.references, strict=True))
    trial, reference = next((pair for pair in pairs if pair[0].batch == 2), pairs[0])
    run: Callable[[nn.Module], list[Array]] = asked.subject.call(trial.inputs)
    outputs: Outputs | Failed
    try:
        outputs = run(draft.program.module())
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        outputs = Failed(f"{type(error).__name__}: {error}")
    return _cases(asked, trial, reference, outputs, "exported program", copy=False)


def _randomised_cases(asked: Expectation, options: Options) -> list[Case]:
    """The same proof on a copy with other statistics and affine values."""
    detector = asked.subject.detector
    other = (
        expect_of_randomised_detector(asked) if detector else expect_of_randomised(asked, options)
    )
    with tempfile.TemporaryDirectory(prefix="normswap-") as folder:
        draft = write_program(other.subject, Path(folder) / "randomised.onnx", options)
        return _examine(draft.file, other, Here(), copy=True).cases


def _blame(
    file: OnnxFile, subject: Subject, options: Options, trial: Trial, runner: Runner
) -> Divergence | None:
    """Export the model again and find the first value of the file that is not the fresh one's."""
    with tempfile.TemporaryDirectory(prefix="normswap-") as folder:
        try:
            good = write_program(subject, Path(folder) / "good.onnx", options)
        except ExportError:
            return None
        return blame.against_file(file, good, trial.inputs, runner)


def _named_as(file: OnnxFile, subject: Subject) -> Subject:
    """The model with the names of the file, so that a value is the same value in both."""
    initial = {tensor.name for tensor in file.proto.graph.initializer}
    inputs = tuple(v.name for v in file.proto.graph.input if v.name not in initial)
    outputs = tuple(value.name for value in file.proto.graph.output)
    fits = (len(inputs), len(outputs)) == (len(subject.signature.tensors), len(subject.outputs))
    return replace(subject, inputs=inputs, outputs=outputs) if fits else subject


def _options(file: OnnxFile, metadata: Metadata | None, subject: Subject) -> Options:
    """How the file was exported: by its record, or by what its inputs look like."""
    recorded = metadata.fields.get("export") if metadata is not None else None
    facts = recorded if isinstance(recorded, dict) else {}
    opset = max(
        (o.version for o in file.proto.opset_import if o.domain in ("", "ai.onnx")), default=20
    )
    static = facts.get("static_batch")
    if not isinstance(static, bool):
        static = _fixed_batch(file, subject)
    flags = {name: facts.get(name) is True for name in ("dynamic_size", "half", "staged")}
    return Options(opset, static, **flags)


def _fixed_batch(file: OnnxFile, subject: Subject) -> bool:
    initial = {tensor.name for tensor in file.proto.graph.initializer}
    shapes = [v.type.tensor_type.shape for v in file.proto.graph.input if v.name not in initial]
    first_axes = [shape.dim[0] for shape in shapes if shape.dim]
    return (
        any(axis.HasField("dim_value") for axis in first_axes)
        and subject.signature.batch is not None
    )


def _recorded_inputs(file: OnnxFile, metadata: Metadata | None) -> Any:
    import torch

    try:
        test = metadata.self_test() if metadata is not None and metadata.intact else None
    except ValueError:
        test = None
    if test is None:
        raise ExportError(
            str(file.path),
            got="a model without example_inputs",
            need="inputs to run it on",
            hint="example_inputs=torch.randn(2, 3, 224, 224)",
        )
    found = tuple(torch.from_numpy(item.make()) for item in test.inputs)
    listed = test.detector and all(tensor.ndim == 3 for tensor in found)
    return [*found] if listed else found
