"""How far a converted model is from its BatchNorm original.

Per site: the error predicted from the running statistics alone, the error of the site by itself
(fed what the original feeds its BatchNorm), and the error that has built up by there. End to end:
the error of the outputs and how often the two models agree. Nothing here changes a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap import pictures
from normswap.errors import CalibrationError
from normswap.graph import Movable, movable_producers
from normswap.graph.norms import fused_parts, is_batchnorm, state_of
from normswap.recipes import recipe_of
from normswap.reports import aligned, write_report
from normswap.running import (
    call,
    copied,
    device_of,
    entries,
    evaluating,
    hooked,
    input_of,
    leaves,
    moved,
)

if TYPE_CHECKING:
    from normswap.planning import Plan

TRUST = 0.9
"""Top-1 agreement below which a conversion should not be used without fine-tuning."""
MOST_ERROR = 0.5
"""Output error above which it should not be either: two outputs may agree in what is larger."""


# --- what is compared with what -------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One site in both models.

    Attributes:
        name: qualified name, the same in both.
        module: what stands there in the converted model.
        original: the BatchNorm of the original.
    """

    name: str
    module: nn.Module
    original: nn.Module

    @property
    def replaced(self) -> bool:
        """Whether the conversion put another kind of layer here."""
        return type(self.module) is not type(self.original)

    @property
    def taken(self) -> str | None:
        """The activation that the converted layer took in and its BatchNorm does not hold."""
        recipe = recipe_of(self.module)
        if recipe is None or fused_parts(self.original) is not None:
            return None
        return recipe.taken(self.module)

    def reference(self, output: Tensor) -> Tensor:
        """A copy of the original's output, in the form the converted layer's output takes."""
        copy = output.detach().clone()
        activated: Tensor = getattr(F, self.taken)(copy) if self.taken else copy
        return activated


def paired_sites(model: nn.Module, teacher: nn.Module) -> tuple[Pair, ...]:
    """The BatchNorms of ``teacher`` and what stands at the same names in ``model``.

    Raises:
        CalibrationError: the two are one model, share modules, or have no site in common.
    """
    ours = dict(model.named_modules(remove_duplicate=False))
    pairs = tuple(
        Pair(name, ours[name], bn)
        for name, bn in teacher.named_modules()
        if is_batchnorm(bn) and name in ours
    )
    if any(pair.module is pair.original for pair in pairs):
        raise CalibrationError(
            "teacher",
            got="the converted model itself, or one that shares its layers",
            need="the BatchNorm original",
            hint="teacher = copy.deepcopy(model) before convert(model, ...)",
        )
    if not pairs:
        raise CalibrationError(
            "teacher",
            got="a model without a BatchNorm at any name of the converted model",
            need="the BatchNorm original of this very model",
            hint="a deep copy taken before the conversion, or load_model with the same spec",
        )
    return pairs


def batches(images: Tensor | Iterable[Any], size: int) -> list[Any]:
    """Images as a list of batches: a tensor is split, an iterable is taken as it comes.

    A data loader makes lists of what its data set gives: of ``[images]``, ``[images, labels]`` and
    every other list that begins with (N, C, …) maps the first entry is taken.

    Raises:
        CalibrationError: there are no images.
    """
    if size < 1:
        raise CalibrationError("batch_size", got=str(size), need="at least 1", hint="batch_size=32")
    if isinstance(images, Tensor):
        found = list(torch.split(images, size))
    else:
        found = [_without_labels(batch) for batch in images]
    if not found or (isinstance(images, Tensor) and not len(images)):
        raise CalibrationError(
            "images",
            got="none",
            need="at least one batch of preprocessed images",
            hint="normswap.data.load_images(folder, preprocessing)",
        )
    return found


def _without_labels(batch: Any) -> Any:
    if not (isinstance(batch, list) and batch and all(isinstance(t, Tensor) for t in batch)):
        return batch
    first, *rest = batch
    if first.dim() >= 4:
        return first
    labels = len(rest) == 1 and rest[0].dim() <= 1 and not rest[0].is_floating_point()
    return first if labels or (not rest and first.dim() != 3) else batch  # 3: a detector's image


# --- the measurement ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteDrift:
    """The relative error of one site's output: root mean square over the original's spread.

    Attributes:
        name: qualified name.
        kind: class of the converted layer.
        predicted: from the running statistics alone, no data; None where nothing can be said.
        alone: with the inputs that the original gives its BatchNorm; where the convolution in
            front of it moved too, with the inputs that the original gives that one.
        measured: with the inputs that the converted model gives it.
    """

    name: str
    kind: str
    predicted: float | None
    alone: float | None
    measured: float | None


