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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.drift import (
    Drift,
    Pair,
    batches,
    device_of,
    entries,
    evaluating,
    hooked,
    leaves,
    measure_drift,
    moved,
    paired_sites,
)
from normswap.errors import CalibrationError
from normswap.graph import call
from normswap.graph.norms import is_batchnorm, state_of
from normswap.provenance import add_history

_log = logging.getLogger("normswap")

_PER_CHANNEL = ("weight", "bias", "tau")
_HEAD_START = 1.1
"""How much worse than the best the last state may look on the held-out images and yet stay."""
_PATIENCE = 8
"""Checks without progress before the time is called wasted; there are ten in a budget."""
_REST_SCALE = 0.01
"""Learning rate of convolutions over that of the normalisers', with ``parameters="all"``."""


@dataclass(frozen=True)
class _Tuning:
    """What the research settled; see examples/benchmarks/NOTES.md.

    Attributes:
        rate: learning rate of all sites together, in spreads of their outputs; one site gets its
            share, because what the sites do adds up along the network.
        most: largest rate of one site.
        site_weight: weight of the sites' mean error beside the outputs'.
        sites: share of the sites that a step looks at; looking at all costs half as much again.
        mix: share of the images that are mixed with another one.
        jitter: spread of a random gain and offset per image and input channel.
        warp: largest zoom and shift, as a share of the image.
    """

    rate: float = 0.8
    most: float = 0.03
    site_weight: float = 0.1
    sites: float = 0.3
    mix: float = 1.0
    jitter: float = 0.2
    warp: float = 0.25


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
        parameters: ``norms`` or ``all``.
        history: (seconds, held-out loss) along the way.
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

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"calibrated on {self.images} images in {self.seconds:.0f} s, {self.steps} steps "
            f"({self.stopped}): {self.before.summary} → {self.after.summary}"
        )


# --- the images -----------------------------------------------------------------------------------


