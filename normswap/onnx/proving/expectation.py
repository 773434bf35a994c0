"""What a proof asks of a file, whatever the model gives. The model is run here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from normswap.copying import copied
from normswap.graph.numbers import impossible_statistics
from normswap.onnx.file.parity import Array, Case, Parity, relative_error, tolerance_for
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import SelfTest
from normswap.onnx.file.session import Runner
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import Subject, flat_tensors
from normswap.running import watched

_SEED = 20_180_322


@dataclass(frozen=True)
class Reference:
    """What a run should give.

    Attributes:
        outputs: the float64 model's outputs.
        torch_errors: error of torch's own run in the model's precision, per output.
        tolerances: largest error that passes, per output.
    """

    outputs: list[Array]
    torch_errors: list[float]
    tolerances: list[float]


@dataclass(frozen=True)
class Evidence:
    """What examining a file brings to light.

    Attributes:
        cases: every comparison.
        failing: the first trial on which onnxruntime failed, so that it can be looked into.
        notes: facts worth a line in a report.
    """

    cases: list[Case]
    failing: Trial | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroundTruth:
    """What a model gives where it is right: its runs in float64, and how far torch is from them.

    Attributes:
        subject: the model in its own precision.
        double: the same in float64, or None.
        tolerance: the caller's, or None for the rule.
        half: the file computes in float16.
    """

    subject: Subject
    double: Subject | None
    tolerance: float | None = None
    half: bool = False

    @classmethod
    def of(
        cls, subject: Subject, *, tolerance: float | None = None, half: bool = False
    ) -> GroundTruth:
        """Make the float64 copy."""
        return cls(subject, subject.in_double(), tolerance, half)

    def randomised(self) -> GroundTruth:
        """The same of a copy with other running statistics and other affine values.

        Fresh statistics (mean 0, variance 1) and fresh affine values (1, 0) hide folding errors: a
        file that forgot them computes the same.
        """
        other = copied(self.subject.model)
        generator = torch.Generator().manual_seed(_SEED)
        with torch.no_grad():
            for module in other.modules():
                _randomise(module, generator)
        subject = replace(self.subject, model=other)
        return replace(self, subject=subject, double=subject.in_double())

    def references(self, trials: Sequence[Trial], *, mixed: bool = False) -> list[Reference]:
        """One reference per trial; the pool is run once where outputs can be cut by rows.

        Rounding varies several times over between inputs of one model, so the tolerance of all
        comes from the largest error that torch itself made on any of them.

        Args:
            trials: what to run.
            mixed: the model gives a sample another output in another batch, so nothing is cut.
        """
        pools = [t for t in trials if t.rows and not mixed]
        whole = max(pools, key=lambda t: t.batch, default=None)
        pooled = self._run(whole) if whole else None
        found = []
        for trial in trials:
            part = trial.rows
            if pooled and whole and part and all(_has_rows(p[0], whole.batch) for p in pooled):
                found.append(self._reference([(a[part], b[part]) for a, b in pooled]))
            else:
                found.append(self.reference(trial))
        rule = [self.allows(max(errors)) for errors in _by_output(found)]
        return [replace(reference, tolerances=rule) for reference in found]

    def allows(self, torch_error: float) -> float:
        """The largest error that passes where torch's own is this one."""
        if self.tolerance is not None:
            return self.tolerance
        return tolerance_for(torch_error, half=self.half)

    def reference(self, trial: Trial) -> Reference:
        """The reference of one trial by itself."""
        return self._reference(self._run(trial))

    def _run(self, trial: Trial) -> list[tuple[Array, Array]]:
        single = self.subject.run(trial.inputs)
        double = self.double.run_double(trial.inputs) if self.double else single
        return list(zip(double, single, strict=True))

    def _reference(self, pairs: list[tuple[Array, Array]]) -> Reference:
        errors = [relative_error(single, double) for double, single in pairs]
        rule = [self.allows(error) for error in errors]
        return Reference([double for double, _ in pairs], errors, rule)

    def mixes_rows(self, trials: Sequence[Trial]) -> bool:
        """Whether the model itself gives a sample another output in another batch."""
        pooled = {trial.batch: trial for trial in trials if trial.rows is not None}
        if 1 not in pooled or len(pooled) < 2:
            return False
        alone, together = pooled[1], pooled[max(pooled)]
        runs = (self.subject.run(alone.inputs), self.subject.run(together.inputs))
        return any(
            relative_error(one, many[alone.rows]) > tolerance_for(0.0)
            for one, many in zip(*runs, strict=True)
            if _has_rows(many, together.batch) and one.shape[:1] == (1,)
        )


