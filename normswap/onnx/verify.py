"""Check a file again: what it is, and what it computes. Free of torch unless a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.errors import ExportError
from normswap.onnx.files import OnnxFile, read_onnx
from normswap.onnx.metadata import Metadata, read_metadata
from normswap.onnx.parity import (
    Array,
    Case,
    Parity,
    check_tolerance,
    compare,
    judge,
    summarise,
)
from normswap.onnx.selftest import Expected, SelfTest, sample
from normswap.onnx.session import LEVELS, Apart, Failed, Here, Outputs, Runner, resolve_provider

if TYPE_CHECKING:
    from torch import nn


def verify_onnx(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    example_inputs: Any = None,
    provider: str | None = None,
    images: Any = None,
    tolerance: float | None = None,
) -> Parity:
    """Check that an ONNX file is the one that was proven, and that it computes what it should.

    Identity: the SHA-256 over nodes, attributes and initializers, and the one over the metadata.
    Function: without ``model`` the file's own self-test, on any machine with numpy, onnx and
    onnxruntime; with it the proof of ``export_onnx`` against the model.

    Args:
        path: the file.
        model: the model that the file should equal; needs torch.
        example_inputs: inputs for ``model``: a tensor or list is one positional argument, a tuple
            the positional arguments, a dict the keyword arguments.
        provider: onnxruntime execution provider, for example ``"cuda"``; CPU by default.
        images: preprocessed images for the proof, beside random inputs.
        tolerance: largest error that passes, in place of the rule's.

    Returns:
        The verdict; a mismatch is ``passed=False`` with ``failure`` in words, never an exception.

    Raises:
        ExportError: a file that is no ONNX model, that is not safe to open, or that carries
            nothing to check it by while no model is given.
    """
    check_tolerance(tolerance)
    if model is None and any(given is not None for given in (tolerance, images, example_inputs)):
        raise ExportError(
            "tolerance, images or example_inputs",
            got="one of them without a model",
            need="the model to prove the file against; the self-test brings its own",
            hint="model=",
        )
    file = read_onnx(path)
    metadata = read_metadata(file)
    device = resolve_provider(provider)
    if model is None:
        return _verify_alone(file, metadata, device)
    from normswap.onnx.proof import prove_file

    trusted = metadata is not None and metadata.intact
    return prove_file(
        file,
        model,
        example_inputs,
        metadata,
        runner=Here(device) if trusted else Apart(device),
        images=images,
        tolerance=tolerance,
    )


def _verify_alone(file: OnnxFile, metadata: Metadata | None, provider: str) -> Parity:
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
        cases = run_self_test(file.path, test, Here(provider))
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
    return _judged(case)


def _judged(case: Case) -> Case:
    from dataclasses import replace

    return replace(case, passed=judge(case))
