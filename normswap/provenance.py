"""What a model remembers of where it came from and what was done to it.

Plain data that hangs on the module object, so that it survives ``deepcopy`` and travels with the
model from ``load_model`` through ``convert``, ``calibrate`` and ``finetune`` into ``save``.
This room holds the record; it never reads files and never builds models.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

_ATTRIBUTE = "_normswap_provenance"


@dataclass(frozen=True)
class Provenance:
    """The life of a model so far.

    Attributes:
        source: how to build the BN original again (``sources.rebuild`` reads it), or None.
        preprocessing: the JSON form of ``data.Preprocessing``, or None.
        class_names: the labels, in the order of the logits, or None.
        plans: the JSON form of every plan applied, in order.
        history: one entry per later step: calibrated, fine-tuned, evaluated.
        trusted: the sources that the user typed, here and now; never written to a file.
        statistics: what a passage needs of every BatchNorm that a per-sample layer replaced, by
            the layer's name; the only tensors here, and no part of the model.
    """

    source: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    plans: tuple[dict[str, Any], ...] = ()
    history: tuple[dict[str, Any], ...] = field(default=())
    trusted: frozenset[str] = frozenset()
    statistics: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )


def provenance_of(model: nn.Module) -> Provenance:
    """The record that hangs on ``model``; an empty one if there is none."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Provenance) else Provenance()


def remember(model: nn.Module, **changes: Any) -> None:
    """Replace fields of the model's record."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper is no place to keep it
    object.__setattr__(model, _ATTRIBUTE, replace(provenance_of(model), **changes))


def versions(*packages: str) -> dict[str, str]:
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def portable(source: dict[str, Any] | None) -> dict[str, Any] | None:
    """A source as it may leave this machine: of a checkpoint the file's name, not its folder.

    Example:
        >>> portable({"spec": "timm/resnet18", "checkpoint": "/home/me/secret/best.pth"})
        {'spec': 'timm/resnet18', 'checkpoint': 'best.pth'}
    """
    checkpoint = (source or {}).get("checkpoint")
    if source is None or not isinstance(checkpoint, str):
        return source
    return {**source, "checkpoint": PurePath(checkpoint).name}


def add_facts(model: nn.Module, **facts: Any) -> None:
    """Add facts to the last step, for example which images it left out."""
    *before, last = provenance_of(model).history
    remember(model, history=(*before, {**last, **facts}))


def add_history(model: nn.Module, step: str, **facts: Any) -> None:
    """Append one step, for example ``add_history(model, "calibrated", images=256)``."""
    history = (*provenance_of(model).history, {"step": step, **facts})
    remember(model, history=history)
