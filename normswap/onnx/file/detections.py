"""Detections are sets: what is found twice, missed or moved. Free of torch.

A detector decides: it keeps what scores above a threshold, drops what overlaps, counts to a limit.
Rounding may change such a decision only where it hangs by a hair, so two runs are compared
detection by detection, and only those whose score lies at the threshold itself are free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from normswap.onnx.file.parity import Array, relative_error

KEYS = ("boxes", "labels", "scores")

MOST_ROWS = 10_000
"""Detections that are compared; detectors give a few hundred."""

_NEAR = 8
"""Rows that one row is compared with, in the order of a projection."""

Detections = Mapping[str, Array]
"""Outputs of a detector for one image, by name; one row per detection in each."""


def detects(names: Sequence[str]) -> bool:
    """Whether outputs of these names are detections."""
    return set(KEYS) <= set(names)


@dataclass(frozen=True)
class Cut:
    """Where a detector stops to count.

    Attributes:
        threshold: what a score must exceed; None if unknown.
        most: how many detections it gives at most; None if unknown.
    """

    threshold: float | None = None
    most: int | None = None


@dataclass(frozen=True)
class Matching:
    """Which detection of one run is which of another.

    Attributes:
        pairs: indices (found, right).
        missing: right ones that were not found.
        extra: found ones that are not right.
        free: missing and extra ones whose score lies within the tolerance of the cut.
    """

    pairs: tuple[tuple[int, int], ...]
    missing: tuple[int, ...]
    extra: tuple[int, ...]
    free: int = 0

    @property
    def whole(self) -> bool:
        """Every detection that is not free has its like."""
        return not self.missing and not self.extra


def ill_formed(found: Detections) -> str | None:
    """Why outputs are no detections; None if they are."""
    count = found["scores"].shape[0] if found["scores"].ndim == 1 else -1
    if count < 0 or found["labels"].shape != (count,) or found["boxes"].shape != (count, 4):
        shapes = ", ".join(f"{key} {list(found[key].shape)}" for key in KEYS)
        return f"outputs that are no detections: {shapes}"
    if count > MOST_ROWS:
        return f"{count} detections, more than {MOST_ROWS}"
    for name, array in found.items():
        if array.ndim == 0 or array.shape[0] != count:
            return f"output {name!r} of shape {list(array.shape)} for {count} detections"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"NaN or Inf in output {name!r}"
    return None


def match(
    found: Detections, right: Detections, limits: Mapping[str, float], cut: Cut | None = None
) -> Matching:
    """Pair detections of one label whose box and score are the same within the limits.

    Args:
        found: what was computed; well-formed.
        right: what should have been computed.
        limits: largest difference of ``boxes`` and of ``scores``, as a share of the largest right
            one.
        cut: where the detector stops to count.
    """
    cut = cut or Cut()
    costs = _costs(found, right, limits)
    pairs: list[tuple[int, int]] = []
    taken: tuple[set[int], set[int]] = (set(), set())
    for flat in np.argsort(costs, axis=None, kind="stable"):
        i, j = divmod(int(flat), costs.shape[1])
        if costs[i, j] > 1:
            break
        if i not in taken[0] and j not in taken[1]:
            pairs.append((i, j))
            taken[0].add(i)
            taken[1].add(j)
    extra = [i for i in range(costs.shape[0]) if i not in taken[0]]
    missing = [j for j in range(costs.shape[1]) if j not in taken[1]]
    kept_extra = [i for i in extra if not _free(found["scores"][i], found, right, limits, cut)]
    kept = [j for j in missing if not _free(right["scores"][j], found, right, limits, cut)]
    free = len(extra) + len(missing) - len(kept_extra) - len(kept)
    return Matching(tuple(sorted(pairs, key=lambda p: p[1])), tuple(kept), tuple(kept_extra), free)


def _most(array: Array) -> float:
    return float(np.max(np.abs(array.astype(np.float64)), initial=0.0)) or 1.0


def _wide(array: Array) -> Array:
    """One row of float64 per detection."""
    return np.asarray(array.astype(np.float64).reshape(len(array), -1))


def _costs(found: Detections, right: Detections, limits: Mapping[str, float]) -> Array:
    """Distance of every two detections in units of the limits; infinite between labels."""
    if not len(found["scores"]) or not len(right["scores"]):
        return np.zeros((len(found["scores"]), len(right["scores"])))
    parts = []
    for key in ("boxes", "scores"):
        mine, other = (_wide(d[key]) for d in (found, right))
        apart = np.abs(mine[:, None] - other[None]).max(axis=2)
        parts.append(apart / (_most(right[key]) * limits[key]))
    same = found["labels"][:, None] == right["labels"][None]
    costs: Array = np.where(same, np.maximum(*parts), np.inf)
    return costs


def _free(
    score: float, found: Detections, right: Detections, limits: Mapping[str, float], cut: Cut
) -> bool:
    """Whether rounding alone may say whether a detection of this score is given."""
    near = limits["scores"] * _most(right["scores"])
    if cut.threshold is not None and abs(float(score) - cut.threshold) <= near:
        return True
    full = cut.most is not None and max(len(found["scores"]), len(right["scores"])) >= cut.most
    lowest = min(
        (float(run["scores"].min()) for run in (found, right) if len(run["scores"])), default=0.0
    )
    return full and float(score) - lowest <= near


def bound(right: Detections, limits: Mapping[str, float], cut: Cut) -> int:
    """How many detections a right run must give: those that no rounding could take away."""
    return sum(not _free(score, right, right, limits, cut) for score in right["scores"])


def errors(found: Detections, right: Detections, matching: Matching) -> dict[str, Array]:
    """What the pairs differ by: per output, one number per pair, as a share of its scale."""
    result = {}
    for name, reference in right.items():
        scale = _most(reference)
        mine = [relative_to(found[name][i], reference[j], scale) for i, j in matching.pairs]
        result[name] = np.array(mine, np.float64)
    return result


def relative_to(value: Array, reference: Array, scale: float) -> float:
    """``max|value − reference|`` as a share of a scale that is not zero."""
    if value.shape != reference.shape:
        return float("inf")
    own = float(np.max(np.abs(reference.astype(np.float64)), initial=0.0))
    return relative_error(value, reference) * ((own / scale) if own > 0 else 1 / scale)


def describe(matching: Matching, found: Detections, right: Detections) -> str:
    """What is missing or too much, in words, the strongest first."""
    parts = []
    if matching.missing:
        j = max(matching.missing, key=lambda index: right["scores"][index])
        parts.append(
            f"{len(matching.missing)} of {len(right['scores'])} detections not found (label "
            f"{int(right['labels'][j])}, score {float(right['scores'][j]):.4g}, "
            f"{_nearest(right, j, found)})"
        )
    if matching.extra:
        i = max(matching.extra, key=lambda index: found["scores"][index])
        parts.append(
            f"{len(matching.extra)} too many (label {int(found['labels'][i])}, score "
            f"{float(found['scores'][i]):.4g})"
        )
    return " and ".join(parts)


def _nearest(right: Detections, index: int, found: Detections) -> str:
    same = np.flatnonzero(found["labels"] == right["labels"][index])
    if not len(same):
        return "none of its label found"
    apart = np.abs(found["boxes"][same].astype(np.float64) - right["boxes"][index]).max(axis=1)
    best = int(same[apart.argmin()])
    return (
        f"the nearest of its label {float(apart.min()):.3g} px away with score "
        f"{float(found['scores'][best]):.4g}"
    )


def rows_apart(found: Array, right: Array) -> Array:
    """Per right row, how far the nearest found one is, as a share of the largest right value.

    Boxes that are looked at more closely come in the order of their scores, in which rounding may
    exchange neighbours: rows are looked up, not counted off.
    """
    scale = float(np.max(np.abs(right), initial=0.0)) or 1.0
    if right.ndim == 4 and right.shape[0] == 1:
        same = found.shape == right.shape
        apart = np.abs(found.astype(np.float64) - right).max() / scale if same else np.inf
        return np.array([apart])
    if found.ndim != right.ndim or found.shape[1:] != right.shape[1:] or not len(found):
        return np.full(len(right), np.inf if len(right) else 0.0)
    mine, other = (a.reshape(len(a), -1).astype(np.float64) for a in (found, right))
    if mine.shape == other.shape:
        apart = np.abs(mine - other).max(axis=1, initial=0.0)
        if apart.max(initial=0.0) <= 1e-5 * scale:
            return np.asarray(apart / scale)
    direction = np.random.default_rng(0).standard_normal(other.shape[1])
    order = np.argsort(mine @ direction)
    places = np.searchsorted((mine @ direction)[order], other @ direction)
    best = np.full(len(other), np.inf)
    for step in range(-_NEAR, _NEAR):
        near = order[np.clip(places + step, 0, len(mine) - 1)]
        best = np.minimum(best, np.abs(mine[near] - other).max(axis=1, initial=0.0))
    return np.asarray(best / scale)