class _Pool:
    """Training batches for distillation, and a held-out part that decides which state is best."""

    def __init__(
        self, images: Tensor | Iterable[Any], size: int, device: torch.device, seed: int
    ) -> None:
        found = images if isinstance(images, Tensor) else _joined(batches(images, size))
        self.images: Tensor | list[Any] = found
        self.size, self.device = size, device
        self._draw = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        units = len(found)
        every = 8 if units >= 16 else units + 1
        self._held = list(range(0, units, every))
        self._used = [i for i in range(units) if units < 16 or i % every]

    @property
    def count(self) -> int:
        if isinstance(self.images, Tensor):
            return len(self.images)
        return sum(entries(batch) for batch in self.images)

    def _at(self, indices: list[int]) -> Any:
        if isinstance(self.images, Tensor):
            return self.images[indices].to(self.device)
        return moved(self.images[indices[0]], self.device)

    def held_out(self) -> Iterator[Any]:
        step = self.size if isinstance(self.images, Tensor) else 1
        for start in range(0, len(self._held), step):
            yield self._at(self._held[start : start + step])

    def widest(self, numbers: int = 20_000_000) -> Any:
        """As many images in one batch as fit ``numbers`` input values."""
        if not isinstance(self.images, Tensor):
            return self._at(self._used[:1])
        fitting = max(8, numbers // max(self.images[0].numel(), 1))
        return self._at(self._used[:fitting])

    def draw(self, tuning: _Tuning) -> Any:
        """The next training batch, augmented where it is a tensor of images."""
        step = self.size if isinstance(self.images, Tensor) else 1
        if len(self._order) < min(step, len(self._used)):
            shuffled = torch.randperm(len(self._used), generator=self._draw).tolist()
            self._order = [self._used[i] for i in shuffled]
        chosen, self._order = self._order[:step], self._order[step:]
        batch = self._at(chosen)
        return self._augmented(batch, tuning) if isinstance(batch, Tensor) else batch

    def choose(self, pairs: tuple[Pair, ...], share: float) -> tuple[Pair, ...]:
        """A random share of the sites, at least one."""
        count = max(1, round(share * len(pairs)))
        chosen = torch.randperm(len(pairs), generator=self._draw)[:count].tolist()
        return tuple(pairs[i] for i in sorted(chosen))

    def _augmented(self, x: Tensor, tuning: _Tuning) -> Tensor:
        if x.dim() < 3 or not x.is_floating_point():
            return x
        count, column = len(x), (-1, *[1] * (x.dim() - 1))
        rolls = torch.rand(3, count, generator=self._draw)
        partner = torch.randperm(count, generator=self._draw).to(x.device)
        noise = torch.randn(2, *x.shape[:2], *[1] * (x.dim() - 2), generator=self._draw)
        x = torch.where((rolls[0] < 0.5).view(column).to(x.device), x.flip(-1), x)
        if x.dim() == 4:
            x = self._warped(x, tuning)
        strength = 0.5 * rolls[1] * (rolls[2] < tuning.mix)
        x = torch.lerp(x, x[partner], strength.view(column).to(x))
        noise = (tuning.jitter * noise).to(x)
        return x * (1 + noise[0]) + noise[1]

    def _warped(self, x: Tensor, tuning: _Tuning) -> Tensor:
        """Zoomed and shifted at random, mirrored at the border."""
        rolls = 2 * torch.rand(len(x), 4, generator=self._draw) - 1
        matrix = torch.zeros(len(x), 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = (1 + tuning.warp * rolls[:, :2]).unbind(1)
        matrix[:, :, 2] = tuning.warp * rolls[:, 2:]
        grid = F.affine_grid(matrix.to(x), list(x.shape), align_corners=False)
        warped: Tensor = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        return warped


def _joined(found: list[Any]) -> Tensor | list[Any]:
    """One tensor if all batches are tensors of one image size, else the batches themselves."""
    tensors = [batch for batch in found if isinstance(batch, Tensor) and batch.dim() > 1]
    alike = len({batch.shape[1:] for batch in tensors}) == 1
    return torch.cat(tensors) if alike and len(tensors) == len(found) else found


# --- γ and β in data-flow order -------------------------------------------------------------------


def _linear_output(bn: nn.Module, x: Tensor) -> Tensor:
    """What BatchNorm computes in eval mode, without a fused activation."""
    s = state_of(bn)
    return F.batch_norm(x, s.mean, s.var, s.weight, s.bias, s.mean is None, 0.0, s.eps)


def _standardised(module: nn.Module, x: Tensor) -> Tensor | None:
    """The layer's output before γ and β; None for a layer of unknown formula."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return F.instance_norm(x, eps=module.eps)
    if "FilterResponseNorm" in type(module).__name__:
        axes = list(range(2, x.dim()))
        square = x.square().mean(axes, keepdim=True) if axes else x.square()
        learnt = getattr(module, "eps_l", None)
        eps = torch.as_tensor(module.eps, device=x.device).abs()
        if learnt is not None:
            eps = eps + _column(learnt.abs(), x)
        return x * torch.rsqrt(square + eps)
    if is_batchnorm(module):
        s = state_of(module)
        if s.mean is not None:
            return F.batch_norm(x, s.mean, s.var, None, None, False, 0.0, s.eps)
    return None


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def _by_channel(x: Tensor) -> Tensor:
    """(C, everything else), float32."""
    return x.detach().float().transpose(0, 1).flatten(1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = _by_channel(x)
    return rows.mean(1), rows.std(1, correction=0)


@dataclass(frozen=True)
class _Scale:
    """Where a layer works: moments of its standardised input x̂ and spread of the original's y."""

    mean: Tensor
    std: Tensor
    out: Tensor


def _targets(
    pairs: tuple[Pair, ...], teacher: nn.Module, x: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and spread of the original's output per site and channel, before any activation."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    repeated: set[str] = set()

    def hook_for(pair: Pair) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if pair.name in found:  # one (γ, β) cannot serve each of several calls alone
                repeated.add(pair.name)
            found[pair.name] = _moments(_linear_output(pair.original, args[0]))

        return hook

    with hooked(*[p.original.register_forward_pre_hook(hook_for(p)) for p in pairs]):
        call(teacher, x)
    return {name: target for name, target in found.items() if name not in repeated}


def _match_in_flow(
    pairs: tuple[Pair, ...], model: nn.Module, teacher: nn.Module, x: Any
) -> dict[str, _Scale]:
    """Set every γ and β from what really arrives there, upstream first, in one forward pass.

    With x̂ the standardised input and t the original's output: ``γ = ±std(t)/std(x̂)``, with the
    sign γ has, and ``β = mean(t) − γ·mean(x̂)``.
    """
    targets = _targets(pairs, teacher, x)
    scales: dict[str, _Scale] = {}

    def hook_for(pair: Pair) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            normal = _standardised(module, args[0])
            if pair.name not in targets or normal is None:
                return
            (mean, std), (centre, spread) = _moments(normal), targets[pair.name]
            std = std.clamp_min(1e-4 * std.max().clamp_min(1e-6))
            scales[pair.name] = _Scale(mean, std, spread)
            own = _own(module)
            if "weight" in own and "bias" in own:
                slope = own["weight"].sign() * spread / std
                own["weight"].copy_(slope)
                own["bias"].copy_(centre - slope * mean)

        return hook

    with hooked(*[p.module.register_forward_pre_hook(hook_for(p)) for p in pairs]):
        call(model, x)
    return scales


# --- distillation ---------------------------------------------------------------------------------


class _Distance:
    """The loss of one forward pass through both models: outputs and sites."""

    def __init__(
        self, pairs: tuple[Pair, ...], model: nn.Module, teacher: nn.Module, site_weight: float
    ) -> None:
        self.pairs, self.model, self.teacher = pairs, model, teacher
        self.site_weight = site_weight
        self._kept: dict[str, list[Tensor]] = {}
        self._errors: list[Tensor] = []

    def _hooks(self, pair: Pair) -> tuple[Any, Any]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self._kept.setdefault(pair.name, []).append(pair.reference(output))

        def compare(_: nn.Module, __: Any, output: Tensor) -> None:
            waiting = self._kept.get(pair.name)
            if waiting:
                self._errors.append(_relative(output, waiting.pop(0)))

        return keep, compare

    def _watch(self, pairs: tuple[Pair, ...]) -> Iterator[Any]:
        for pair in pairs:
            keep, compare = self._hooks(pair)
            yield pair.original.register_forward_hook(keep)
            yield pair.module.register_forward_hook(compare)

    def __call__(self, batch: Any, pairs: tuple[Pair, ...] | None = None) -> Tensor:
        """The loss on ``batch``, looking at ``pairs`` (all of them by default)."""
        self._kept.clear()
        self._errors.clear()
        with hooked(*self._watch(self.pairs if pairs is None else pairs)):
            with torch.no_grad():
                reference = [leaf.clone() for leaf in leaves(call(self.teacher, batch))]
            found = leaves(call(self.model, batch))
        outputs = [
            _output_loss(ours, theirs)
            for ours, theirs in zip(found, reference, strict=False)
            if ours.shape == theirs.shape
        ]
        if not outputs and not self._errors:
            raise CalibrationError(
                "calibrate",
                got="a model with no comparable site or output",
                need="a model that runs its replaced layers",
                hint="images of the size the model was made for",
            )
        weighted = [self.site_weight * torch.stack(self._errors).mean()] if self._errors else []
        mean = [torch.stack(outputs).mean()] if outputs else []
        return torch.stack([*mean, *weighted]).sum()


def _output_loss(found: Tensor, reference: Tensor) -> Tensor:
    """Relative squared error; for rows of logits also what it does to their softmax."""
    loss = _relative(found, reference)
    if found.dim() == 2 and found.shape[1] > 1:
        ours, theirs = found.float().log_softmax(1), reference.float().log_softmax(1)
        loss = loss + F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return loss


def _relative(found: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error over the reference's variance, in float32."""
    difference = found.float() - reference.float()
    spread = reference.float().var(correction=0)
    return difference.square().mean() / spread.clamp_min(1e-8)


@dataclass(frozen=True)
class _Affine:
    """γ and β of one layer as ``y = (a + unit·u)·(x̂ − mean)/std + b + unit·v``."""

    weight: nn.Parameter
    bias: nn.Parameter
    mean: Tensor
    std: Tensor
    unit: Tensor
    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor

    def pull(self) -> None:
        """Gradients of γ and β become gradients of u and v."""
        slope, shift = _gradient(self.weight), _gradient(self.bias)
        self.u.grad = (slope - shift * self.mean) / self.std * self.unit
        self.v.grad = shift * self.unit

    def push(self) -> None:
        """Write u and v back into γ and β."""
        slope = (self.a + self.unit * self.u) / self.std
        self.weight.copy_(slope)
        self.bias.copy_(self.b + self.unit * self.v - slope * self.mean)


@dataclass(frozen=True)
class _Single:
    """Any other per-channel parameter of a layer (τ): ``start + unit·u``."""

    parameter: nn.Parameter
    unit: Tensor
    start: Tensor
    u: Tensor

    def pull(self) -> None:
        """The gradient of the parameter becomes that of u."""
        self.u.grad = _gradient(self.parameter) * self.unit

    def push(self) -> None:
        """Write u back into the parameter."""
        self.parameter.copy_(self.start + self.unit * self.u)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class _Coordinates:
    """The replaced layers' parameters in units of what they do to the output.

    FRN's x̂ is ±1 plus a little where a channel's mean outweighs its spread, so γ and β fight each
    other. In ``y = a·(x̂ − mean)/std + b`` they do not; a, b and τ are measured in the spread of
    the original's output, and one learning rate fits every channel of every network.
    """

    def __init__(self, pairs: tuple[Pair, ...], scales: dict[str, _Scale]) -> None:
        self.parts: list[_Affine | _Single] = []
        self.leaves: list[Tensor] = []
        seen: set[int] = set()
        for pair in pairs:
            scale = scales.get(pair.name) or _plain_scale(pair)
            own = _own(pair.module)
            if any(id(p) in seen for p in own.values()):
                continue
            seen |= {id(p) for p in own.values()}
            self._add(own, scale)

    def _add(self, own: dict[str, nn.Parameter], scale: _Scale) -> None:
        unit = scale.out.clamp_min(1e-3 * scale.out.max().clamp_min(1e-6))
        if "weight" in own and "bias" in own:
            w, b = own.pop("weight"), own.pop("bias")
            u, v = self._leaf(w), self._leaf(b)
            a0, b0 = w.detach() * scale.std, b.detach() + w.detach() * scale.mean
            self.parts.append(_Affine(w, b, scale.mean, scale.std, unit, a0, b0, u, v))
        for parameter in own.values():
            start = parameter.detach().clone()
            self.parts.append(_Single(parameter, unit, start, self._leaf(parameter)))

    def _leaf(self, like: Tensor) -> Tensor:
        self.leaves.append(torch.zeros_like(like, dtype=torch.float32, requires_grad=True))
        return self.leaves[-1]

    def pull(self) -> bool:
        """Gradients in the coordinates; False if any is not finite."""
        for part in self.parts:
            part.pull()
        return all(
            bool(leaf.grad.isfinite().all()) for leaf in self.leaves if leaf.grad is not None
        )

    @torch.no_grad()
    def push(self) -> None:
        """Write the coordinates back into the layers."""
        for part in self.parts:
            part.push()


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """γ, β and τ of a layer; ε is not among them: it must stay small."""
    return {k: p for k, p in module.named_parameters(recurse=False) if k in _PER_CHANNEL}


def _plain_scale(pair: Pair) -> _Scale:
    """For a layer whose formula is not known or that runs more than once."""
    weight = state_of(pair.original).weight
    one = torch.ones(state_of(pair.original).channels, device=device_of(pair.module))
    return _Scale(0 * one, one, one if weight is None else weight.detach().abs().float())


@contextmanager
def _only(model: nn.Module, moving: list[nn.Parameter]) -> Iterator[None]:
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


@contextmanager
def _placed(device: str | torch.device | None, *models: nn.Module) -> Iterator[None]:
    """Models on ``device`` for a while."""
    homes = [device_of(model) for model in models]
    try:
        for model in models:
            if device is not None:
                model.to(device)
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            if device is not None:
                model.to(home)


class _State:
    """A copy of some parameters' values."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._kept = [(p, p.detach().clone()) for p in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in self._kept:
            parameter.copy_(value)


def _rest(model: nn.Module, own: list[nn.Parameter], parameters: str) -> list[nn.Parameter]:
    """What moves besides the replaced layers' own parameters."""
    if parameters == "norms":
        return []
    taken = {id(p) for p in own}
    return [
        p
        for p in model.parameters()
        if p.requires_grad and id(p) not in taken and p.is_floating_point()
    ]


@dataclass(frozen=True)
class _Budget:
    """How long the distillation may go on, as a share between 0 and 1."""

    clock: Callable[[], float]
    begun: float
    deadline: float
    opened: float
    steps: int | None

    @property
    def elapsed(self) -> float:
        return self.clock() - self.begun

    def share(self, steps: int) -> float:
        time_share = (self.clock() - self.opened) / max(self.deadline - self.opened, 1e-9)
        return time_share if self.steps is None else max(time_share, steps / max(self.steps, 1))


class _Run:
    """One calibration: the models, the images and the best state so far."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        pool: _Pool,
        parameters: str,
        tuning: _Tuning,
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
                hint="normswap.convert(model, 'gn', example_inputs=x)",
            )
        self.own = list(
            {id(p): p for pair in self.pairs for p in _own(pair.module).values()}.values()
        )
        self.rest = _rest(model, self.own, parameters)
        self.moving = [*self.own, *self.rest]
        self.distance = _Distance(self.pairs, model, teacher, tuning.site_weight)
        self.amp = amp
        self.steps, self.stopped = 0, "budget"
        self.history: list[tuple[float, float]] = []
        self.best, self.best_state = math.inf, _State(self.moving)

    def _autocast(self) -> Any:
        return torch.autocast(self.pool.device.type, torch.bfloat16) if self.amp else nullcontext()

    def check(self, elapsed: float, *, last: bool = False) -> float:
        """Held-out loss now; keeps the state if it is the best so far.

        The held-out part is small and its loss noisy. Where the learning rate has come to rest the
        last state generalises better than a lucky one before, so it has a head start.
        """
        with torch.no_grad(), self._autocast():
            losses = [float(self.distance(batch)) for batch in self.pool.held_out()]
        loss = sum(losses) / len(losses)
        self.history.append((elapsed, loss))
        if loss < self.best * (_HEAD_START if last else 1):
            self.best, self.best_state = loss, _State(self.moving)
        return loss

    @torch.no_grad()
    def flow(self) -> dict[str, _Scale]:
        """The closed form."""
        return _match_in_flow(self.pairs, self.model, self.teacher, self.pool.widest())

    def distil(
        self,
        scales: dict[str, _Scale],
        budget: _Budget,
        progress: Callable[[float, float], None] | None,
    ) -> None:
        """Adam until the deadline, the step limit, or a plateau; ten checks on the way."""
        coordinates = _Coordinates(self.pairs, scales)
        optimizer = self._optimizer(coordinates)
        lowest, stale, next_check = math.inf, 0, 0.1
        while True:
            share = budget.share(self.steps)
            if share >= min(next_check, 1):
                loss = self.check(budget.elapsed, last=share >= 1)
                stale, lowest = 0 if loss < lowest else stale + 1, min(loss, lowest)
                next_check = share + 0.1
                if progress is not None:
                    progress(min(share, 1.0), loss)
                if self._over(share, loss, stale, budget.steps):
                    return
            self._set_rate(optimizer, share)
            if not self._step(coordinates, optimizer):
                self.stopped = "not finite"
                return

    def _optimizer(self, coordinates: _Coordinates) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": coordinates.leaves, "scale": 1.0}]
        if self.rest:
            groups.append({"params": self.rest, "scale": _REST_SCALE})
        return torch.optim.Adam(groups, betas=(0.9, 0.99))

    def _set_rate(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        rate = min(self.tuning.most, self.tuning.rate / len(self.pairs))
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

    def _step(self, coordinates: _Coordinates, optimizer: torch.optim.Optimizer) -> bool:
        for parameter in self.moving:
            parameter.grad = None
        with self._autocast():
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


def calibrate(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    seconds: float = 60,
    parameters: Literal["norms", "all"] = "norms",
    batch_size: int = 32,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    amp: bool | None = None,
    progress: Callable[[float, float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    _tuning: _Tuning | None = None,
) -> Calibration:
    """Bring a converted model to its BatchNorm original on unlabelled images, in place.

    The loss is the relative squared error of the outputs, whatever their structure, plus the mean
    of the same over all sites. An eighth of the images is held out; the state with the smallest
    held-out loss is the one that stays, so the model never ends worse there than it came.

    Args:
        model: the converted model.
        teacher: its BatchNorm original, for example a deep copy taken before the conversion. It
            runs in eval mode and is not changed.
        images: a preprocessed tensor, or an iterable of batches (a tuple is the positional
            arguments, a dict the keyword arguments). No labels. Tensors are flipped and mixed.
        seconds: time budget, everything included.
        parameters: ``"norms"`` moves γ, β and τ of the replaced layers only; ``"all"`` moves every
            parameter that requires a gradient too.
        batch_size: images per step when they come as tensors.
        steps: most optimiser steps, or None.
        seed: of the drawing and mixing of images; the global generators are left alone.
        device: where to work; None is where the model is. The models return home afterwards.
        amp: bfloat16 autocast; None means on CUDA only.
        progress: called with the share of the budget spent and the held-out loss.
        clock: what ``seconds`` are read from.

    Returns:
        Calibration: drift before and after (on the held-out images), time, steps, losses.

    Raises:
        CalibrationError: the models do not belong together, nothing was replaced, or there are no
            images. Whatever is raised, the model is as it was.

    Example:
        >>> import copy, normswap
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> teacher, x = copy.deepcopy(net), torch.randn(32, 3, 12, 12)
        >>> net = normswap.convert(net, "gn", example_inputs=x).model
        >>> report = calibrate(net, teacher, x, steps=20)
        >>> report.after.output_error < report.before.output_error
        True
    """
    _check(seconds, parameters, batch_size)
    begun = clock()
    tuning = _tuning or _Tuning()
    with ExitStack() as stack:
        stack.enter_context(_placed(device, model, teacher))
        home = device_of(model)
        pool = _Pool(images, batch_size, home, seed)
        amp = home.type == "cuda" if amp is None else amp
        run = _Run(model, teacher, pool, parameters, tuning, amp=amp)
        initial = _State(run.moving)
        try:
            before = measure_drift(model, teacher, pool.held_out())
            deadline = (
                begun + seconds - (clock() - begun)
            )  # the last drift costs what the first did
            _search(run, (begun, deadline), steps, clock, progress)
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
        parameters=parameters,
        history=tuple(run.history),
    )
    _log.info("%s", report)
    facts = {k: getattr(report, k) for k in ("images", "seconds", "steps", "stopped", "parameters")}
    add_history(model, "calibrated", agreement=after.agreement, **facts)
    return report


def _check(seconds: float, parameters: str, batch_size: int) -> None:
    wrong = None
    if parameters not in ("norms", "all"):
        wrong = ("parameters", repr(parameters), "'norms' or 'all'", "parameters='norms'")
    elif not seconds > 0:
        wrong = ("seconds", str(seconds), "a positive number", "seconds=60")
    elif batch_size < 1:
        wrong = ("batch_size", str(batch_size), "at least 1", "batch_size=32")
    if wrong is not None:
        where, got, need, hint = wrong
        raise CalibrationError(where, got=got, need=need, hint=hint)


def _search(
    run: _Run,
    span: tuple[float, float],
    steps: int | None,
    clock: Callable[[], float],
    progress: Callable[[float, float], None] | None,
) -> None:
    """Closed form, then distillation; ends in the best state seen."""
    begun, deadline = span
    start = _State(run.moving)
    with ExitStack() as stack:
        stack.enter_context(evaluating(run.model, run.teacher))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_only(run.model, run.moving))
        stack.enter_context(_only(run.teacher, []))
        came = run.check(clock() - begun)
        scales = run.flow()
        run.check(clock() - begun)
        run.best_state.restore()
        run.distil(scales, _Budget(clock, begun, deadline, clock(), steps), progress)
        if run.best <= came:
            run.best_state.restore()
        else:
            start.restore()
            run.best = came
