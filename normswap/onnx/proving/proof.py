"""The proof: a file against the model, stage by stage, and what is to blame where it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from normswap.errors import ExportError, in_short
from normswap.onnx.file.metadata import Metadata
from normswap.onnx.file.parity import NOT_FINITE, Case, Divergence, Parity, summarise, tolerance_for
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.session import Here, Runner
from normswap.onnx.proving import blame
from normswap.onnx.proving.detections import Detections
from normswap.onnx.proving.expectation import Evidence, Expectation
from normswap.onnx.proving.rows import Rows
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import Subject, subject_of
from normswap.onnx.writing.draft import Draft, Options
from normswap.onnx.writing.program import write_program

_STAGED = "the norms' means are taken in stages: onnxruntime's own running sums were too inexact"

Suspects = Callable[[Trial], Divergence | None]
"""Looks for the first wrong value on a trial that failed."""


def asked_of(
    subject: Subject, options: Options, *, images: Any = None, tolerance: float | None = None
) -> Expectation:
    """Everything that a file of a model must give; of a detector, what it must find."""
    if subject.detector:
        return Detections.of(subject, options, images=images, tolerance=tolerance)
    return Rows.of(subject, options, images=images, tolerance=tolerance)


def prove_fastest(asked: Expectation, path: Path, options: Options) -> tuple[Draft, Parity]:
    """The fastest form of the graph that passes the proof; the last one tried if none does."""
    tried: list[tuple[Draft, Parity]] = []
    for form in (options, replace(options, staged=True)):
        draft = write_program(asked.subject, path, form)
        if form.staged and not draft.staged:
            break  # no norm whose means could be taken in stages
        tried.append((draft, prove_draft(draft, asked)))
        if not _inexact(tried[-1][1]):
            break
    return tried[-1]


def _inexact(parity: Parity) -> bool:
    """Whether onnxruntime's numbers are wrong, and nothing else is."""
    bad = [case for case in parity.cases if not case.passed]
    return bool(bad) and all(
        case.problem is None and case.stage != "exported program" for case in bad
    )


def prove_draft(draft: Draft, asked: Expectation) -> Parity:
    """The whole proof of a freshly exported file, and of an export of a randomised copy."""
    if asked.nonsense is not None:
        return _no_proof(asked.nonsense)
    evidence = asked.examine(draft.file, Here(), draft.program)
    if all(case.passed for case in evidence.cases):
        evidence.cases.extend(_randomised_cases(asked, draft.options))
    if draft.staged:
        evidence = replace(evidence, notes=(*evidence.notes, _STAGED))
    limit = tolerance_for(0.0, half=draft.options.half)
    return _verdict(
        evidence,
        asked.subject.model,
        lambda trial: blame.against_program(draft, trial.inputs, asked.subject, limit),
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
    evidence = asked.examine(file, runner)
    if all(case.passed for case in evidence.cases):
        try:
            evidence.cases.extend(_randomised_cases(asked, options))
        except ExportError as error:
            note = f"the randomised copy was not tried: {in_short(error)}"
            evidence = replace(evidence, notes=(*evidence.notes, note))
    parity = _verdict(
        evidence,
        subject.model,
        lambda trial: _edited(file, subject, options, trial, runner),
        problem=None if metadata is None else metadata.problem,
    )
    return replace(parity, identity=None if metadata is None else metadata.intact)


def _no_proof(nonsense: str) -> Parity:
    """The verdict on a model that nothing can be compared with."""
    failure = f"the model itself: {nonsense}; a proof against that is no proof"
    return summarise([], failure=failure, stage="model", cause="network")


def _verdict(
    evidence: Evidence, model: nn.Module, suspects: Suspects, *, problem: str | None = None
) -> Parity:
    """What the evidence says; where something failed, why and where.

    Args:
        evidence: of all stages.
        model: what the file should compute.
        suspects: where to look if the file is to blame.
        problem: what is wrong with the file apart from what it computes.
    """
    cases, notes = evidence.cases, evidence.notes
    bad = next((case for case in cases if not case.passed), None)
    if bad is None:
        stage = "identity" if problem else None
        return summarise(cases, failure=problem, stage=stage, notes=notes)
    explained = blame.excuse(model, cases, bad)
    divergence = None
    if evidence.failing is not None and explained is None:
        divergence = suspects(evidence.failing)
    found = divergence and divergence.describe()
    parts = [explained, f"function: {bad.describe()}", found, problem]
    return summarise(
        cases,
        failure="; ".join(part for part in parts if part),
        stage=bad.stage,
        divergence=divergence,
        notes=notes,
        cause="file" if explained is None and bad.problem != NOT_FINITE else "network",
    )


def _randomised_cases(asked: Expectation, options: Options) -> list[Case]:
    """The same proof on a copy with other statistics and affine values."""
    other = asked.of_randomised()
    with tempfile.TemporaryDirectory(prefix="normswap-") as folder:
        draft = write_program(other.subject, Path(folder) / "randomised.onnx", options)
        return other.examine(draft.file, Here()).cases


def _edited(
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
    fits = (len(inputs), len(outputs)) == (len(subject.signature.inputs), len(subject.outputs))
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