def _by_output(references: Sequence[Reference]) -> list[list[float]]:
    """Torch's finite errors, one list per output."""
    columns = zip(*(reference.torch_errors for reference in references), strict=True)
    return [[e for e in column if np.isfinite(e)] or [0.0] for column in columns]


def _has_rows(output: Array, rows: int) -> bool:
    return output.ndim > 0 and output.shape[0] == rows


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator).to(like) - 0.5

    mean, variance = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
    if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
        mean.add_(draw(mean) * variance.clamp(min=0).sqrt())
        variance.mul_(1 + draw(variance))
    own: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    own |= {k: v for k, v in module.named_buffers(recurse=False) if k in ("weight", "bias")}
    if any(value.ndim != 1 for value in own.values()):
        return  # a convolution or a linear layer: its weights say enough as they are
    for name, value in own.items():
        if not value.is_floating_point():
            continue
        scale = value.abs().mean().clamp(min=0.1)
        value.mul_(1 + draw(value))
        if name != "weight":
            value.add_(draw(value) * scale * 0.5)


@dataclass(frozen=True)
class Expectation(ABC):
    """What a file of a model must give; how it is held against that is each kind's own.

    Attributes:
        truth: the model, and how to ask it more.
        trials: the inputs.
        nonsense: why nothing can be compared with this model; None if it can.
        randomised: it speaks of a copy whose statistics and affine values nothing can hide behind.
    """

    truth: GroundTruth
    trials: tuple[Trial, ...]
    nonsense: str | None = None
    randomised: bool = False

    @property
    def subject(self) -> Subject:
        """The model in its own precision."""
        return self.truth.subject

    @abstractmethod
    def of_randomised(self) -> Expectation:
        """The same of a copy whose statistics and affine values nothing can hide behind."""

    @abstractmethod
    def examine(
        self, file: OnnxFile, runner: Runner, program: torch.export.ExportedProgram | None = None
    ) -> Evidence:
        """Run a file, and the exported program between it and the model, and compare."""

    @abstractmethod
    def self_test(self, file: OnnxFile, parity: Parity) -> SelfTest:
        """What the proven file takes along, so that it can be checked without the model."""


def unsound(subject: Subject, trials: Sequence[Trial]) -> str | None:
    """Why a proof against a model would prove nothing; None if nothing speaks against it.

    One that computes NaN equals nothing. NaN inside counts also where no output shows it: an
    ``argmax`` of NaN is a number.

    Args:
        subject: the model, in its own precision.
        trials: inputs of the proof; of those that are cut from one pool the first is run.
    """
    impossible = next(_impossible(subject.model), None)
    if impossible is not None:
        return impossible
    pooled = [trial for trial in trials if trial.rows is not None]
    for trial in [*pooled[:1], *(trial for trial in trials if trial.rows is None)]:
        where = _first_nan(subject, trial)
        if where is not None:
            return f"{where} on {trial.name}"
    return None


def _impossible(model: nn.Module) -> Iterator[str]:
    """Stored numbers that no arithmetic survives."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.isnan().any():
            yield f"{name} holds NaN"
    for name, what in impossible_statistics(model).items():
        yield f"{name} holds {what}"


def _first_nan(subject: Subject, trial: Trial) -> str | None:
    """The first module that gives NaN, or an output that is not finite."""
    seen: list[str] = []

    def see(name: str, output: object) -> None:
        if not seen and any(
            tensor.is_floating_point() and bool(tensor.isnan().any())
            for tensor in flat_tensors(output)
        ):
            seen.append(f"{name or 'the model'} gives NaN")

    with watched(subject.model, see):
        outputs = subject.run(trial.inputs)
    for name, output in zip(subject.outputs, outputs, strict=True):
        if not seen and output.dtype.kind == "f" and not np.isfinite(output).all():
            seen.append(f"output {name!r} is not finite")
    return seen[0] if seen else None