@dataclass(frozen=True)
class Drift:
    """The distance between a converted model and its original on some images.

    Attributes:
        sites: one entry per BatchNorm of the original, in the order of its modules.
        output_error: relative root mean square error of all outputs together; None if the outputs
            cannot be compared.
        agreement: share of equal top-1 choices (per pixel in dense prediction), or None.
        images: number of batches' entries seen; 0 where only predictions are known.
        sure_agreement: the same share among those choices of which the original is sure (it gives
            them more than half of the softmax), or None.
        evidence: where only predictions are known, what such conversions kept of real networks.
    """

    sites: tuple[SiteDrift, ...]
    output_error: float | None
    agreement: float | None
    images: int
    sure_agreement: float | None = None
    evidence: tuple[str, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether the converted model may be used as it is."""
        if not self.images:
            return bool(self.sites) and all(site.predicted == 0 for site in self.sites)
        if self.output_error is None:
            return False
        if self.agreement is None:
            return self.output_error <= 1 - TRUST
        return self.agreement >= TRUST and self.output_error <= MOST_ERROR

    @property
    def _predicted(self) -> list[float]:
        return [site.predicted for site in self.sites if site.predicted is not None]

    @property
    def warning(self) -> str | None:
        """What to tell a user whose model should be calibrated or fine-tuned first; else None."""
        return self.warned("calibration or fine-tuning")

    def warned(self, remedy: str) -> str | None:
        """``warning``, with what would help named by the caller."""
        if self.trusted:
            return None
        known = [site for site in self.sites if site.alone or site.predicted]
        worst = max(known, key=lambda s: s.alone or s.predicted or 0.0, default=None)
        place = f"; the worst layer is {worst.name}" if worst is not None else ""
        seen = "".join(f"; for comparison, {words}" for words in self.evidence)
        return f"{self.summary}: do not use it without {remedy}{place}{seen}"

    @property
    def summary(self) -> str:
        """One line."""
        parts = []
        if not self.images and self._predicted:
            middle, most = statistics.median(self._predicted), max(self._predicted)
            parts.append(
                f"predicted error of a layer by itself: median {middle:.0%}, largest {most:.0%}"
            )
        unknown = sum(site.predicted is None for site in self.sites)
        if not self.images and unknown:
            layers = "1 layer" if unknown == 1 else f"{unknown} layers"
            parts.append(
                f"nothing can be predicted of {layers} (no running statistics, or not matched)"
            )
        if self.agreement is not None:
            sure = self.sure_agreement
            among = "" if sure is None else f" ({sure:.1%} of those the original is sure of)"
            parts.append(f"top-1 agreement {self.agreement:.1%}{among}")
        if self.output_error is not None:
            parts.append(f"output error {self.output_error:.1%}")
        return ", ".join(parts) or "outputs that cannot be compared"

    def rows(self) -> list[tuple[str, ...]]:
        """A table: name, kind, predicted, alone, measured."""
        return [
            (s.name, s.kind, *(_share(v) for v in (s.predicted, s.alone, s.measured)))
            for s in self.sites
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``, the verdict included."""
        return {**asdict(self), "trusted": self.trusted, "warning": self.warning}

    def __str__(self) -> str:
        head = ("site", "layer", "predicted", "alone", "measured")
        return "\n".join([*aligned([head, *self.rows()]), self.summary])

    def write(self, path: str | Path) -> Path:
        """Write a picture (``.png``, ``.svg``, ``.pdf``), JSON (``.json``) or else the table."""
        return write_report(path, draw=self.draw, data=self.to_json(), text=str(self))

    def draw(self, path: str | Path) -> Path:
        """Write a picture of the three errors along the network."""
        errors = {
            label: [getattr(site, field) for site in self.sites] for field, label in _LABELS.items()
        }
        kinds = ", ".join(sorted({site.kind for site in self.sites}))
        title = f"{kinds}: {self.summary}"
        return pictures.drift(errors, [site.name for site in self.sites], title, path)


_LABELS = {
    "predicted": "predicted from the running statistics",
    "alone": "the layer by itself",
    "measured": "built up by here",
}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class _Error:
    """Running relative error: sums of squared differences and of the reference's spread.

    Args:
        by_channel: every channel has a mean of its own. One mean for all counts the distance
            between channels as spread, which hides errors where their units differ.
    """

    def __init__(self, *, by_channel: bool = False) -> None:
        self.by_channel = by_channel
        self.sums: Tensor | None = None  # (difference², reference², reference) by channel
        self.count = 0

    def add(self, found: Tensor, reference: Tensor) -> None:
        if found.shape != reference.shape or not found.numel():
            return
        ours, theirs = self._rows(found.detach()), self._rows(reference)
        sums = torch.stack([(ours - theirs).square().sum(1), theirs.square().sum(1), theirs.sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += theirs.shape[1]

    def _rows(self, x: Tensor) -> Tensor:
        if self.by_channel and x.dim() > 1:
            return x.double().transpose(0, 1).flatten(1)
        return x.double().reshape(1, -1)

    @property
    def parts(self) -> tuple[float, float]:
        """Sum of squared differences, and of squared deviations of the reference."""
        if self.sums is None:
            return 0.0, 0.0
        difference, square, total = self.sums
        spread = square - total.square() / self.count
        constant = spread <= 1e-12 * square  # nothing varies: its size is the scale
        return float(difference.sum()), float(torch.where(constant, square, spread).sum())

    @property
    def value(self) -> float | None:
        return _ratio([self]) if self.count else None


def _ratio(errors: Iterable[_Error]) -> float | None:
    difference, spread = (sum(column) for column in zip(*(e.parts for e in errors), strict=True))
    if spread <= 0:
        return None if difference > 0 else 0.0
    return float((difference / spread) ** 0.5)


class _OutputError:
    """The error of all outputs together, by channel."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[int, int], _Error] = {}

    def add(self, found: list[Tensor], reference: list[Tensor]) -> None:
        for index, (ours, theirs) in enumerate(zip(found, reference, strict=False)):
            key = index, theirs.shape[1] if theirs.dim() > 1 else 1
            self._outputs.setdefault(key, _Error(by_channel=True)).add(ours, theirs)

    @property
    def value(self) -> float | None:
        seen = [error for error in self._outputs.values() if error.count]
        return _ratio(seen) if seen else None


class _SiteErrors:
    """Hooks that compare every site of two models, call by call."""

    def __init__(self, pairs: tuple[Pair, ...], producers: Mapping[str, Movable]) -> None:
        self.pairs, self.producers = pairs, producers
        self._made: dict[str, Tensor] = {}
        self.alone = {pair.name: _Error() for pair in pairs}
        self.measured = {pair.name: _Error() for pair in pairs}
        self._kept: dict[str, list[Tensor]] = {}

    def install(self, stack: ExitStack) -> None:
        for name, producer in self.producers.items():
            hook = producer.original.register_forward_hook(self._make(name, producer))
            stack.enter_context(hooked(hook))
        for pair in self.pairs:
            stack.enter_context(
                hooked(
                    pair.original.register_forward_hook(self._keep(pair), with_kwargs=True),
                    pair.module.register_forward_hook(self._compare(pair)),
                )
            )

    def _make(self, name: str, producer: Movable) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
            if args:
                self._made[name] = producer.module.forward(args[0])

        return hook

    def _keep(self, pair: Pair) -> Any:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            reference = pair.reference(output)
            self._kept.setdefault(pair.name, []).append(reference)
            x = input_of(args, kwargs).clone()
            made = self._made.pop(pair.name, None)
            if made is not None and made.shape == x.shape:
                x = made
            # .forward: the hooks of the converted layer are for the converted model's own pass
            self.alone[pair.name].add(pair.module.forward(x), reference)

        return hook

    def _compare(self, pair: Pair) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            waiting = self._kept.get(pair.name)
            if waiting:
                self.measured[pair.name].add(output, waiting.pop(0))

        return hook


class Agreement:
    """Counts equal top-1 choices, and those of which the original is sure."""

    def __init__(self) -> None:
        self.same = self.count = self.sure_same = self.sure_count = 0

    def add(self, found: list[Tensor], reference: list[Tensor]) -> None:
        """One batch's outputs of the converted model and of the original."""
        for ours, theirs in zip(found, reference, strict=False):
            if theirs.dim() >= 2 and theirs.shape[1] > 1 and ours.shape == theirs.shape:
                same = ours.argmax(1) == theirs.argmax(1)
                sure = theirs.float().softmax(1).amax(1) > 0.5
                self.same += int(same.sum())
                self.count += same.numel()
                self.sure_same += int((same & sure).sum())
                self.sure_count += int(sure.sum())
                return  # the first output that can hold classes; others are auxiliary

    @property
    def value(self) -> float | None:
        """The share of equal choices; None without any."""
        return self.same / self.count if self.count else None

    @property
    def sure(self) -> float | None:
        """The same among those of which the original is sure."""
        return self.sure_same / self.sure_count if self.sure_count else None


@torch.no_grad()
def measure_drift(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    batch_size: int = 32,
) -> Drift:
    """Compare a converted model with its BatchNorm original on unlabelled images.

    The relative error of an output z against its reference t is
    ``√(Σ (z − t)² / Σ (t − mean t)²)``: 0 is equal, 1 is as bad as a constant. At the outputs
    every channel has a mean of its own.

    Args:
        model: the converted model.
        teacher: its BatchNorm original; sites are paired by qualified name.
        images: a preprocessed tensor, or an iterable of batches (a tuple is the positional
            arguments, a dict the keyword arguments). No labels.
        batch_size: images per forward pass when ``images`` is a tensor.

    Returns:
        Drift: per site and end to end.

    Raises:
        CalibrationError: the models do not belong together, or there are no images.

    Example:
        >>> import copy, normswap
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> teacher, x = copy.deepcopy(net), torch.randn(4, 3, 8, 8)
        >>> net = normswap.convert(net, "brn", example_inputs=x).model
        >>> measure_drift(net, teacher, x).output_error
        0.0
    """
    pairs = paired_sites(model, teacher)
    found_batches, device = batches(images, batch_size), device_of(model)
    producers = _moved_producers(pairs, model, teacher, moved(found_batches[0], device))
    recorder, whole, agreement, seen = _SiteErrors(pairs, producers), _OutputError(), Agreement(), 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model, teacher))
        recorder.install(stack)
        for batch in found_batches:
            inputs = moved(batch, device)
            reference = [leaf.clone() for leaf in leaves(call(teacher, copied(inputs)))]
            found = leaves(call(model, copied(inputs)))
            whole.add(found, reference)
            agreement.add(found, reference)
            seen += entries(batch)
    sites = tuple(
        SiteDrift(
            pair.name,
            type(pair.module).__name__,
            predicted_drift(pair.module, pair.original),
            recorder.alone[pair.name].value,
            recorder.measured[pair.name].value,
        )
        for pair in pairs
    )
    return Drift(sites, whole.value, agreement.value, seen, agreement.sure)


def _moved_producers(
    pairs: tuple[Pair, ...], model: nn.Module, teacher: nn.Module, batch: Any
) -> dict[str, Movable]:
    """The convolutions before each site, where any weight is not the original's."""
    ours, theirs = dict(model.named_parameters()), dict(teacher.named_parameters())
    shared = ours.keys() & theirs.keys() - {f"{pair.name}.{n}" for pair in pairs for n in _OWN}
    if all(_equal(ours[name], theirs[name]) for name in shared):
        return {}
    return movable_producers((pair.name for pair in pairs), model, teacher, batch)[0]


_OWN = ("weight", "bias")


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.to(theirs), theirs)


