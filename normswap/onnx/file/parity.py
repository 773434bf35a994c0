"""What a proof found, as plain data, and the arithmetic of comparing. Free of torch.

The error of a run is scale-normalised, ``max|Δ| / max|ref|``, against a float64 run of the same
model: an elementwise relative error flags healthy models wherever an output passes through zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from normswap.errors import ExportError

Array = npt.NDArray[Any]

FLOOR = 1e-4
"""Errors up to here pass whatever torch's own rounding is."""
CEILING = 1e-3
"""Errors above this fail whatever torch's own rounding is."""
MARGIN = 3.0
"""How much further from float64 than torch onnxruntime may be."""
HALF_FLOOR = 1e-2
HALF_CEILING = 5e-2
NOT_FINITE = "the model itself gives NaN or Inf"
MAX_LINES = 8
"""Failed cases that a printed report shows."""


def tolerance_for(torch_error: float, *, half: bool = False) -> float:
    """The largest error that passes: ``max(1e-4, 3·torch_error)``, never above 1e-3.

    Args:
        torch_error: error of torch's own run in the model's precision against float64.
        half: the file computes in float16: ``max(1e-2, 3·torch_error)``, never above 5e-2.

    Example:
        >>> tolerance_for(1e-6), tolerance_for(2e-4), tolerance_for(1.0)
        (0.0001, 0.0006000000000000001, 0.001)
    """
    floor, ceiling = (HALF_FLOOR, HALF_CEILING) if half else (FLOOR, CEILING)
    if not np.isfinite(torch_error):
        return floor
    return min(ceiling, max(floor, MARGIN * torch_error))


@dataclass(frozen=True)
class Deviation:
    """One array against its reference.

    Attributes:
        error: ``max|Δ| / max|ref|``; infinite where shapes differ or a value is NaN or infinite.
        cosine: cosine of the angle between the two, 1.0 if the reference is zero everywhere.
        decided: rows (or pixels) whose winner leads by more than the tie margin.
        agreed: those among them where both have the same winner.
        ties: rows whose winner rounding alone may change; they are counted, not judged.
        problem: None, or what cannot be expressed as a number: a shape, a NaN.
    """

    error: float
    cosine: float = 1.0
    decided: int = 0
    agreed: int = 0
    ties: int = 0
    problem: str | None = None


def check_tolerance(tolerance: float | None) -> None:
    """Raise for a largest error that no proof can mean.

    Raises:
        ExportError: it is not between 0 and 1.
    """
    if tolerance is not None and not 0 < tolerance < 1:
        raise ExportError(
            "tolerance",
            got=str(tolerance),
            need="a number above 0 and below 1: a share of the output's scale",
            hint="1e-3, or none for the rule",
        )


def relative_error(value: Array, reference: Array) -> float:
    """``max|value − reference| / max|reference|``; absolute where the reference is all zero.

    Infinities that are right, as in a mask, count neither as a difference nor for the scale.
    """
    if value.shape != reference.shape:
        return float("inf")
    if value.size == 0:
        return 0.0
    mine, right = _wide(value), _wide(reference)
    with np.errstate(invalid="ignore"):
        difference = float(np.max(np.where(mine == right, 0.0, np.abs(mine - right))))
    scale = float(np.max(np.abs(right), where=np.isfinite(right), initial=0.0))
    if not np.isfinite(difference):
        return float("inf")
    return difference / scale if scale > 0 else difference


def deviation(value: Array, reference: Array, *, tie: float) -> Deviation:
    """Compare one output with its reference.

    Args:
        value: what was computed.
        reference: what should have been computed.
        tie: relative size of a rounding error. A row is judged by its winner (``argmax`` over
            axis 1) only where the reference's lead is more than twice that: below, a correct
            computation may name the other one.
    """
    if value.shape != reference.shape:
        problem = f"shape {list(value.shape)} where {list(reference.shape)} is right"
        return Deviation(float("inf"), 0.0, problem=problem)
    wide, ref = _wide(value), _wide(reference)
    if not np.isfinite(ref).all():
        return Deviation(float("inf"), 0.0, problem=NOT_FINITE)
    if not np.isfinite(wide).all():
        return Deviation(float("inf"), 0.0, problem="NaN or Inf")
    decided, agreed, ties = _winners(wide, ref, tie)
    return Deviation(relative_error(value, reference), _cosine(wide, ref), decided, agreed, ties)


def _wide(array: Array) -> Array:
    return np.asarray(array, dtype=np.float64)


def _cosine(value: Array, reference: Array) -> float:
    scale = float(np.max(np.abs(reference), initial=0.0))
    if scale == 0:
        return 1.0
    a, b = (value / scale).ravel(), (reference / scale).ravel()
    norm = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _winners(value: Array, reference: Array, tie: float) -> tuple[int, int, int]:
    if reference.ndim < 2 or reference.shape[1] < 2 or reference.size == 0:
        return 0, 0, 0
    top = np.partition(reference, reference.shape[1] - 2, axis=1)
    lead = np.take(top, -1, axis=1) - np.take(top, -2, axis=1)
    clear = lead > 2 * tie * float(np.max(np.abs(reference)))
    same = np.argmax(value, axis=1) == np.argmax(reference, axis=1)
    decided = int(clear.sum())
    return decided, int((same & clear).sum()), int(clear.size) - decided


