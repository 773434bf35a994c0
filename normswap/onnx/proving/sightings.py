"""Images on which a detector's decisions stand firm, and what it finds there. Runs the model.

A detector that is asked about white noise finds nothing, or decides between equals: then two runs
that rounding alone parts give other detections, and no file could be judged by them. So images are
tried until the model itself says the same in float64, in its own precision and on an image that is
changed by as much as rounding; and its score threshold is moved to where there is something to see.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from normswap.errors import ExportError
from normswap.onnx.file.detections import Cut, bound, errors, ill_formed, match
from normswap.onnx.file.parity import CEILING, Array
from normswap.onnx.file.selftest import pictured
from normswap.onnx.proving.expectation import GroundTruth
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import Subject, as_array

SHAKE = 1e-5
"""Share by which an image is changed: more than rounding does, less than a proof allows."""
SHAKES = 5
"""How often."""
ENOUGH = 2
"""Images with firm detections that a proof needs."""
TRIES = 8
"""Generated images that are tried."""
NOTHING = 2.0
"""A threshold above every score."""
EVERYTHING = -1.0
SHARES = ((0.1, 0.4), (0.02, 0.1), (0.0, 0.02))
"""How many detections are asked for, as shares of those that the model gives at most."""
BEYOND = (1.02, 1.18)
"""And how many where it is to stop at its limit."""
MOST_IMAGES = 4
MOST_KEPT = 100
"""Detections that are asked for where the model names no limit."""
STEADY = 0.5
"""Share of the detections whose masks or keypoints must not hang by a hair."""


@dataclass(frozen=True)
class Sighting:
    """One image and what the model finds there.

    Attributes:
        trial: the image.
        threshold: what scores are held against; None is the model's own.
        right: the float64 model's outputs, by name.
        torch_errors: error of torch's own run in the model's precision, per output.
        tolerances: largest error that passes, per output.
        steady: per output, which detections' values rounding leaves as they are.
        cut: where the model stops to count.
    """

    trial: Trial
    threshold: float | None
    right: Mapping[str, Array]
    torch_errors: Mapping[str, float]
    tolerances: Mapping[str, float]
    steady: Mapping[str, Array]
    cut: Cut

    @property
    def count(self) -> int:
        """How many detections there are."""
        return len(self.right["scores"])

    @property
    def bound(self) -> int:
        """How many of them a file must give: whose score is not at the threshold itself."""
        return bound(self.right, self.tolerances, self.cut)


@dataclass(frozen=True)
class Sightings:
    """What a detector is asked.

    Attributes:
        found: the firm ones.
        unfirm: how many images were left out.
        thresholds: the model's own ones.
        most: how many detections the model gives at most; None if unknown.
    """

    found: tuple[Sighting, ...]
    unfirm: int = 0
    thresholds: tuple[float, ...] = ()
    most: int | None = None

    @property
    def telling(self) -> list[Sighting]:
        """Those with detections that a file must give."""
        return [sighting for sighting in self.found if sighting.bound]


def deciders(model: nn.Module) -> list[nn.Module]:
    """The modules that hold scores against a threshold at the end, as torchvision's do."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "score_thresh", None), int | float)
        and isinstance(getattr(module, "detections_per_img", None), int)
    ]


@contextlib.contextmanager
def decided_at(
    model: nn.Module, threshold: float | None, most: int | None = None
) -> Iterator[None]:
    """A model with another threshold, and another limit to the number of detections."""
    modules = deciders(model)
    before = [(module.score_thresh, module.detections_per_img) for module in modules]
    try:
        for module in modules:
            if threshold is not None:
                module.score_thresh = threshold  # type: ignore[assignment]
            if most is not None:
                module.detections_per_img = most  # type: ignore[assignment]
        yield
    finally:
        for module, (own, limit) in zip(modules, before, strict=True):
            module.score_thresh, module.detections_per_img = own, limit


@contextlib.contextmanager
def at_threshold(truth: GroundTruth, threshold: float | None) -> Iterator[None]:
    """A model and its float64 copy with another threshold."""
    with contextlib.ExitStack() as stack:
        for subject in (truth.subject, truth.double):
            if subject is not None:
                stack.enter_context(decided_at(subject.model, threshold))
        yield


