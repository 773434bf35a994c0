"""The rule behind a recommendation: from what was measured to one target, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from normswap.batch_effect import BatchEffect
from normswap.benchmark import BASE, Ratio

_STEADY = 0.9
"""BatchNorm that keeps this share of its own decisions at a batch size can be trained there."""
_LARGE = 32
"""The batch at which BatchNorm is kept where nothing was seen of the images."""
_COMES_BACK = 0.5
"""A calibrated conversion that keeps this share is a start from which training goes on."""
_BETTER = 0.02
"""How much more another per-sample target must keep to be taken in the place of ``gn``."""
FEW = 16
"""Of fewer images no share is firm."""


@dataclass(frozen=True)
class Option:
    """One target on this model.

    Attributes:
        target: as it was asked for; ``bn`` is the model itself.
        per_sample: whether a sample's output depends on that sample alone, in training too.
        predicted: median over the layers of the error that the running statistics predict; None
            where they say nothing.
        matched: share of the original's decisions kept without calibration; None without images.
        kept: the same after a short calibration, on images that it did not see. Exact targets keep
            everything. Where nothing is decided: one minus the outputs' relative error.
        training: cost of a training step beside BatchNorm's; None if it could not be measured.
        inference: likewise.
        memory: bytes kept for the backward at the batch size asked for; 0 if not measured.
        state: bytes of training state beside parameters and buffers.
        note: what stands against it.
        images: that ``matched`` and ``kept`` were measured on, none of which the calibration saw
            where there were 16 (a quarter of 64 and more, at random); 0: not measured, or known
            without any.
        hurried: whether there were images, and no time to calibrate.
    """

    target: str
    per_sample: bool
    predicted: float | None = None
    matched: float | None = None
    kept: float | None = None
    training: Ratio | None = None
    inference: Ratio | None = None
    memory: int = 0
    state: int = 0
    note: str = ""
    images: int = 0
    hurried: bool = False


@dataclass(frozen=True)
class Verdict:
    """What to do, and why.

    Attributes:
        target: what to convert to.
        reason: one sentence, with what spoke for the runner-up.
        firm: whether more images would hardly change it: no share that decided is within two
            standard errors of where it would have decided otherwise, nor of too few images.
    """

    target: str
    reason: str
    firm: bool = True


def decide(options: Sequence[Option], effect: BatchEffect | None, batch_size: int) -> Verdict:
    """The rule, in the order in which it is read.

    1. BatchNorm stays where it works: under the statistics of batches of this size the model keeps
       at least 90 % of its own decisions. (Without images: at a batch of 32 and more.)
    2. Else a per-sample target, which depends on no batch, if a short calibration brings it back
       to half of the decisions: ``gn``, or the one that keeps more than 2 points more, and more
       than two standard errors of the difference.
    3. Else nothing but an exact target keeps the network: ``frozen``.

    Shares within two standard errors of these bounds, or of fewer than 16 images, decide as they
    stand, for want of better, but not firmly. What a target costs decides nothing.

    That ``frozen`` keeps more does not decide either: how far a fine-tune comes from a start is not
    said by what it keeps. In the short sweeps of ``examples/benchmarks/recommend.py`` ``gn`` ended
    clearly in front of it where it had kept 55 to 78 %, of images unlike those before, and level
    where it had kept 88 to 100 % of images like them; on EfficientNet-Lite0 with few photographs,
    unlike those before, it ended behind at 88 %.

    Args:
        options: what was measured, in the order in which targets are preferred.
        effect: BatchNorm at this batch size; None without images.
        batch_size: images in a training step.
    """
    if effect is not None and effect.kept is None and effect.refused is None:
        effect = None  # there were no images for one batch
    steady = effect.kept if effect is not None else None
    if effect is None and batch_size >= _LARGE:
        return Verdict(BASE, f"a batch of {batch_size} is large enough for most networks")
    doubts = []
    if effect is not None and steady is not None and not _sure(steady, effect.judged, _STEADY):
        doubts.append(_doubt("BatchNorm keeps", steady, effect.judged, _STEADY))
    if effect is not None and steady is not None and steady >= _STEADY:
        why = (
            f"under the statistics of batches of {batch_size} the model keeps {steady:.0%} of its "
            f"own decisions{_of(effect.judged)}, so BatchNorm can be trained as it is"
        )
        return _verdict(BASE, [why], doubts)
    why = _against_batchnorm(effect, batch_size)
    free = [o for o in options if o.per_sample]
    doubts += [f"there was no time to calibrate {o.target}" for o in free if o.hurried]
    best = _best([o for o in free if _known(o)])
    if best is None:
        return _verdict("frozen", [why], doubts)
    kept = f"{_share(best):.0%} of the decisions{_of(best.images)}"
    when = "without calibration" if best.kept is None else "after a short calibration"
    if not _sure(_share(best), best.images, _COMES_BACK):
        doubts.append(_doubt(f"{best.target} keeps", _share(best), best.images, _COMES_BACK))
    if _share(best) < _COMES_BACK:
        alone = f"{when} {best.target} keeps only {kept}"
        return _verdict("frozen", [why, alone, "frozen keeps all and needs no batch"], doubts)
    reasons = [why, f"{when} it keeps {kept}, and no batch matters to it"]
    return _verdict(best.target, reasons, doubts, _behind(best, options, effect))


def _best(known: Sequence[Option]) -> Option | None:
    """The first, or whichever keeps more than that by more than chance and ``_BETTER``."""
    if not known:
        return None
    best = known[0]
    for option in known[1:]:
        chance = math.hypot(_error(option)[1], _error(best)[1])
        if _share(option) - _share(best) > max(_BETTER, chance):
            best = option
    return best


def _behind(best: Option, options: Sequence[Option], effect: BatchEffect | None) -> Iterator[str]:
    """What spoke for those that lost, and why they lost."""
    for option in options:
        if option.per_sample and option is not best and _share(option) > _share(best):
            yield (
                f"{option.target.capitalize()} keeps {_share(option):.0%}{_of(option.images)}, "
                "which is no more than chance or 2 points above it"
            )
    frozen = next((o for o in options if o.target == "frozen" and o.kept == 1 and not o.note), None)
    if frozen is None:
        return
    cheaper = ""
    if frozen.training is not None and best.training is not None:
        pair = frozen.training, best.training
        if all(ratio.steady for ratio in pair) and pair[0].upper < pair[1].lower:
            cheaper = f" and costs less ({pair[0].median:.2f} beside {pair[1].median:.2f})"
    where = ""
    if effect is not None and effect.sites:
        where = (
            f" (the means of your images lie {effect.shift:.2f} running standard deviations from "
            "them, median layer)"
        )
    yield (
        f"Frozen keeps all of them, needs no batch either{cheaper}, but its statistics stay as "
        f"they are{where}. Trained, it ended behind gn or level in sweeps of small networks, and "
        "in front on EfficientNet-Lite0 with few photographs: with few images, try both"
    )


def _verdict(
    target: str, reasons: Sequence[str], doubts: Sequence[str], others: Iterable[str] = ()
) -> Verdict:
    sentences = ["; ".join(reasons), *others]
    if doubts:
        sentences.append(f"Not firm, more images or seconds may change it: {'; '.join(doubts)}")
    return Verdict(target, ". ".join(sentences), not doubts)


def _against_batchnorm(effect: BatchEffect | None, batch_size: int) -> str:
    """Why BatchNorm is not trained at this batch size."""
    if effect is None:
        return f"BatchNorm's statistics are seldom good at a batch of {batch_size}"
    if effect.kept is None:
        return f"BatchNorm cannot be trained at a batch of {batch_size} ({effect.refused})"
    return (
        f"under the statistics of batches of {batch_size} the model keeps only {effect.kept:.0%} "
        f"of its own decisions{_of(effect.judged)}"
    )


def _known(option: Option) -> bool:
    return option.kept is not None or option.matched is not None


def _share(option: Option) -> float:
    """What it keeps, before a calibration where there was no time for one: that loses nothing."""
    return (option.matched or 0.0) if option.kept is None else option.kept


def _error(option: Option) -> tuple[float, float]:
    return _interval(_share(option), option.images)


def _interval(share: float, images: int) -> tuple[float, float]:
    """Middle of a share's range, and two standard errors; nothing of 0 images: it is exact.

    With two hits and two misses more than were seen (Agresti and Coull): 8 of 8 are not certainty.
    """
    if not images:
        return share, 0.0
    middle = (share * images + 2) / (images + 4)
    return middle, 2 * math.sqrt(middle * (1 - middle) / (images + 4))


def _sure(share: float, images: int, bound: float) -> bool:
    middle, error = _interval(share, images)
    return not images or (images >= FEW and abs(middle - bound) > error)


def _doubt(who: str, share: float, images: int, bound: float) -> str:
    middle, error = _interval(share, images)
    low, high = max(0.0, middle - error), min(1.0, middle + error)
    if low <= bound <= high:
        return f"{who} {low:.0%} to {high:.0%}, and {bound:.0%} is where the answer changes"
    return f"{who} {share:.0%} of {images} images, which are few"


def _of(images: int) -> str:
    return f" (of {images} images)" if images else ""