@dataclass(frozen=True)
class Case:
    """One comparison of the proof.

    Attributes:
        name: what was run, for example ``random inputs, batch 5``.
        stage: ``exported program``, ``onnxruntime off``, ``onnxruntime basic``,
            ``onnxruntime all``, ``row independence`` or ``self-test``.
        output: name of the output.
        batch: number of rows.
        error: scale-normalised error against the float64 run.
        torch_error: the same error of torch's own run in the model's precision.
        tolerance: the largest error that passes.
        cosine: cosine similarity with the float64 run.
        decided: rows whose winner is clear.
        agreed: clear rows with the right winner.
        ties: rows that rounding alone may decide.
        randomised: run on the copy with randomised statistics and affine values.
        passed: the verdict.
        problem: None, or what went wrong in words.
    """

    name: str
    stage: str
    output: str
    batch: int
    error: float = 0.0
    torch_error: float = 0.0
    tolerance: float = 0.0
    cosine: float = 1.0
    decided: int = 0
    agreed: int = 0
    ties: int = 0
    randomised: bool = False
    passed: bool = True
    problem: str | None = None

    def judged(self) -> Case:
        """With its verdict: no problem, an error within tolerance, every clear winner right."""
        within = self.error <= self.tolerance and self.agreed == self.decided
        return replace(self, passed=self.problem is None and within)

    def broken(self, problem: str) -> Case:
        """Failed by what no number can say."""
        return replace(self, error=float("inf"), passed=False, problem=problem)

    def describe(self) -> str:
        """One line for a report."""
        model = "randomised copy, " if self.randomised else ""
        fact = self.problem or f"error {self.error:.2e}, tolerance {self.tolerance:.1e}"
        if self.problem is None and self.agreed < self.decided:
            fact += f", top-1 agrees in {self.agreed} of {self.decided}"
        return f"{self.stage}, {model}{self.name}, output {self.output!r}: {fact}"


@dataclass(frozen=True)
class Divergence:
    """Where a file and its model part.

    Attributes:
        module: qualified name of the module whose output differs first; ``""`` is the model.
        modules: every module that the node computes (a folded BN lives in its convolution).
        node: name of the ONNX node, if there is one.
        op: its operator.
        error: scale-normalised error of its output.
        detail: what was seen there, in words.
    """

    module: str
    modules: tuple[str, ...] = ()
    node: str | None = None
    op: str | None = None
    error: float | None = None
    detail: str = ""

    def describe(self) -> str:
        """One clause for a report."""
        name = self.module or "the model itself"
        others = [other for other in self.modules if other != self.module]
        text = f"first divergent module: {name}"
        if others:
            text += f" (with {', '.join(others)} folded in)"
        if self.node is not None:
            text += f", node {self.node} ({self.op})"
        if self.error is not None:
            text += f", error {self.error:.2e} there"
        return f"{text}, {self.detail}" if self.detail else text


@dataclass(frozen=True)
class Parity:
    """The result of a proof.

    Attributes:
        passed: every case passed, and the file is the one its metadata describe.
        max_relative_error: the largest scale-normalised error of any onnxruntime run.
        top1_agreement: share of clear winners that agree over all onnxruntime runs; 1.0 where
            no output has one. Of a detector: the share of its detections that were found.
        cases: every comparison.
        failure: None, or one paragraph: what failed, at which stage, in which module.
        stage: the stage to blame, or None.
        divergence: where file and model part first, or None.
        identity: whether the hash of nodes, attributes and initializers is the recorded one;
            None if the file carries none.
        notes: facts worth a line in a report.
        cause: what failed: ``"file"``, or ``"network"`` where no file could pass, because the model
            itself gives NaN, or rounds more in its own precision than a proof allows.

    Example:
        >>> Parity(True, 2e-6, 1.0).passed
        True
    """

    passed: bool
    max_relative_error: float
    top1_agreement: float
    cases: tuple[Case, ...] = ()
    failure: str | None = None
    stage: str | None = None
    divergence: Divergence | None = None
    identity: bool | None = None
    notes: tuple[str, ...] = field(default=())
    cause: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``: infinities and NaN become strings."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        detector = any(case.output == "detections" for case in self.cases)
        agreed = "detections found" if detector else "top-1 agreement"
        head = (
            f"parity {verdict}: max|Δ|/max|ref| {self.max_relative_error:.2e}, "
            f"{agreed} {self.top1_agreement:.4f}, {len(self.cases)} cases"
        )
        lines = [head]
        if self.failure:
            lines.append(self.failure)
        bad = [case for case in self.cases if not case.passed]
        lines += [f"  {case.describe()}" for case in bad[:MAX_LINES]]
        if len(bad) > MAX_LINES:
            lines.append(f"  … and {len(bad) - MAX_LINES} more")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def summarise(
    cases: Iterable[Case],
    *,
    failure: str | None = None,
    stage: str | None = None,
    divergence: Divergence | None = None,
    identity: bool | None = None,
    notes: tuple[str, ...] = (),
    cause: str | None = None,
) -> Parity:
    """Gather cases into a verdict."""
    every = tuple(cases)
    runs = [case for case in every if case.stage.startswith(("onnxruntime", "self-test"))]
    decided = sum(case.decided for case in runs)
    passed = failure is None and all(case.passed for case in every)
    return Parity(
        passed=passed,
        max_relative_error=max((case.error for case in runs), default=0.0),
        top1_agreement=sum(case.agreed for case in runs) / decided if decided else 1.0,
        cases=every,
        failure=failure,
        stage=stage,
        divergence=divergence,
        identity=identity,
        notes=notes,
        cause=None if passed else cause or "file",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
