"""What each target costs beside BatchNorm: training step, inference, memory, onnxruntime.

All variants take turns within every round, in one process, so that a busy machine slows all of
them alike; results are quartiles over the rounds of each variant's time divided by BatchNorm's in
the same round. Absolute times are given for BatchNorm only: they say what machine it was.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import config as compiler_config
from torch.utils._pytree import tree_leaves

from normswap.children import safe_path
from normswap.copying import copied
from normswap.errors import in_short
from normswap.planning import Plan, Target
from normswap.progress import Progress, ProgressCallback
from normswap.running import call, device_of
from normswap.swap import convert

BASE = "bn"
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_Precision = Callable[[], AbstractContextManager[Any]]  # what a forward runs in


def _never() -> bool:
    return False


class Variant(NamedTuple):
    """One contestant: a target, as it is or under ``torch.compile``."""

    target: str
    compiled: bool = False


_BASE = Variant(BASE)
_SURE_ROUNDS, _CLOSE = 3, 0.25
_CANNOT_TRAIN = (RuntimeError, ValueError, AssertionError)  # the last: a detector without boxes


@dataclass(frozen=True)
class Ratio:
    """Quartiles of a cost divided by BatchNorm's, over the rounds in which both were measured."""

    lower: float
    median: float
    upper: float
    rounds: int = 0

    @property
    def steady(self) -> bool:
        """Whether it says anything: rounds enough, whose middle half lies close together."""
        return self.rounds >= _SURE_ROUNDS and self.upper - self.lower <= _CLOSE * self.median


@dataclass(frozen=True)
class Row:
    """One target beside BatchNorm.

    Attributes:
        target: its name; ``bn`` is the model itself.
        compiled: measured under ``torch.compile``; ratios are to eager BatchNorm all the same.
        training: forward, backward and SGD step, or None where it cannot train (``note``).
        inference: forward in eval mode without gradients; None where there was no time for it.
        onnx: latency of the exported file in onnxruntime; None if not measured.
        kept: bytes of distinct tensors that one training forward keeps for its backward.
        state: bytes of training state beyond parameters and buffers (CBN's history).
        peak: peak CUDA memory of a training step in bytes; None on other devices.
            Bytes are counted for eager rows only.
        note: what could not be measured, and why.
    """

    target: str
    compiled: bool
    training: Ratio | None
    inference: Ratio | None
    onnx: Ratio | None
    kept: int
    state: int
    peak: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Every target's row, and BatchNorm's own median times in seconds."""

    rows: tuple[Row, ...]
    training_seconds: float
    inference_seconds: float
    rounds: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)


def compare(
    model: nn.Module,
    targets: Mapping[str, Target | Plan],
    example_inputs: Any,
    *,
    rounds: int = 15,
    warmup: int = 9,
    compiled: bool = False,
    onnx: bool = True,
    seconds: float = math.inf,
    training_inputs: Any = None,
    amp: str | None = None,
    progress: ProgressCallback | None = None,
    expired: Callable[[], bool] = _never,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Measure converted copies of a model beside the model itself.

    Args:
        model: a model with BatchNorm, on the device to measure on.
        targets: label → what to convert to, as in :func:`normswap.convert`, or a plan.
        example_inputs: what the model is called with; its batch size is the one measured.
        rounds: rounds of measurement.
        warmup: runs of each variant before the first round; CBN's window should be full by then.
        compiled: measure ``torch.compile`` of every variant too, beside it.
        onnx: export every variant, with its proof, and measure onnxruntime on the CPU.
        seconds: after which no further round begins, of which each kind has two all the same;
            a quarter of them is for the inference.
        training_inputs: what it is called with in training mode, where that differs: a detector's
            images and targets.
        amp: mixed precision, ``"bf16"`` or ``"fp16"``.
        progress: called before each stage, with its name as the message.
        expired: asked before every conversion and every step: whether to end at once, two rounds or
            not. What was not measured by then is None, and a target not yet converted has no row.
        clock: what ``seconds`` are read from; a step is measured with ``time.perf_counter``.

    Returns:
        Comparison: one row per target, BatchNorm first.
    """
    stages = len(targets) + 2 + onnx
    begun = itertools.count()

    def say(line: str) -> None:
        if progress is not None:
            progress(Progress(next(begun), stages, line))

    device = device_of(model)
    learning = example_inputs if training_inputs is None else training_inputs
    lowered = partial(torch.autocast, device.type, dtype=_AMP[amp]) if amp else nullcontext
    models = {_BASE: copied(model)}
    for label, target in targets.items():
        if expired():
            break
        say(f"converting to {label}")
        models[Variant(label)] = convert(copied(model), target, example_inputs=example_inputs).model
    eager = dict(models)
    if compiled:
        models |= {Variant(v.target, compiled=True): copied(m) for v, m in eager.items()}
    # torch counts the compiled forms of one forward, and the variants share theirs
    limit = compiler_config.recompile_limit * len(models)
    with safe_path(), compiler_config.patch(recompile_limit=limit):  # type: ignore[attr-defined]
        say("training steps")
        pace = _Pace(warmup, rounds, 0.75 * seconds, expired, clock)
        training, notes = _training(models, learning, pace, lowered)
        say("inference")
        inference = {v: _inference_step(v, m, example_inputs, lowered) for v, m in models.items()}
        pace = _Pace(min(warmup, 3), rounds, 0.25 * seconds, expired, clock)
        infer = _interleave(inference, pace)
    latencies: dict[Variant, list[float]] = {}
    if onnx:
        say("onnxruntime")
        latencies = _onnx(eager, example_inputs, rounds)
    measured = eager.keys() & training.keys()
    rows = [
        Row(
            target=variant.target,
            compiled=variant.compiled,
            training=_ratio(training, variant),
            inference=_ratio(infer, variant),
            onnx=_ratio(latencies, variant),
            kept=0
            if expired() or variant not in measured
            else kept_for_backward(contestant, learning, lowered),
            state=_history_bytes(contestant) if variant in eager else 0,
            peak=None
            if expired() or variant not in measured
            else _peak(contestant, learning, lowered),
            note=notes.get(variant, ""),
        )
        for variant, contestant in models.items()
    ]
    return Comparison(
        tuple(rows),
        statistics.median(training.get(_BASE) or [math.nan]),
        statistics.median(infer[_BASE] or [math.nan]),
        len(infer[_BASE]),
        str(device),
    )


