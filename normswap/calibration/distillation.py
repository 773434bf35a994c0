"""Step two: Adam within a time budget, and the best state seen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.calibration.closed_form import Fit, in_lockstep, moments_before, steady
from normswap.calibration.coordinates import Coordinates
from normswap.calibration.distance import Distance
from normswap.calibration.flow import Scale, match_in_flow, own_parameters
from normswap.calibration.images import FEWEST, Pool
from normswap.calibration.tuning import Tuning
from normswap.drift import Agreement, Pair, paired_sites
from normswap.errors import CalibrationError, NormSwapError, in_short
from normswap.graph import Movable, movable_producers
from normswap.progress import Progress, ProgressCallback
from normswap.recipes import recipe_of
from normswap.running import entries, evaluating

_log = logging.getLogger("normswap")

_HEAD_START = 1.1
"""How much worse than the best the last state may look on the held-out images and yet stay."""
_PATIENCE = 8
"""Checks without progress before the time is called wasted; there are ten in a budget."""
_LOOK, _FLOW = 0.02, 0.05
"""Largest share of the time for one look at the held-out images, and for γ and β in one pass."""
_LOCKSTEP, _SOLVING = 0.25, 0.85
"""The same for the images of one walk in lockstep, and for all walks."""
_MAKING = 0.25
"""The same until no more images are made from those given."""
_SCALING = 0.5
"""The same until no further producer is scaled."""
_FEWEST_LOOKS = 13
"""So often original and copy run on the fewest images, however little time there is."""
_OVERRUN = 1.1
"""A budget may be exceeded by a tenth."""
_SLACK = 0.05
"""Of which the last step may take half."""
_STEP = 2.0
"""A step costs as much as original and copy on twice its images: the way back counts double."""
_REST_SCALE = 0.01
"""Learning rate of convolutions over that of the normalisers', with ``parameters="all"``."""


class State:
    """A copy of some parameters' values."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._kept = [(p, p.detach().clone()) for p in parameters]

    def changed(self) -> list[nn.Parameter]:
        """Those whose values are others now."""
        return [parameter for parameter, value in self._kept if not torch.equal(parameter, value)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back."""
        for parameter, value in self._kept:
            parameter.copy_(value)


@dataclass(frozen=True)
class Budget:
    """How long the distillation may go on, as a share between 0 and 1."""

    clock: Callable[[], float]
    begun: float
    deadline: float
    opened: float
    steps: int | None

    @property
    def elapsed(self) -> float:
        """Seconds since the calibration began."""
        return self.clock() - self.begun

    def share(self, steps: int) -> float:
        """How much of the time, or of the steps, is spent."""
        time_share = (self.clock() - self.opened) / max(self.deadline - self.opened, 1e-9)
        if self.steps is None:
            return time_share
        return max(time_share, steps / self.steps if self.steps else 1.0)

    def holds(self, seconds: float) -> bool:
        """Whether there is time for so much more, or nearly."""
        return self.clock() + seconds <= self.deadline + _SLACK * (self.deadline - self.begun)


