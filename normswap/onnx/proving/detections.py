"""The proof of a detector: its last layers value by value, its detections as sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from normswap.onnx.file.detections import describe, errors, ill_formed, match, rows_apart
from normswap.onnx.file.parity import CEILING, Array, Case, passes, tolerance_for
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.session import LEVELS, Failed, Outputs, Runner
from normswap.onnx.file.variants import with_outputs, with_threshold, written
from normswap.onnx.proving.deciding import LastLayer, last_layers, layer_values
from normswap.onnx.proving.evidence import Evidence
from normswap.onnx.proving.expectation import Expectation
from normswap.onnx.proving.scenes import ENOUGH, Scene, Scenes, scenes_of
from normswap.onnx.proving.soundness import unsound
from normswap.onnx.proving.trials import GroundTruth, Trial, randomised
from normswap.onnx.subject import Subject
from normswap.onnx.writing.draft import Options

LAYER_LEVELS = ("off", "all")
CORE = 0.5
"""Share of the rows of a layer that rounding must leave as they are."""


@dataclass(frozen=True)
class DetectorExpectation(Expectation):
    """What a file of a detector must give."""

    scenes: Scenes = field(default_factory=lambda: Scenes(()))


def expect_detections(
    subject: Subject, options: Options, *, images: Any = None, tolerance: float | None = None
) -> DetectorExpectation:
    """Everything that a file of this detector must give."""
    truth = GroundTruth.of(subject, tolerance=tolerance)
    nonsense = unsound(subject, [Trial("example image 1", subject.signature.arrays, 1)])
    if nonsense is not None:
        return DetectorExpectation(subject, truth, (), nonsense=nonsense)
    return _asked(truth, scenes_of(truth, dynamic_size=options.dynamic_size, images=images))


def expect_of_randomised_detector(asked: Expectation) -> DetectorExpectation:
    """The same of a copy whose statistics and affine values nothing can hide behind."""
    truth = GroundTruth.of(randomised(asked.subject), tolerance=asked.truth.tolerance)
    return _asked(truth, scenes_of(truth, brief=True))


def _asked(truth: GroundTruth, scenes: Scenes) -> DetectorExpectation:
    names = {scene.trial.name for scene in scenes.telling}
    nonsense = None
    if len(names) < ENOUGH:
        nonsense = (
            f"it gives detections that rounding does not change on {len(names)} of "
            f"{len(names) + scenes.unfirm} images; {ENOUGH} are needed to compare detections on"
        )
    example = Trial("example image 1", truth.subject.signature.arrays, 1)
    trials = {example.name: example} | {scene.trial.name: scene.trial for scene in scenes.found}
    return DetectorExpectation(
        truth.subject, truth, tuple(trials.values()), nonsense=nonsense, scenes=scenes
    )


def examine_detector(
    file: OnnxFile, asked: DetectorExpectation, runner: Runner, *, copy: bool = False
) -> Evidence:
    """The last layers on every image, and the detections of every scene, at every level."""
    found = list(_layer_cases(file, asked, runner))
    for threshold in dict.fromkeys(scene.threshold for scene in asked.scenes.found):
        scenes = [scene for scene in asked.scenes.found if scene.threshold == threshold]
        most = max(scene.count for scene in scenes)
        brief = copy or not most or most == asked.scenes.most
        levels = ("all",) if brief else LEVELS
        found += _scene_cases(file, asked, scenes, runner, levels)
    cases = [replace(case, randomised=copy) for case, _ in found]
    failing = next((trial for case, trial in found if not case.passed), None)
    return Evidence(cases, failing, () if copy else _notes(asked))


def _notes(asked: DetectorExpectation) -> tuple[str, ...]:
    scenes = asked.scenes
    own = [scene for scene in scenes.found if scene.threshold is None]
    moved = [s for s in scenes.telling if s.threshold is not None]
    images = len({scene.trial.name for scene in scenes.telling})
    most = max(scene.count for scene in scenes.telling)
    notes = [f"detections compared as sets on {images} images, up to {most} on one"]
    if not any(scene.bound for scene in own):
        notes.append("no image gave a detection at the model's own score threshold")
    if moved:
        values = ", ".join(f"{t:.3g}" for t in dict.fromkeys(s.threshold or 0.0 for s in moved))
        notes.append(f"compared at score thresholds of {values} as well, in a copy of the file")
    elif not scenes.thresholds:
        notes.append("the model names no score threshold: compared at its own alone")
    if scenes.unfirm:
        notes.append(
            f"{scenes.unfirm} images left out: rounding changes what the model finds there"
        )
    if asked.truth.double is None:
        notes.append("the model cannot run in float64: its own precision is the reference")
    return tuple(notes)


Judged = tuple[Case, Trial]


def _scene_cases(
    file: OnnxFile,
    asked: DetectorExpectation,
    scenes: Sequence[Scene],
    runner: Runner,
    levels: Sequence[str],
) -> list[Judged]:
    """Scenes of one threshold."""
    proto, threshold = file.proto, scenes[0].threshold
    if threshold is not None:
        shifted = with_threshold(proto, asked.scenes.thresholds, threshold)
        if shifted is None:
            own = ", ".join(f"{value:g}" for value in asked.scenes.thresholds)
            problem = f"the file holds its scores against another threshold than {own}"
            return [(_broken(scenes[0].trial, "onnxruntime off", problem), scenes[0].trial)]
        proto = shifted
    inputs = [scene.trial.inputs for scene in scenes]
    if threshold is None:
        runs = runner.run(file.path, levels, inputs)
    else:
        with written(file, proto) as path:
            runs = runner.run(path, levels, inputs)
    return [
        (case, scene.trial)
        for level, found in zip(levels, runs, strict=True)
        for scene, outputs in zip(scenes, found, strict=True)
        for case in _judge(asked.subject.outputs, scene, outputs, f"onnxruntime {level}")
    ]


def _broken(trial: Trial, stage: str, problem: str) -> Case:
    return Case(
        trial.name, stage, "detections", 1, float("inf"), 0.0, 0.0, passed=False, problem=problem
    )


def _judge(
    names: Sequence[str], scene: Scene, outputs: Outputs | Failed, stage: str
) -> Iterator[Case]:
    """One case that every detection is there, and one per output for what they are."""
    name = scene.trial.name
    if scene.threshold is not None:
        name += f", scores above {scene.threshold:.3g}"
    trial = replace(scene.trial, name=name)
    if isinstance(outputs, list) and len(outputs) != len(names):
        outputs = Failed(f"{len(outputs)} outputs where the model has {len(names)}")
    if isinstance(outputs, Failed):
        yield _broken(trial, stage, outputs.message)
        return
    found = dict(zip(names, outputs, strict=True))
    problem = ill_formed(found)
    if problem is not None:
        yield _broken(trial, stage, problem)
        return
    matching = match(found, scene.right, scene.tolerances, scene.cut)
    whole = Case(
        name,
        stage,
        "detections",
        1,
        0.0,
        0.0,
        0.0,
        decided=scene.bound,
        agreed=scene.bound - len(matching.missing),
        ties=scene.count - scene.bound,
    )
    if not matching.whole:
        whole = replace(whole, problem=describe(matching, found, scene.right))
    yield replace(whole, passed=passes(whole))
    apart = errors(found, scene.right, matching)
    places = [j for _, j in matching.pairs]
    for output in names:
        if output == "labels":  # what is paired has one label
            continue
        steady = scene.steady[output][places]
        case = Case(
            name,
            stage,
            output,
            1,
            float(np.max(apart[output], where=steady, initial=0.0)),
            scene.torch_errors[output],
            scene.tolerances[output],
            ties=int((~steady).sum()),
        )
        yield replace(case, passed=passes(case))


def _layer_cases(file: OnnxFile, asked: DetectorExpectation, runner: Runner) -> Iterator[Judged]:
    """What the detector decides by, on every image that shows something."""
    layers = last_layers(file.proto, asked.subject.model)
    named = {scene.trial.name: scene.trial for scene in asked.scenes.telling}
    trials = list(named.values())[: ENOUGH + 1] or list(asked.trials)
    own = {value.name for value in file.proto.graph.output}
    inner = [layer.value for layer in layers if layer.value not in own]
    if not layers or not trials:
        return
    with written(file, with_outputs(file.proto, inner)) as path:
        runs = runner.run(path, LAYER_LEVELS, [trial.inputs for trial in trials])
    known = [right_layers(asked.truth, trial, layers) for trial in trials]
    names = [*(value.name for value in file.proto.graph.output), *inner]
    for level, found in zip(LAYER_LEVELS, runs, strict=True):
        for trial, outputs, right in zip(trials, found, known, strict=True):
            stage = f"onnxruntime {level}"
            if isinstance(outputs, Failed):
                yield _broken(trial, stage, outputs.message), trial
                continue
            values = dict(zip(names, outputs, strict=True))
            for module in dict.fromkeys(layer.module for layer in layers):
                mine = [layer for layer in layers if layer.module == module]
                case = _layer_case(trial, stage, module, mine, values, right, asked.truth.tolerance)
                yield case, trial


@dataclass(frozen=True)
class RightLayer:
    """What one layer should give: the values, the rows that are firm, torch's own error."""

    value: Array
    core: Array
    error: float