def one_box_each(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Targets for a detector to learn from: a box of class 1 in the middle of each image."""
    found = []
    for image in images:
        height, width = image.shape[-2:]
        box = [[width / 4, height / 4, 3 * width / 4, 3 * height / 4]]
        device = image.device
        labels = torch.ones(1, dtype=torch.int64, device=device)
        found.append({"boxes": torch.tensor(box, device=device), "labels": labels})
    return found


def _ratio(seconds: Mapping[Variant, list[float]], variant: Variant) -> Ratio | None:
    if not seconds.get(variant) or not seconds.get(_BASE):
        return None
    ratios = [a / b for a, b in zip(seconds[variant], seconds[_BASE], strict=True)]
    rounds = len(ratios)
    if rounds == 1:
        ratios *= 2
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(lower, median, upper, rounds)


def _synchronize(inputs: Any) -> None:
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves(inputs)):
        torch.cuda.synchronize()


class _Pace(NamedTuple):
    """Runs of every variant before the first round, rounds, and seconds for both together.

    Whatever they say, nothing more is run once it has ``expired``.
    """

    warmup: int
    rounds: int
    seconds: float = math.inf
    expired: Callable[[], bool] = _never
    clock: Callable[[], float] = time.perf_counter


_FEWEST_ROUNDS = 2


def _interleave(
    steps: Mapping[Variant, Callable[[], None]], pace: _Pace
) -> dict[Variant, list[float]]:
    """Seconds of every step in every whole round, the steps taking turns."""
    clock, begun = pace.clock, pace.clock()
    _warm_up(steps, pace)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in steps}
    order = list(steps)
    gc.collect()
    for number in range(pace.rounds if steps else 0):
        if number >= _FEWEST_ROUNDS and clock() - begun > pace.seconds:
            break
        # a rotating order: whoever comes first in a round finds other caches
        for variant in order[number % len(order) :] + order[: number % len(order)]:
            if pace.expired():
                return {variant: found[:number] for variant, found in seconds.items()}
            start = time.perf_counter()
            steps[variant]()
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def _warm_up(steps: Mapping[Variant, Callable[[], None]], pace: _Pace) -> None:
    begun = pace.clock()
    for number in range(pace.warmup):
        if number and pace.clock() - begun > 0.6 * pace.seconds:
            return
        for step in steps.values():
            if pace.expired():
                return
            step()


def _loss(output: Any) -> Tensor:
    floats = (t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    return torch.stack([t.float().square().mean() for t in floats]).sum()


def _compiled_or_not(variant: Variant, model: nn.Module) -> Any:
    return torch.compile(model) if variant.compiled else model


def _training_step(
    variant: Variant, model: nn.Module, inputs: Any, lowered: _Precision = nullcontext
) -> Callable[[], None]:
    model.train()
    run = _compiled_or_not(variant, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with lowered():
            output = call(run, inputs)
        torch.autograd.backward(_loss(output))
        optimizer.step()
        _synchronize(inputs)

    return step


def _inference_step(
    variant: Variant, model: nn.Module, inputs: Any, lowered: _Precision
) -> Callable[[], None]:
    model.eval()
    run = _compiled_or_not(variant, model)

    def step() -> None:
        with torch.no_grad(), lowered():
            call(run, inputs)
        _synchronize(inputs)

    return step


def _training(
    models: Mapping[Variant, nn.Module], inputs: Any, pace: _Pace, lowered: _Precision
) -> tuple[dict[Variant, list[float]], dict[Variant, str]]:
    """Seconds of a training step; and why a variant cannot take one on this input."""
    steps, notes = {}, {}
    for variant, model in models.items():
        if pace.expired():
            break
        step = _training_step(variant, model, inputs, lowered)
        try:
            step()
        except _CANNOT_TRAIN as error:
            notes[variant] = f"cannot train here: {in_short(error)}"
        else:
            steps[variant] = step
    return _interleave(steps, pace), notes


def _onnx(
    models: Mapping[Variant, nn.Module], inputs: Any, rounds: int
) -> dict[Variant, list[float]]:
    from normswap.onnx import export_onnx, load_onnx

    with tempfile.TemporaryDirectory() as folder:
        steps: dict[Variant, Callable[[], None]] = {}
        for variant, model in models.items():
            path = Path(folder) / f"{variant.target}.onnx"
            export_onnx(model.cpu().eval(), path, example_inputs=inputs)
            session = load_onnx(path, timeout=None)  # made here, and timed
            steps[variant] = lambda session=session: call(session, inputs)  # type: ignore[misc]
        return _interleave(steps, _Pace(3, rounds))


def step_seconds(
    model: nn.Module,
    inputs: Any,
    enough: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Seconds of one training step of a copy, or None where it cannot take one.

    Args:
        model: it is not changed.
        inputs: one batch.
        enough: a first step that takes longer counts, though the first is slower than others.
        clock: what is measured with.
    """
    step = _training_step(_BASE, copied(model), inputs)
    begun = clock()
    try:
        step()
    except _CANNOT_TRAIN:
        return None
    first = clock() - begun
    if first > enough:
        return first
    begun = clock()
    step()
    return clock() - begun


def kept_for_backward(model: nn.Module, inputs: Any, lowered: _Precision = nullcontext) -> int:
    """Bytes of distinct activations that one training forward keeps for its backward.

    Counted tensor by tensor, each storage once and parameters not at all: resident memory says more
    about the allocator than about the model.
    """
    twin = copied(model).train()
    tensors = (*model.parameters(), *model.buffers(), *twin.parameters(), *twin.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> None:
        # not the tensor: a node that holds its own output is never freed
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked)
    with lowered(), hooks:
        output = call(twin, inputs)
    del output
    return sum(storage.nbytes() for storage in storages.values())


def _never_unpacked(_: None) -> Tensor:
    raise AssertionError("there is no backward")


def _history_bytes(model: nn.Module) -> int:
    keeping: list[Any] = [m for m in model.modules() if hasattr(m, "history_bytes")]
    return sum(layer.history_bytes() for layer in keeping)


def _peak(model: nn.Module, inputs: Any, lowered: _Precision) -> int | None:
    device = device_of(model)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    _training_step(_BASE, model, inputs, lowered)()
    return int(torch.cuda.max_memory_allocated(device))
