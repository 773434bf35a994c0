"""What a detector must give: its last layers value by value, its detections as sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from normswap.onnx.file.detections import describe, errors, ill_formed, match, rows_apart
from normswap.onnx.file.parity import Array, Case, Parity
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import (
    MAX_STORED,
    MAX_TOLERANCE,
    Expected,
    SelfTest,
    Shift,
    TestInput,
)
from normswap.onnx.file.session import LEVELS, Failed, Outputs, Runner
from normswap.onnx.file.variants import with_outputs, with_threshold, written
from normswap.onnx.proving.deciding import (
    LastLayer,
    RightLayer,
    last_layers,
    recorded_layers,
    right_layers,
)
from normswap.onnx.proving.expectation import Evidence, Expectation, GroundTruth, unsound
from normswap.onnx.proving.sightings import (
    ENOUGH,
    TRIES,
    Searcher,
    Sighting,
    Sightings,
    at_threshold,
    of_image,
    sightings_of,
)
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import Subject
from normswap.onnx.writing.draft import Options

LAYER_LEVELS = ("off", "all")
CORE = 0.5
"""Share of the rows of a layer that rounding must leave as they are."""

Judged = tuple[Case, Trial]


@dataclass(frozen=True)
class Detections(Expectation):
    """Images, each with the detections that are right.

    Attributes:
        sightings: what the model finds, where rounding does not change it.
    """

    sightings: Sightings = field(default_factory=lambda: Sightings(()))

    @classmethod
    def of(
        cls, subject: Subject, options: Options, *, images: Any = None, tolerance: float | None
    ) -> Detections:
        """Everything that a file of this detector must give; see ``Rows.of``."""
        truth = GroundTruth.of(subject, tolerance=tolerance)
        example = _example(subject)
        nonsense = unsound(subject, [example])
        if nonsense is not None:
            return cls(truth, (example,), nonsense)
        found = sightings_of(truth, dynamic_size=options.dynamic_size, images=images)
        return cls._asked(truth, found)

    @classmethod
    def _asked(
        cls, truth: GroundTruth, sightings: Sightings, *, randomised: bool = False
    ) -> Detections:
        names = {sighting.trial.name for sighting in sightings.telling}
        nonsense = None
        if len(names) < ENOUGH:
            nonsense = (
                f"it gives detections that rounding does not change on {len(names)} of "
                f"{len(names) + sightings.unfirm} images; {ENOUGH} are needed to compare "
                "detections on"
            )
        trials = [_example(truth.subject), *(sighting.trial for sighting in sightings.found)]
        named = {trial.name: trial for trial in trials}
        return cls(truth, tuple(named.values()), nonsense, randomised, sightings)

    def of_randomised(self) -> Detections:
        """The same of a copy whose statistics and affine values nothing can hide behind."""
        truth = self.truth.randomised()
        return self._asked(truth, sightings_of(truth, brief=True), randomised=True)

    def examine(
        self, file: OnnxFile, runner: Runner, program: torch.export.ExportedProgram | None = None
    ) -> Evidence:
        """The last layers on every image, and every detection, at every level."""
        del program  # a detector is traced: there is none
        found = list(self._layer_cases(file, runner))
        for threshold in dict.fromkeys(s.threshold for s in self.sightings.found):
            alike = [s for s in self.sightings.found if s.threshold == threshold]
            most = max(sighting.count for sighting in alike)
            brief = self.randomised or not most or most == self.sightings.most
            found += self._found_cases(file, alike, runner, ("all",) if brief else LEVELS)
        cases = [replace(case, randomised=self.randomised) for case, _ in found]
        failing = next((trial for case, trial in found if not case.passed), None)
        return Evidence(cases, failing, () if self.randomised else self._notes())

    def _notes(self) -> tuple[str, ...]:
        found, telling = self.sightings.found, self.sightings.telling
        moved = [s for s in telling if s.threshold is not None]
        images = len({sighting.trial.name for sighting in telling})
        most = max(sighting.count for sighting in telling)
        notes = [f"detections compared as sets on {images} images, up to {most} on one"]
        if not any(sighting.bound for sighting in found if sighting.threshold is None):
            notes.append("no image gave a detection at the model's own score threshold")
        if moved:
            values = ", ".join(f"{t:.3g}" for t in dict.fromkeys(s.threshold or 0.0 for s in moved))
            notes.append(f"compared at score thresholds of {values} as well, in a copy of the file")
        elif not self.sightings.thresholds:
            notes.append("the model names no score threshold: compared at its own alone")
        if self.sightings.unfirm:
            notes.append(
                f"{self.sightings.unfirm} images left out: rounding changes what the model finds "
                "there"
            )
        if self.truth.double is None:
            notes.append("the model cannot run in float64: its own precision is the reference")
        return tuple(notes)

    def _layer_cases(self, file: OnnxFile, runner: Runner) -> Iterator[Judged]:
        """What the detector decides by, on every image that shows something."""
        layers = last_layers(file.proto, self.subject.model)
        named = {sighting.trial.name: sighting.trial for sighting in self.sightings.telling}
        trials = list(named.values())[: ENOUGH + 1] or list(self.trials)
        if not layers or not trials:
            return
        known = [right_layers(self.truth, trial, layers) for trial in trials]
        names = [value.name for value in file.proto.graph.output]
        inner = [layer.value for layer in layers if layer.value not in names]
        with written(file, with_outputs(file.proto, inner)) as path:
            runs = runner.run(path, LAYER_LEVELS, [trial.inputs for trial in trials])
        for level, found in zip(LAYER_LEVELS, runs, strict=True):
            for trial, outputs, right in zip(trials, found, known, strict=True):
                stage = f"onnxruntime {level}"
                if isinstance(outputs, Failed):
                    yield Case(trial.name, stage, "detections", 1).broken(outputs.message), trial
                    continue
                values = dict(zip([*names, *inner], outputs, strict=True))
                for module in dict.fromkeys(layer.module for layer in layers):
                    mine = [layer for layer in layers if layer.module == module]
                    case = Case(trial.name, stage, f"{module}, before any decision", 1)
                    yield self._layer_case(case, mine, values, right), trial

    def _layer_case(
        self,
        case: Case,
        layers: Sequence[LastLayer],
        values: Mapping[str, Array],
        right: Mapping[str, RightLayer],
    ) -> Case:
        """One layer, over all its calls."""
        known = [right[layer.value] for layer in layers if layer.value in right]
        if len(known) < len(layers):
            return case.broken("the model runs this layer less often")
        torch_error = max(item.error for item in known)
        error = 0.0
        for layer, item in zip(layers, known, strict=True):
            if item.core.size and item.core.mean() < CORE:
                return case.broken("rounding changes most of what the model itself gives here")
            apart = rows_apart(values[layer.value], item.value)
            error = max(error, float(np.max(apart, where=item.core, initial=0.0)))
        limit = self.truth.allows(torch_error)
        return replace(case, error=error, torch_error=torch_error, tolerance=limit).judged()

    def _found_cases(
        self, file: OnnxFile, alike: Sequence[Sighting], runner: Runner, levels: Sequence[str]
    ) -> list[Judged]:
        """Sightings of one threshold."""
        threshold, own = alike[0].threshold, self.sightings.thresholds
        proto = file.proto if threshold is None else with_threshold(file.proto, own, threshold)
        if proto is None:
            mine = ", ".join(f"{value:g}" for value in own)
            problem = f"the file holds its scores against another threshold than {mine}"
            first = alike[0].trial
            return [(Case(first.name, "onnxruntime off", "detections", 1).broken(problem), first)]
        with written(file, proto) as path:
            runs = runner.run(path, levels, [sighting.trial.inputs for sighting in alike])
        return [
            (case, sighting.trial)
            for level, found in zip(levels, runs, strict=True)
            for sighting, outputs in zip(alike, found, strict=True)
            for case in _judge(self.subject.outputs, sighting, outputs, f"onnxruntime {level}")
        ]

    def self_test(self, file: OnnxFile, parity: Parity) -> SelfTest:
        """A generated image on which the detector's decisions stand firm, and what it finds."""
        del parity
        like = self.subject.signature.inputs[0].example
        searcher = Searcher(self.truth)
        chosen: Sighting | None = None
        for seed in range(TRIES):
            item = TestInput(like.shape, str(like.dtype), seed, picture=True)
            found, _ = of_image(searcher, Trial("self-test", [item.make()], 1), None)
            telling = [sighting for sighting in found if _can_be_recorded(sighting)]
            if telling:
                chosen = telling[-1]
                break
        moved = None if chosen is None else chosen.threshold
        trial = Trial("self-test", [item.make()], 1)
        with at_threshold(self.truth, moved):
            layers = recorded_layers(file.proto, self.truth, trial)
        return SelfTest(
            (item,),
            () if chosen is None else _found(chosen),
            layers,
            None if moved is None else Shift(searcher.thresholds, moved),
        )