def predict_drift(
    model: nn.Module, originals: Mapping[str, nn.Module], plan: Plan | None = None
) -> Drift:
    """What BatchNorm's statistics alone say about a matched conversion; no data, no forward.

    Args:
        model: the converted model.
        originals: its BatchNorms before the conversion, by qualified name.
        plan: how it was converted; nothing is predicted of layers that were not matched.

    Returns:
        Drift: with predictions only.
    """
    now = dict(model.named_modules(remove_duplicate=False))
    entries = () if plan is None else plan.swapped
    unmatched = {name for entry in entries if entry.init != "match" for name in entry.names}

    def predicted(name: str, original: nn.Module) -> float | None:
        known = is_batchnorm(now[name]) or name not in unmatched
        return predicted_drift(now[name], original) if known else None

    sites = tuple(
        SiteDrift(name, type(now[name]).__name__, predicted(name, bn), None, None)
        for name, bn in originals.items()
        if name in now
    )
    standing = (recipe_of(now[site.name]) for site in sites if site.predicted)
    words = {recipe.evidence for recipe in standing if recipe is not None and recipe.evidence}
    return Drift(sites, None, None, 0, evidence=tuple(sorted(words)))


def predicted_drift(module: nn.Module, original: nn.Module) -> float | None:
    """The relative error to expect of a matched layer, from BatchNorm's statistics alone.

    0 for layers that keep running statistics; None where BatchNorm has none.
    """
    if is_batchnorm(module):
        return 0.0
    state = state_of(original)
    if state.mean is None or state.var is None:
        return None
    recipe = recipe_of(module)
    return None if recipe is None else recipe.drift(state)