def right_layers(
    truth: GroundTruth, trial: Trial, layers: Sequence[LastLayer]
) -> dict[str, RightLayer]:
    """The values of a model's last layers in float64."""
    subject, double = truth.subject, truth.double
    single = layer_values(subject, trial.inputs, layers)
    exact = single
    if double is not None:
        wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in trial.inputs]
        exact = layer_values(double, wide, layers)
    found = {}
    for name, value in exact.items():
        apart = rows_apart(single[name], value) if name in single else np.full(len(value), np.inf)
        core = apart <= (truth.tolerance or CEILING)
        found[name] = RightLayer(value, core, float(np.max(apart, where=core, initial=0.0)))
    return found


def _layer_case(
    trial: Trial,
    stage: str,
    module: str,
    layers: Sequence[LastLayer],
    values: Mapping[str, Array],
    right: Mapping[str, RightLayer],
    tolerance: float | None,
) -> Case:
    """One layer, over all its calls."""
    name = f"{module}, before any decision"
    known = [right[layer.value] for layer in layers if layer.value in right]
    if len(known) < len(layers):
        return replace(_broken(trial, stage, "the model runs this layer less often"), output=name)
    torch_error = max(item.error for item in known)
    error = 0.0
    for layer, item in zip(layers, known, strict=True):
        if item.core.size and item.core.mean() < CORE:
            problem = "rounding changes most of what the model itself gives here"
            return replace(_broken(trial, stage, problem), output=name)
        apart = rows_apart(values[layer.value], item.value)
        error = max(error, float(np.max(apart, where=item.core, initial=0.0)))
    limit = tolerance if tolerance is not None else tolerance_for(torch_error)
    case = Case(trial.name, stage, name, 1, error, torch_error, limit)
    return replace(case, passed=passes(case))