@dataclass
class Searcher:
    """Looks for sightings.

    Attributes:
        truth: the model.
        unfirm: images that were left out so far.
        scores: the highest scores of each image.
    """

    truth: GroundTruth
    unfirm: int = 0
    scores: dict[str, Array] = field(default_factory=dict)
    limits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        modules = deciders(self.truth.subject.model)
        self.thresholds = tuple(
            dict.fromkeys(float(getattr(m, "score_thresh")) for m in modules)  # noqa: B009
        )
        self.limits = [int(getattr(m, "detections_per_img")) for m in modules]  # noqa: B009

    @property
    def most(self) -> int | None:
        """How many detections the model gives at most."""
        return min(self.limits, default=None)

    def sighting(self, trial: Trial, threshold: float | None) -> Sighting | None:
        """The sighting of one image; None if the model's decisions hang by a hair there."""
        names = self.truth.subject.outputs
        runs = [dict(zip(names, run, strict=True)) for run in self._runs(trial, threshold)]
        if any(ill_formed(run) for run in runs):
            return None
        own = self.thresholds[0] if len(self.thresholds) == 1 else None
        cut = Cut(own if threshold is None else threshold, self.most)
        return _firm(runs, Sighting(trial, threshold, runs[0], {}, {}, {}, cut), self.truth)

    def _runs(self, trial: Trial, threshold: float | None) -> list[list[Array]]:
        """In float64, in the model's own precision, and on images that were shaken."""
        truth = self.truth
        shaken = [[_shaken(array, seed) for array in trial.inputs] for seed in range(SHAKES)]
        with at_threshold(truth, threshold):
            single = truth.subject.run(trial.inputs)
            exact = truth.double.run_double(trial.inputs) if truth.double else single
            return [exact, single, *(truth.subject.run(inputs) for inputs in shaken)]

    def threshold(self, trial: Trial, low: float, high: float) -> float | None:
        """One above which there are between two shares of the most detections.

        It lies in the widest gap between scores; None if there are too few.
        """
        most = self.most or MOST_KEPT
        scores = self._scores(trial, math.ceil(1.2 * most))
        if len(scores) < 2 or low * most > len(scores) - 1:
            return None
        first = max(1, int(low * most))
        last = max(first, min(len(scores) - 1, int(high * most)))
        gaps = scores[first - 1 : last] - scores[first : last + 1]
        widest = first + int(np.argmax(gaps))
        return float(np.float32((scores[widest - 1] + scores[widest]) / 2))

    def _scores(self, trial: Trial, most: int) -> Array:
        """The highest scores, whatever the threshold, from the first to the last."""
        if trial.name not in self.scores:
            subject = self.truth.subject
            with decided_at(subject.model, EVERYTHING, most):
                outputs = dict(zip(subject.outputs, subject.run(trial.inputs), strict=True))
            self.scores[trial.name] = np.sort(outputs["scores"].astype(np.float64))[::-1]
        return self.scores[trial.name]


def _shaken(array: Array, seed: int) -> Array:
    noise = np.random.default_rng(seed).standard_normal(array.shape)
    return (array * (1 + SHAKE * noise)).astype(array.dtype)


def _firm(
    runs: Sequence[Mapping[str, Array]], sighting: Sighting, truth: GroundTruth
) -> Sighting | None:
    """A sighting with its tolerances, if all runs find the same."""
    right = runs[0]
    most = truth.tolerance or CEILING
    loose = dict.fromkeys(right, most)
    matchings = [match(run, right, loose, sighting.cut) for run in runs[1:]]
    count = len(right["scores"])
    if not all(matching.whole and len(matching.pairs) == count for matching in matchings):
        return None
    apart = [errors(run, right, matched) for run, matched in zip(runs[1:], matchings, strict=True)]
    steady = {n: np.all([found[n] <= most for found in apart], axis=0) for n in right}
    if count and any(mask.mean() < STEADY for mask in steady.values()):
        return None
    found = {n: float(np.max(apart[0][n], where=steady[n], initial=0.0)) for n in right}
    limits = {n: truth.allows(error) for n, error in found.items()}
    return replace(sighting, torch_errors=found, tolerances=limits, steady=steady)