class Run:
    """One calibration: the models, the images and the best state so far."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        pool: Pool,
        parameters: str | None,
        tuning: Tuning,
        *,
        amp: bool,
    ) -> None:
        self.model, self.teacher, self.pool, self.tuning = model, teacher, pool, tuning
        self.pairs = tuple(p for p in paired_sites(model, teacher) if p.replaced)
        if not self.pairs:
            raise CalibrationError(
                "model",
                got="a model in which nothing was replaced",
                need="a converted model",
                hint="--to gn (normswap.convert(model, 'gn', example_inputs=x))",
            )
        self.own = list(
            {id(p): p for pair in self.pairs for p in own_parameters(pair.module).values()}.values()
        )
        self.parameters = parameters or _default(self.pairs)
        self.producers: dict[str, Movable] = {}
        self.once: tuple[Pair, ...] = ()
        if self.parameters != "norms":
            names = [pair.name for pair in self.pairs]
            self.producers, once = movable_producers(names, model, teacher, pool.first())
            self.once = tuple(pair for pair in self.pairs if pair.name in once)
        tensors = [p for producer in self.producers.values() for p in producer.tensors]
        self.rest = _rest(model, self.own, tensors, self.parameters)
        self.moving = [*self.own, *self.rest]
        self.distance = Distance(self.pairs, model, teacher, tuning.site_weight)
        self.amp = amp
        self.steps, self.stopped = 0, "budget"
        self._fitting, self._shorter = 128, 1.0
        self._look, self._stride = 0.0, 0.0  # seconds of a look and of a step, as far as is known
        self._came: int | None = None
        self.history: list[tuple[float, float]] = []
        self.best, self.best_state = math.inf, State(self.moving)

    def _autocast(self) -> Any:
        return torch.autocast(self.pool.device.type, torch.bfloat16) if self.amp else nullcontext()

    def check(self, elapsed: float, *, last: bool = False) -> float:
        """Held-out loss now; keeps the state if it is the best so far.

        The held-out part is small and its loss noisy. Where the learning rate has come to rest the
        last state generalises better than a lucky one before, so it has a head start, though not
        before the model as it came. Nor does any state stay that keeps fewer decisions than that.
        """
        self.distance.decisions = decisions = Agreement()
        with torch.no_grad(), self._autocast():
            losses = [float(self.distance(batch)) for batch in self.pool.held_out()]
        loss = sum(losses) / len(losses)
        self.history.append((elapsed, loss))
        if decisions.sure is not None:  # an original that is sure of nothing decides nothing
            self._came = decisions.same if self._came is None else self._came
            if decisions.same < self._came:
                return loss
        if loss < self.best or (last and loss < min(self.best * _HEAD_START, self.history[0][1])):
            self.best, self.best_state = loss, State(self.moving)
        return loss

    def moved(self, since: State) -> list[str]:
        """Names of the parameters beside the replaced layers' own that are not as they were."""
        own = {id(p) for p in self.own}
        changed = {id(p) for p in since.changed() if id(p) not in own}
        return [name for name, p in self.model.named_parameters() if id(p) in changed]

    def fit_to(self, seconds: float, clock: Callable[[], float]) -> None:
        """Time one small batch, and let no look at many images cost a large part of the time.

        Raises:
            CalibrationError: the time is too short for the fewest looks that there must be.
        """
        batch = next(self.pool.held_out())
        begun = clock()
        with evaluating(self.model, self.teacher), torch.no_grad(), self._autocast():
            self.distance(batch)
        pace = max(clock() - begun, 1e-9) / max(entries(batch), 1)
        least = _FEWEST_LOOKS * FEWEST * pace
        if least > _OVERRUN * seconds:
            raise CalibrationError(
                "seconds",
                got=f"{seconds:.3g} s, too few for this model here",
                need=f"about {least:.3g} s for looking at it alone",
                hint=f"--calibrate-seconds {math.ceil(2 * least)} (seconds=…), or smaller images",
            )
        self._look = FEWEST * pace
        self._stride = _STEP * self.pool.size * pace
        self.pool.limit(held=int(_LOOK * seconds / pace), wide=int(_FLOW * seconds / pace))
        self._fitting = max(16, int(_LOCKSTEP * seconds / pace))

    @torch.no_grad()
    def flow(self) -> dict[str, Scale]:
        """γ and β in closed form."""
        return match_in_flow(self.pairs, self.model, self.teacher, self.pool.widest())

    @torch.no_grad()
    def solve(self, spent: Callable[[], float], look: Callable[[], float]) -> dict[str, Scale]:
        """The closed form: γ and β, and the producers where they may move; ends in the best.

        Args:
            spent: the share of the time that is over.
            look: the held-out loss, which keeps the state if it is the best.
        """
        if not self.producers:
            scales = self.flow()
            look()
            return scales
        came, scales = self.best, {}
        fit = Fit(self.once, self.producers, self.pool.dice)
        for number, batches in enumerate(self.pool.rounds(self._fitting)):
            opened = spent()
            if number == 0:
                seen = moments_before(
                    self.pairs, self.producers, self.teacher, batches, self.pool.dice,
                    lambda done: spent() * (done + 1) / done > _MAKING,
                )  # fmt: skip
                steady(self.pairs, self.producers, seen, lambda: spent() > _SCALING)
                fit = Fit(self.once, self.producers, self.pool.dice)
                scaled = State(self.moving)
            found = in_lockstep(fit, (self.model, self.teacher), batches, lambda: spent() >= 1)
            before = self.best
            if found is not None and look() < before:
                scales = found
            if number == 0 and self.best >= came:  # as when there are too few images
                scaled.restore()
                norms = Fit(self.once, {}, self.pool.dice)
                found = in_lockstep(
                    norms, (self.model, self.teacher), batches, lambda: spent() >= 1
                )
                if found is not None and look() < before:
                    scales = found
                break
            if 2 * spent() - opened > _SOLVING:
                break
        self.best_state.restore()
        return scales

    def distil(
        self,
        scales: dict[str, Scale],
        budget: Budget,
        progress: ProgressCallback | None,
    ) -> None:
        """Adam until the deadline, the step limit, or a plateau; ten checks on the way."""
        if not self.moving:
            self.stopped = "nothing to move"
            return
        # who starts nearer takes shorter steps
        self._shorter = min(1.0, max(0.05, self.best / max(self.history[0][1], 1e-12)))
        coordinates = Coordinates(self.pairs, scales)
        optimizer = self._optimizer(coordinates)
        lowest, stale, next_check = math.inf, 0, 0.1
        while True:
            opened = budget.clock()
            fits = budget.holds(self._stride + self._look)
            share = budget.share(self.steps) if fits else 1.0
            if share >= min(next_check, 1):
                loss = self.check(budget.elapsed, last=share >= 1)
                self._look, opened = budget.clock() - opened, budget.clock()
                stale, lowest = 0 if loss < lowest else stale + 1, min(loss, lowest)
                next_check = share + 0.1
                if progress is not None:
                    progress(Progress(min(share, 1.0), 1.0, f"held-out loss {loss:.4f}"))
                if self._over(share, loss, stale, budget.steps):
                    return
            self._set_rate(optimizer, share)
            if not self._step(coordinates, optimizer):
                self.stopped = "not finite"
                return
            self._stride = budget.clock() - opened

    def _optimizer(self, coordinates: Coordinates) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": coordinates.leaves, "scale": 1.0}]
        if self.rest:
            groups.append({"params": self.rest, "scale": _REST_SCALE})
        return torch.optim.Adam(groups, betas=(0.9, 0.99))

    def _set_rate(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        rate = min(self.tuning.most, self.tuning.rate / len(self.pairs)) * self._shorter
        rate *= 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.steps + 1) / 10) * group["scale"]

    def _over(self, share: float, loss: float, stale: int, steps: int | None) -> bool:
        if not math.isfinite(loss):
            self.stopped = "not finite"
        elif share >= 1:
            self.stopped = "steps" if steps is not None and self.steps >= steps else "budget"
        elif loss < 1e-9 or stale >= _PATIENCE:
            self.stopped = "plateau"
        else:
            return False
        return True

    def _step(self, coordinates: Coordinates, optimizer: torch.optim.Optimizer) -> bool:
        for parameter in self.moving:
            parameter.grad = None
        with torch.enable_grad(), self._autocast():
            few = self.pool.choose(self.pairs, self.tuning.sites)
            loss = self.distance(self.pool.draw(self.tuning), few)
        if not bool(torch.isfinite(loss)):
            return False
        torch.autograd.backward(loss)
        if not coordinates.pull():
            return False
        optimizer.step()
        coordinates.push()
        self.steps += 1
        return True