def _example(subject: Subject) -> Trial:
    return Trial("example image 1", subject.signature.examples, 1)


def _judge(
    names: Sequence[str], sighting: Sighting, outputs: Outputs | Failed, stage: str
) -> Iterator[Case]:
    """One case that every detection is there, and one per output for what they are."""
    name = sighting.trial.name
    if sighting.threshold is not None:
        name += f", scores above {sighting.threshold:.3g}"
    whole = Case(name, stage, "detections", 1)
    if isinstance(outputs, list) and len(outputs) != len(names):
        outputs = Failed(f"{len(outputs)} outputs where the model has {len(names)}")
    if isinstance(outputs, Failed):
        yield whole.broken(outputs.message)
        return
    found = dict(zip(names, outputs, strict=True))
    problem = ill_formed(found)
    if problem is not None:
        yield whole.broken(problem)
        return
    matching = match(found, sighting.right, sighting.tolerances, sighting.cut)
    whole = replace(
        whole,
        decided=sighting.bound,
        agreed=sighting.bound - len(matching.missing),
        ties=sighting.count - sighting.bound,
        problem=None if matching.whole else describe(matching, found, sighting.right),
    )
    yield whole.judged()
    apart = errors(found, sighting.right, matching)
    places = [j for _, j in matching.pairs]
    for output in names:
        if output == "labels":  # what is paired has one label
            continue
        steady = sighting.steady[output][places]
        yield Case(
            name,
            stage,
            output,
            1,
            float(np.max(apart[output], where=steady, initial=0.0)),
            sighting.torch_errors[output],
            sighting.tolerances[output],
            ties=int((~steady).sum()),
        ).judged()


def _can_be_recorded(sighting: Sighting) -> bool:
    """Whether nothing in a sighting is free: it is judged without knowing the model."""
    return 0 < sighting.count <= MAX_STORED // 4 and sighting.bound == sighting.count


def _found(sighting: Sighting) -> tuple[Expected, ...]:
    limits, own = sighting.tolerances, sighting.torch_errors
    return tuple(
        Expected.of(name, array, min(MAX_TOLERANCE, limits[name]), own[name])
        for name, array in sighting.right.items()
        if sighting.steady[name].all()
    )
