"""Check a file by what it brings: its hashes, and the outputs recorded in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx

from normswap import children
from normswap.errors import ExportError
from normswap.onnx.file.detections import KEYS, describe, detects, ill_formed, match, rows_apart
from normswap.onnx.file.metadata import Metadata
from normswap.onnx.file.parity import CEILING, Array, Case, Parity, deviation, summarise
from normswap.onnx.file.parsing import OnnxFile, read_onnx
from normswap.onnx.file.selftest import Expected, SelfTest, sample
from normswap.onnx.file.session import LEVELS, Failed, Here, Outputs, start_worker
from normswap.onnx.file.variants import with_outputs, with_threshold, written


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
    if test and test.detector and not test.outputs:
        notes.append(
            "the self-test compares what the detector decides by and no detection: none was firm"
        )
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
    if test.detector:
        return _run_detector(path, test, inputs, provider)
    cases: list[Case] = []
    for level, found in zip(LEVELS, Here(provider).run(path, LEVELS, [inputs]), strict=True):
        cases += _self_test_cases(found[0], test.outputs, f"self-test, onnxruntime {level}")
    return cases


def _run_detector(path: Path, test: SelfTest, inputs: list[Array], provider: str) -> list[Case]:
    """Run a copy that gives its last layers too, with the threshold of the test."""
    file = read_onnx(path)
    names = [value.name for value in file.proto.graph.output]
    proto: onnx.ModelProto | None = file.proto
    if test.shift is not None:
        proto = with_threshold(file.proto, test.shift.own, test.shift.other)
    if proto is None:
        return [_failed("self-test", "its score threshold is not the recorded one")]
    inner = [layer.name for layer in test.layers if layer.name not in names]
    cases: list[Case] = []
    with written(file, with_outputs(proto, inner)) as variant:
        runs = Here(provider).run(variant, LEVELS, [inputs])
    for level, found in zip(LEVELS, runs, strict=True):
        stage = f"self-test, onnxruntime {level}"
        if isinstance(found[0], Failed):
            cases.append(_failed(stage, found[0].message))
            continue
        values = dict(zip([*names, *inner], found[0], strict=True))
        cases += [_layer_case(values, layer, stage) for layer in test.layers]
        if test.outputs:
            cases += _detection_cases(values, names, test.outputs, stage)
    return cases


def _layer_case(values: Mapping[str, Array], layer: Expected, stage: str) -> Case:
    value = values.get(layer.name)
    if value is None:
        return _failed(stage, f"no value {layer.name!r}")
    if layer.shape[:1] == (1,):
        plain = _self_test_case(value, layer, stage)
    else:
        right = layer.values.reshape(layer.shape)
        error = float(np.max(rows_apart(value, right), initial=0.0))
        facts = (layer.shape[0], error, layer.torch_error, layer.tolerance)
        plain = Case("recorded inputs", stage, layer.name, *facts)
    # no axis of it holds classes
    return replace(plain, decided=0, agreed=0, ties=0).judged()


def _detection_cases(
    values: Mapping[str, Array], names: Sequence[str], expected: Sequence[Expected], stage: str
) -> list[Case]:
    """The recorded detections, each looked up among those that were found."""
    if not detects(names) or not {item.name for item in expected} <= set(names):
        return [_failed(stage, "outputs that are no detections")]
    found = {name: values[name] for name in names}
    problem = ill_formed(found)
    if problem is not None:
        return [_failed(stage, problem)]
    right = {item.name: item.values.reshape(item.shape) for item in expected if item.name in KEYS}
    right["labels"] = right["labels"].round()
    limits = {item.name: item.tolerance for item in expected}
    matching = match(found, right, limits)
    if not matching.whole:
        return [_failed(stage, describe(matching, found, right))]
    order = [i for i, _ in matching.pairs]
    cases = []
    for item in expected:
        case = _self_test_case(found[item.name][order], item, stage)
        count = len(order) if item.name == "labels" else 0
        cases.append(replace(case, decided=count, agreed=count, ties=0).judged())
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
    return Case("recorded inputs", stage, "", 0).broken(problem)


def _self_test_case(value: Array, expected: Expected, stage: str) -> Case:
    if tuple(value.shape) != expected.shape:
        shapes = f"shape {list(value.shape)} where {list(expected.shape)} is recorded"
        return _failed(stage, f"output {expected.name!r}: {shapes}")
    whole = value.size == expected.values.size
    reference = expected.values.reshape(value.shape) if whole else expected.values
    mine = value if whole else sample(value)
    result = deviation(mine, reference, tie=expected.tolerance)
    error, problem = result.error, result.problem
    if problem is None and not whole:  # the scale is the one of the whole output
        error *= (_most(reference) or 1.0) / (expected.scale or 1.0)
        if abs(_most(value) - expected.scale) > expected.tolerance * expected.scale:
            problem = f"values up to {_most(value):.3g} where {expected.scale:.3g} is recorded"
    return Case(
        "recorded inputs",
        stage,
        expected.name,
        expected.shape[0] if expected.shape else 1,
        torch_error=expected.torch_error,
        tolerance=expected.tolerance,
        **asdict(replace(result, error=error, problem=problem)),
    ).judged()


def _most(array: Array) -> float:
    return float(np.max(np.abs(array.astype(np.float64)), initial=0.0))