@contextmanager
def taken() -> Iterator[None]:
    """Turn what a model raises at its first sight of the images into one clear line."""
    try:
        yield
    except (torch.OutOfMemoryError, NormSwapError):  # a LayerError is a ValueError too
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise CalibrationError(
            "images",
            got=f"{type(error).__name__} from the model: {in_short(error)}",
            need="batches that the model takes",
            hint="a tensor (N, C, H, W) of preprocessed images",
        ) from error


def search(
    run: Run,
    span: tuple[float, float],
    steps: int | None,
    clock: Callable[[], float],
    progress: ProgressCallback | None,
) -> None:
    """Closed form, then distillation; ends in the best state seen."""
    begun, deadline = span
    start = State(run.moving)
    with ExitStack() as stack:
        stack.enter_context(evaluating(run.model, run.teacher))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(only(run.model, run.moving))
        stack.enter_context(only(run.teacher, []))
        came = run.check(clock() - begun)
        opened, open_for = clock(), max(deadline - clock(), 1e-9)
        scales = run.solve(
            lambda: (clock() - opened) / open_for, lambda: run.check(clock() - begun)
        )
        run.best_state.restore()
        run.distil(scales, Budget(clock, begun, deadline, clock(), steps), progress)
        if run.best <= came:
            run.best_state.restore()
        else:
            start.restore()
            run.best = came


def _default(pairs: tuple[Pair, ...]) -> str:
    """Producers where their scales count: in front of norms whose channels share statistics."""
    recipes = [(recipe_of(pair.module), pair.module) for pair in pairs]
    shared = any(r is not None and r.sharing(layer) is not None for r, layer in recipes)
    return "producers" if shared else "norms"


def _rest(
    model: nn.Module, own: list[nn.Parameter], producers: list[nn.Parameter], parameters: str
) -> list[nn.Parameter]:
    """What moves besides the replaced layers' own parameters."""
    if parameters != "all":
        return producers
    taken = {id(p) for p in own}
    return [
        p
        for p in model.parameters()
        if p.requires_grad and id(p) not in taken and p.is_floating_point()
    ]


@contextmanager
def only(model: nn.Module, moving: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach ``moving`` alone; gradient flags and gradients come back."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(p) for p in moving}
    try:
        for p, _, _ in kept:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        yield
    finally:
        for p, flag, grad in kept:
            p.grad = None
            p.requires_grad_(flag)
            p.grad = grad
