"""Check a file by what it brings: its hashes, and the outputs recorded in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from normswap import children
from normswap.errors import ExportError
from normswap.onnx.file.metadata import Metadata
from normswap.onnx.file.parity import CEILING, Array, Case, Parity, compare, passes, summarise
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import Expected, SelfTest, sample
from normswap.onnx.file.session import LEVELS, Failed, Here, Outputs, start_worker


def verify_alone(
    file: OnnxFile, metadata: Metadata | None, provider: str, timeout: float | None
) -> Parity:
    """Identity, and the self-test that the file brings; no model is needed.

    Args:
        file: the file.
        metadata: its record.
        provider: execution provider.
        timeout: seconds that the self-test may take, in a process of its own; None runs it in
            this one, without limits.

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
    try:
        test = metadata.self_test()
    except ValueError as error:
        failure, notes = f"identity: {error}", _notes(metadata, None)
        return summarise([], failure=failure, stage="identity", identity=False, notes=notes)
    notes = _notes(metadata, test)
    cases = _self_test(file.path, test, provider, timeout)
    bad = [case for case in cases if not case.passed]
    verdict = f"function: {bad[0].describe()}" if bad else None
    stage = bad[0].stage if bad else None
    return summarise(cases, failure=verdict, stage=stage, identity=True, notes=notes)


def _notes(metadata: Metadata, test: SelfTest | None) -> tuple[str, ...]:
    notes = []
    proof = metadata.fields.get("proof")
    if isinstance(proof, dict) and proof.get("passed") is False:
        notes.append("this file was written although its proof failed (allow_mismatch)")
    loosest = max((output.tolerance for output in test.outputs), default=0.0) if test else 0.0
    if loosest > CEILING:
        notes.append(
            f"the file asks for a tolerance of {loosest:g}, more than the rule's {CEILING:g} for "
            "float32"
        )
    return tuple(notes)


def _self_test(path: Path, test: SelfTest, provider: str, timeout: float | None) -> list[Case]:
    if timeout is None:
        return run_self_test(path, test, provider)
    request = {"do": "self-test", "path": str(path.resolve()), "test": test.to_json()}
    child = start_worker(provider)
    try:
        answer, _ = child.ask({**request, "provider": provider}, clock=children.Clock(timeout))
    except children.ChildError as error:
        return [_failed("self-test", f"onnxruntime {error}")]
    finally:
        child.close()
    if "failed" in answer:
        return [_failed("self-test", answer["failed"])]
    return [Case(**facts) for facts in answer["cases"]]


def run_self_test(path: Path, test: SelfTest, provider: str) -> list[Case]:
    """Make the inputs, run the file at every optimisation level, compare with what is recorded."""
    inputs = [item.make() for item in test.inputs]
    cases: list[Case] = []
    for level, found in zip(LEVELS, Here(provider).run(path, LEVELS, [inputs]), strict=True):
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
        shapes = f"shape {list(value.shape)} where {list(expected.shape)} is recorded"
        return _failed(stage, f"output {expected.name!r}: {shapes}")
    whole = value.size == expected.values.size
    reference = expected.values.reshape(value.shape) if whole else expected.values
    mine = value if whole else sample(value)
    result = compare(mine, reference, tie=expected.tolerance)
    error, problem = result.error, result.problem
    if problem is None and not whole:  # the scale is the one of the whole output
        error *= (_most(reference) or 1.0) / (expected.scale or 1.0)
        if abs(_most(value) - expected.scale) > expected.tolerance * expected.scale:
            problem = f"values up to {_most(value):.3g} where {expected.scale:.3g} is recorded"
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
        problem=problem,
    )
    return replace(case, passed=passes(case))


def _most(array: Array) -> float:
    return float(np.max(np.abs(array.astype(np.float64)), initial=0.0))
