"""Check a file by what it brings: its hashes, and the outputs recorded in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from normswap.errors import ExportError
from normswap.onnx.file.metadata import Metadata
from normswap.onnx.file.parity import Array, Case, Parity, compare, passes, summarise
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import Expected, SelfTest, sample
from normswap.onnx.file.session import LEVELS, Failed, Outputs, Runner


def verify_alone(file: OnnxFile, metadata: Metadata | None, runner: Runner) -> Parity:
    """Identity, and the self-test that the file brings; no model is needed.

    Raises:
        ExportError: a file that carries nothing to check it by.
    """
    if metadata is None:
        raise ExportError(
            str(file.path),
            got="an ONNX file without normswap's metadata",
            need="a file that export_onnx wrote, or the model to compare with",
            hint="giving the model",
        )
    if metadata.problem is not None:  # no session for a file that is not the proven one
        return summarise([], failure=metadata.problem, stage="identity", identity=False)
    notes = _notes(metadata)
    try:
        test = metadata.self_test()
        cases = run_self_test(file.path, test, runner)
    except ValueError as error:
        failure = f"identity: {error}"
        return summarise([], failure=failure, stage="identity", identity=False, notes=notes)
    bad = [case for case in cases if not case.passed]
    verdict = f"function: {bad[0].describe()}" if bad else None
    stage = bad[0].stage if bad else None
    return summarise(cases, failure=verdict, stage=stage, identity=True, notes=notes)


def _notes(metadata: Metadata) -> tuple[str, ...]:
    proof = metadata.fields.get("proof")
    if isinstance(proof, dict) and proof.get("passed") is False:
        return ("this file was written although its proof failed (allow_mismatch)",)
    return ()


def run_self_test(path: Path, test: SelfTest, runner: Runner) -> list[Case]:
    """Make the inputs, run the file at every optimisation level, compare with what is recorded."""
    inputs = [item.make() for item in test.inputs]
    cases: list[Case] = []
    for level, found in zip(LEVELS, runner.run(path, LEVELS, [inputs]), strict=True):
        cases += _self_test_cases(found[0], test.outputs, f"self-test, onnxruntime {level}")
    return cases


def _self_test_cases(
    found: Outputs | Failed, expected: Sequence[Expected], stage: str
) -> list[Case]:
    if isinstance(found, Failed):
        return [_failed(stage, found.message)]
    if len(found) != len(expected):
        return [_failed(stage, f"{len(found)} outputs where {len(expected)} are recorded")]
    return [_self_test_case(*pair, stage) for pair in zip(found, expected, strict=True)]


def _failed(stage: str, problem: str) -> Case:
    return Case(
        "recorded inputs", stage, "", 0, float("inf"), 0.0, 0.0, passed=False, problem=problem
    )


def _self_test_case(value: Array, expected: Expected, stage: str) -> Case:
    if tuple(value.shape) != expected.shape:
        problem = f"shape {list(value.shape)} where {list(expected.shape)} is recorded"
        return _failed(stage, f"output {expected.name!r}: {problem}")
    whole = value.size == expected.values.size
    reference = expected.values.reshape(value.shape) if whole else expected.values
    mine = value if whole else sample(value)
    result = compare(mine, reference, tie=expected.tolerance)
    error = result.error
    if result.problem is None and expected.scale > 0 and not whole:
        error *= float(abs(reference).max()) / expected.scale  # the scale of the whole output
    case = Case(
        name="recorded inputs",
        stage=stage,
        output=expected.name,
        batch=expected.shape[0] if expected.shape else 1,
        error=error,
        torch_error=expected.torch_error,
        tolerance=expected.tolerance,
        cosine=result.cosine,
        decided=result.decided,
        agreed=result.agreed,
        ties=result.ties,
        problem=result.problem,
    )
    return replace(case, passed=passes(case))
