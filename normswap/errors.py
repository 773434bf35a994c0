"""The error tree.

    NormSwapError
    ├── SpecError             a model spec that names nothing
    │   └── ConsentError      a file that names code nobody has consented to run
    ├── CheckpointError       a checkpoint that cannot be read or does not fit
    ├── ArtifactError         a normswap directory that cannot be trusted, read or written
    ├── DataError             images or labels that cannot be used
    ├── WalkError             a model the walker cannot run or understand
    ├── PlanError             a request that no plan can satisfy
    ├── SwapError             a plan that does not fit the model it is applied to
    ├── LayerError            a layer asked for something its definition excludes
    ├── CalibrationError      calibration that cannot start or has failed
    ├── TrainingError         fine-tuning that cannot start or has failed
    ├── ExportError           a model that cannot be exported, or a file that is no ONNX model
    │   └── ParityError       an ONNX file that is not the model (exit code 3)
    ├── ImpossibleNumbersError  weights or statistics that are not finite, negative variances
    ├── BusyError             an output that another run is writing
    └── InstallationError     packages that do not fit together

Every message reads ``where: got X; need Y. Try Z.``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RETURNED = {"returned": True}
"""``extra`` of a log record whose text the caller gets too: the command line prints it once."""


def in_short(error: BaseException, most: int = 200) -> str:
    """The first line of an error that says something; its class where none does.

    Of an error of our own it is where, and what was found there: what is needed and what to try
    says the error that this one is put into.

    Example:
        >>> in_short(ValueError("as it was")), in_short(AssertionError())
        ('as it was', 'AssertionError')
    """
    if isinstance(error, NormSwapError):
        return f"{error.where}: {error.got}"
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:most] for line in lines if line), type(error).__name__)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many there are beyond.

    Example:
        >>> some(["stem", "conv1", "conv2"], 2)
        'stem, conv1 and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class NormSwapError(Exception):
    """The root of every error normswap raises on purpose.

    Args:
        where: the module, file or option at fault.
        got: what was found there.
        need: what was expected.
        hint: what to try.
    """

    def __init__(self, where: str, *, got: str, need: str, hint: str) -> None:
        self.where, self.got, self.need, self.hint = where, got, need, hint
        super().__init__(f"{where}: got {got}; need {need}. Try {hint}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.where, self.got, self.need, self.hint))


def _rebuild(cls: type[NormSwapError], where: str, got: str, need: str, hint: str) -> NormSwapError:
    return cls(where, got=got, need=need, hint=hint)


class SpecError(NormSwapError):
    """A model spec that names nothing."""


class ConsentError(SpecError):
    """A file that names code which nobody has consented to run."""


class CheckpointError(NormSwapError):
    """A checkpoint that cannot be read or does not fit."""


class ArtifactError(NormSwapError):
    """A normswap directory that cannot be trusted, read or written."""


class DataError(NormSwapError):
    """Images or labels that cannot be used."""


class WalkError(NormSwapError):
    """A model the walker cannot run or understand."""


class PlanError(NormSwapError):
    """A request that no plan can satisfy."""


class SwapError(NormSwapError):
    """A plan that does not fit the model it is applied to."""


class LayerError(NormSwapError, ValueError):
    """A layer asked for something its definition excludes."""


class CalibrationError(NormSwapError):
    """Calibration that cannot start or has failed."""


class TrainingError(NormSwapError):
    """Fine-tuning that cannot start or has failed."""


class ExportError(NormSwapError):
    """A model that cannot be exported, or a file that is no ONNX model."""


class ParityError(ExportError):
    """An ONNX file that is not the model it claims to be; ``parity`` is the whole report."""

    parity: Any = None


class ImpossibleNumbersError(NormSwapError):
    """Weights or statistics that are not finite, or negative variances."""


class BusyError(NormSwapError):
    """An output that another run is writing."""


class InstallationError(NormSwapError):
    """Packages that do not fit together."""
