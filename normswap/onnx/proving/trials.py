"""The inputs of a proof and what the model makes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from normswap.copying import copied
from normswap.errors import ExportError
from normswap.onnx.file.parity import Array, relative_error, tolerance_for
from normswap.onnx.subject import Subject, as_array

BATCHES = (1, 2, 5)
MAX_IMAGES = 8
_SEED = 20_180_322


@dataclass(frozen=True)
class Trial:
    """Inputs for one run.

    Attributes:
        name: for reports.
        inputs: one array per input of the graph.
        batch: rows.
        rows: which rows of the pool these are; None if they are not from there.
    """

    name: str
    inputs: list[Array]
    batch: int
    rows: slice | None = None


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


def random_inputs(
    subject: Subject, rows: int, *, seed: int = _SEED, grow: bool = False
) -> list[Array]:
    """Standard normal floats, integers from the range of the example, ``rows`` of them.

    Args:
        subject: whose inputs.
        rows: of every input that has a batch axis.
        seed: other seeds give other inputs.
        grow: at a second resolution.
    """
    rng = np.random.default_rng(seed)
    signature = subject.signature
    found = []
    for tensor in signature.tensors:
        if not signature.has_rows(tensor):
            found.append(as_array(tensor))
            continue
        shape = [rows, *tensor.shape[1:]]
        if grow:
            shape[2:] = (
                [_grown(size) for size in shape[2:]] if signature.spatial(tensor) else shape[2:]
            )
        found.append(_random(rng, shape, tensor))
    return found


def _grown(size: int) -> int:
    return size + 32 if size >= 32 else 2 * size


def _random(rng: np.random.Generator, shape: Sequence[int], like: torch.Tensor) -> Array:
    example = as_array(like)
    if example.dtype.kind == "f":
        return rng.standard_normal(shape).astype(example.dtype)
    if example.dtype.kind == "b" or example.size == 0:
        return rng.integers(0, 2, shape).astype(example.dtype)
    return rng.integers(int(example.min()), int(example.max()) + 1, shape).astype(example.dtype)


def trials_for(
    subject: Subject, *, static_batch: bool, dynamic_size: bool, images: Any = None
) -> list[Trial]:
    """Random inputs at batch sizes 1, 2 and 5, the examples, a second resolution, real images."""
    batch = subject.signature.batch
    if static_batch or batch is None:
        rows = batch or 1
        pool = random_inputs(subject, rows)
        found = [Trial(f"random inputs, batch {rows}", pool, rows, slice(0, rows))]
    else:
        rows = 2
        pool = random_inputs(subject, max(BATCHES))
        starts = {1: 0, 2: 1, 5: 0}
        found = [
            Trial(f"random inputs, batch {n}", *_cut(subject, pool, starts[n], n)) for n in BATCHES
        ]
    examples = subject.signature.with_rows(rows) if batch else subject.signature
    found.append(Trial(f"example inputs, batch {rows}", examples.arrays, rows))
    if dynamic_size:
        grown = random_inputs(subject, rows, grow=True)
        sizes = "×".join(str(size) for size in grown[0].shape[2:])
        found.append(Trial(f"random inputs at {sizes}, batch {rows}", grown, rows))
    return found + _image_trials(subject, images, rows, static_batch=static_batch)


def _cut(
    subject: Subject, pool: list[Array], start: int, rows: int
) -> tuple[list[Array], int, slice]:
    part = slice(start, start + rows)
    tensors = subject.signature.tensors
    return (
        [
            a[part] if subject.signature.has_rows(t) else a
            for a, t in zip(pool, tensors, strict=True)
        ],
        rows,
        part,
    )


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(images) if images else torch.empty(0)


def _image_trials(subject: Subject, images: Any, rows: int, *, static_batch: bool) -> list[Trial]:
    if images is None:
        return []
    tensors = subject.signature.tensors
    stack = images if isinstance(images, torch.Tensor) else _stacked(list(images))
    fits = len(tensors) == 1 and stack.shape[1:] == tensors[0].shape[1:] and len(stack) > 0
    if not fits:
        raise ExportError(
            "images",
            got=f"a stack of shape {list(stack.shape)} for {len(tensors)} input(s)",
            need=f"images of shape {list(tensors[0].shape[1:])} for a model of one input",
            hint="the model's own preprocessing",
        )
    if not static_batch:
        stack = stack[:MAX_IMAGES]
        return [Trial(f"{len(stack)} images", [as_array(stack.to(tensors[0].dtype))], len(stack))]
    full = [part for part in torch.split(stack[:MAX_IMAGES], rows) if len(part) == rows]
    return [Trial(f"{rows} images", [as_array(part.to(tensors[0].dtype))], rows) for part in full]


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
            if pooled and whole and part and all(_cuttable(p, whole.batch) for p in pooled):
                found.append(self._reference([(a[part], b[part]) for a, b in pooled]))
            else:
                found.append(self.reference(trial))
        rule = [self._tolerance(max(errors)) for errors in _by_output(found)]
        return [replace(reference, tolerances=rule) for reference in found]

    def _tolerance(self, torch_error: float) -> float:
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
        rule = [self._tolerance(error) for error in errors]
        return Reference([double for double, _ in pairs], errors, rule)


def _by_output(references: Sequence[Reference]) -> list[list[float]]:
    """Torch's finite errors, one list per output."""
    columns = zip(*(reference.torch_errors for reference in references), strict=True)
    return [[e for e in column if np.isfinite(e)] or [0.0] for column in columns]


def _cuttable(pair: tuple[Array, Array], rows: int) -> bool:
    return pair[0].ndim > 0 and pair[0].shape[0] == rows


def model_mixes_rows(subject: Subject, trials: Sequence[Trial]) -> bool:
    """Whether the model itself gives a sample another output in another batch."""
    pooled = {trial.batch: trial for trial in trials if trial.rows is not None}
    if 1 not in pooled or len(pooled) < 2:
        return False
    alone, together = pooled[1], pooled[max(pooled)]
    for one, many in zip(subject.run(alone.inputs), subject.run(together.inputs), strict=True):
        if _cuttable((many, many), together.batch) and one.shape[:1] == (1,):
            error = relative_error(one, many[alone.rows])
            if error > tolerance_for(0.0):
                return True
    return False


def randomised(subject: Subject, *, seed: int = _SEED) -> Subject:
    """A copy with other running statistics and other affine values than the model's.

    Fresh statistics (mean 0, variance 1) and fresh affine values (1, 0) hide folding errors: a
    file that forgot them computes the same.
    """
    other = copied(subject.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in other.modules():
            _randomise(module, generator)
    return replace(subject, model=other)


def _randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
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
