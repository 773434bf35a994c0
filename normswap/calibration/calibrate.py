"""Bring a converted model to its BatchNorm original on unlabelled images.

Two steps, both against the original in eval mode. First every layer's γ and β are set in closed
form, in data-flow order within one forward pass, so that its output has the mean and the spread of
the original's. Then Adam distils: outputs and every site's output, on flipped and mixed images.
Only the parameters of the replaced layers move unless asked otherwise; what remains is the plain
target layer with other numbers in it. Nothing here needs a label.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.calibration.distillation import Run, State, search, taken
from normswap.calibration.images import Pool
from normswap.calibration.tuning import Tuning
from normswap.copying import forget_history
from normswap.drift import Drift, measure_drift
from normswap.errors import RETURNED, CalibrationError
from normswap.progress import ProgressCallback
from normswap.provenance import add_history
from normswap.running import device_of, placed
from normswap.sources import original_of

PARAMETERS = ("norms", "producers", "all")
"""What may move."""

_log = logging.getLogger("normswap")


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` did.

    Attributes:
        before: drift of the model as it came.
        after: drift of the model as it is now.
        images: number of images.
        seconds: time spent.
        steps: optimiser steps.
        best_loss: held-out loss of the state that was kept.
        first_loss: held-out loss of the model as it came.
        stopped: ``budget``, ``plateau``, ``steps`` or ``not finite``.
        parameters: ``norms``, ``producers`` or ``all``.
        history: (seconds, held-out loss) along the way.
        held_out: whether ``before`` and ``after`` were measured on images that the calibration did
            not see; of fewer than 16 all serve for both.
    """

    before: Drift
    after: Drift
    images: int
    seconds: float
    steps: int
    best_loss: float
    first_loss: float
    stopped: str
    parameters: str
    history: tuple[tuple[float, float], ...]
    held_out: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        drifts = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {**asdict(self), **drifts}

    def __str__(self) -> str:
        seen = f"on {self.after.images} of them that were held out"
        if not self.held_out:
            seen = "on the images that it was calibrated on"
        return (
            f"calibrated on {self.images} images in {self.seconds:.0f} s, {self.steps} steps "
            f"({self.stopped}): {self.before.summary} → {self.after.summary}, measured {seen}"
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        """What to do where little or nothing was done."""
        gained = self.best_loss < self.first_loss
        if gained and (self.steps or self.stopped != "budget"):
            return ""
        said = "time was up before the first step" if gained else "the model ends where it began"
        more = "other images, or fine-tuning"
        if self.stopped == "budget":
            seconds = 3 * math.ceil(self.seconds)
            more = f"more time, --calibrate-seconds {seconds} (seconds={seconds})"
        return f". Note that {said}: try {more}"


def calibrate(
    model: nn.Module,
    teacher: nn.Module | None = None,
    images: Tensor | Iterable[Any] = (),
    *,
    seconds: float = 60,
    parameters: Literal["norms", "producers", "all"] | None = None,
    batch_size: int = 32,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    amp: bool | None = None,
    progress: ProgressCallback | None = None,
    clock: Callable[[], float] = time.monotonic,
    _tuning: Tuning | None = None,
) -> Calibration:
    """Bring a converted model to its BatchNorm original on unlabelled images, in place.

    The loss is the relative squared error of the outputs, whatever their structure, plus three
    times the mean of the same over the sites. An eighth of the images is held out, less where a
    look at them would cost too much of the time; the state with the smallest held-out loss stays,
    or the last one if it is near that, so the model never ends worse there than it came: neither in
    its loss nor in the decisions that it keeps, where the original is sure of any. Of fewer
    than 16 images all serve for both.

    Args:
        model: the converted model.
        teacher: its BatchNorm original, for example a deep copy taken before the conversion. It
            runs in eval mode and is not changed. None: it is built again, with its weights, for a
            model from ``load_model`` or ``load``.
        images: a preprocessed tensor, or an iterable of batches (a tuple is the positional
            arguments, a dict the keyword arguments). No labels. Tensors are flipped and mixed.
        seconds: time budget, everything included.
        parameters: ``"norms"`` moves γ, β and τ of the replaced layers only; ``"producers"`` the
            convolutions too whose output such a layer alone reads; ``"all"`` every parameter that
            requires a gradient. None takes what measured best: ``"producers"`` where channels
            share statistics (GN, LN), else ``"norms"``.
        batch_size: images per step when they come as tensors.
        steps: most optimiser steps, 0 for the closed form alone, or None.
        seed: of the drawing and mixing of images; the global generators are left alone.
        device: where to work; None is where the model is. The models return home afterwards.
        amp: bfloat16 autocast; None means on CUDA only.
        progress: called with the share of the budget spent; its message is the held-out loss.
        clock: what ``seconds`` are read from.

    Returns:
        Calibration: drift before and after (on the held-out images), time, steps, losses.

    Raises:
        CalibrationError: the models do not belong together, nothing was replaced, or there are no
            images, or none that the models take. Whatever is raised, the model is as it was.
        SpecError, CheckpointError: no ``teacher``, and it cannot be had again.

    Example:
        >>> import copy, normswap
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> teacher, x = copy.deepcopy(net), torch.randn(32, 3, 12, 12)
        >>> net = normswap.convert(net, "gn", example_inputs=x).model
        >>> report = calibrate(net, teacher, x, steps=20)
        >>> report.after.output_error < report.before.output_error
        True
    """
    _check(seconds, parameters, batch_size, steps)
    begun = clock()
    tuning = _tuning or Tuning()
    if isinstance(teacher, Tensor):
        raise CalibrationError(
            "teacher",
            got="a tensor",
            need="the BatchNorm original, or None for a model of known source",
            hint="calibrate(model, images=…)",
        )
    if teacher is None:
        teacher = original_of(model).to(device_of(model))
    forget_history(model, teacher)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))  # nothing can be trained in it
        stack.enter_context(placed(device, model, teacher))
        home = device_of(model)
        pool = Pool(images, batch_size, home, seed)
        amp = home.type == "cuda" if amp is None else amp
        run = Run(model, teacher, pool, parameters, tuning, amp=amp)
        initial = State(run.moving)
        try:
            with taken():
                run.fit_to(seconds, clock)
                looked = clock()
                before = measure_drift(model, teacher, pool.held_out())
            deadline = begun + seconds - (clock() - looked)  # the last look costs what this one did
            search(run, (begun, deadline), steps, clock, progress)
            after = measure_drift(model, teacher, pool.held_out())
        except BaseException:
            initial.restore()
            raise
    report = Calibration(
        before=before,
        after=after,
        images=pool.count,
        seconds=clock() - begun,
        steps=run.steps,
        first_loss=run.history[0][1],
        best_loss=run.best,
        stopped=run.stopped,
        parameters=run.parameters,
        history=tuple(run.history),
        held_out=pool.aside,
    )
    _log.info("%s", report, extra=RETURNED)
    facts = {k: getattr(report, k) for k in ("images", "seconds", "steps", "stopped", "parameters")}
    facts |= {"agreement": after.agreement, "sure_agreement": after.sure_agreement}
    add_history(model, "calibrated", moved=run.moved(initial), **facts)
    return report


def _check(seconds: float, parameters: str | None, batch_size: int, steps: int | None) -> None:
    wrong = None
    if parameters is not None and parameters not in PARAMETERS:
        known = ", ".join(map(repr, PARAMETERS))
        wrong = ("parameters", repr(parameters), f"one of {known}", "parameters='producers'")
    elif not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        wrong = ("seconds", repr(seconds), "a positive, finite number", "seconds=60")
    elif steps is not None and steps < 0:
        wrong = ("steps", str(steps), "0 or more, or None", "steps=None")
    elif batch_size < 1:
        wrong = ("batch_size", str(batch_size), "at least 1", "batch_size=32")
    if wrong is not None:
        where, got, need, hint = wrong
        raise CalibrationError(where, got=got, need=need, hint=hint)