def sightings_of(
    truth: GroundTruth, *, dynamic_size: bool = False, images: Any = None, brief: bool = False
) -> Sightings:
    """Sightings of the example images, of images that are given, and of generated ones.

    Args:
        truth: the model.
        dynamic_size: at a second size as well.
        images: those that are given.
        brief: no more than what is needed to see a fault of the exporter.
    """
    searcher = Searcher(truth)
    subject = truth.subject
    given = [*_examples(subject), *_given(subject, images, dynamic_size=dynamic_size)]
    enough = ENOUGH if brief else max(len(given), ENOUGH + 1)
    trials = iter([*given, *_generated(subject, grow=False)])
    found: list[Sighting] = []
    moved: float | None = None
    for index, trial in enumerate(trials):
        if index >= enough and len(_telling(found)) >= ENOUGH:
            break
        fresh, moved = of_image(searcher, trial, moved)
        if not any(sighting.bound for sighting in fresh):
            searcher.unfirm += 1
        found += fresh
    if brief:
        return Sightings(tuple(found), searcher.unfirm, searcher.thresholds, searcher.most)
    found += _extremes(searcher, found)
    if dynamic_size:
        found += _of_another_size(searcher, moved)
    return Sightings(tuple(found), searcher.unfirm, searcher.thresholds, searcher.most)


def _telling(sightings: Sequence[Sighting]) -> set[str]:
    """The images that show something."""
    return {sighting.trial.name for sighting in sightings if sighting.bound}


def of_image(
    searcher: Searcher, trial: Trial, moved: float | None
) -> tuple[list[Sighting], float | None]:
    """The sightings of one image: at the model's own threshold, and at one where it finds much."""
    found = [sighting for sighting in [searcher.sighting(trial, None)] if sighting is not None]
    if not searcher.thresholds:
        return found, moved
    shares = SHARES
    choices = [moved] if moved is not None else [searcher.threshold(trial, *s) for s in shares]
    for threshold in choices:
        sighting = None if threshold is None else searcher.sighting(trial, threshold)
        if sighting is not None and sighting.bound:
            return [*found, sighting], threshold
    return found, moved


def _extremes(searcher: Searcher, found: Sequence[Sighting]) -> list[Sighting]:
    """More detections than the model gives at most, and none at all."""
    telling = next((sighting for sighting in found if sighting.bound), None)
    if telling is None or not searcher.thresholds:
        return []
    thresholds = [searcher.threshold(telling.trial, *BEYOND), NOTHING]
    sightings = [searcher.sighting(telling.trial, t) for t in thresholds if t is not None]
    return [sighting for sighting in sightings if sighting is not None]


def _of_another_size(searcher: Searcher, moved: float | None) -> list[Sighting]:
    """The first generated image of another size that shows something."""
    found: list[Sighting] = []
    for trial in _generated(searcher.truth.subject, grow=True):
        found, moved = of_image(searcher, trial, moved)
        if any(sighting.bound for sighting in found):
            return found
    raise ExportError(
        "dynamic_size",
        got=f"no firm detection on {TRIES} images of another size",
        need="a size at which the detector decides",
        hint="leaving --dynamic-size out (dynamic_size=False)",
    )


def _examples(subject: Subject) -> list[Trial]:
    example = subject.signature.inputs[0].example
    arrays = [example, *subject.spare][:MOST_IMAGES]
    fitting = [array for array in arrays if array.shape == example.shape]
    return [Trial(f"example image {i + 1}", [array], 1) for i, array in enumerate(fitting)]


def _given(subject: Subject, images: Any, *, dynamic_size: bool) -> list[Trial]:
    """Images that the caller gave."""
    if images is None:
        return []
    like = subject.signature.inputs[0]
    arrays = [as_array(torch.as_tensor(image).to(like.dtype)) for image in images][:MOST_IMAGES]
    rank = len(like.shape)
    arrays = [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in arrays]
    fixed = like.shape[:-2] if dynamic_size else like.shape
    if not arrays or any(a.shape[: len(fixed)] != fixed for a in arrays):
        raise ExportError(
            "images",
            got=f"shapes {', '.join(str(list(a.shape)) for a in arrays) or 'none'}",
            need=f"images of shape {list(like.shape)}",
            hint="resizing them",
        )
    return [Trial(f"image {i + 1}", [array], 1) for i, array in enumerate(arrays)]


def _generated(subject: Subject, *, grow: bool) -> Iterator[Trial]:
    like = subject.signature.inputs[0].example
    shape = (*like.shape[:-2], like.shape[-2] + 32, like.shape[-1] + 64) if grow else like.shape
    size = "×".join(str(axis) for axis in shape[-2:])
    for seed in range(TRIES):
        name = f"generated image {seed + 1}" + (f" of {size}" if grow else "")
        yield Trial(name, [pictured(seed, shape, str(like.dtype))], 1)
