"""Which task a model is for, where that is certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.running import call, copied, evaluating


class Guess(NamedTuple):
    """A task and what it was told by; ``why`` is empty where nothing told."""

    task: str
    why: str = ""


def guess_task(model: nn.Module, example_inputs: Any, declared: str = "image") -> Guess:
    """The task of a model: detection, segmentation, or else classification.

    Args:
        model: any module; it is called once in eval mode where its class does not tell.
        example_inputs: what it takes.
        declared: what its source says of it (``Source.task``).
    """
    if declared == "detection":
        return Guess("detection", "it takes a list of images")
    home = type(model).__module__
    for family in ("segmentation", "detection"):
        if home.startswith(f"torchvision.models.{family}"):
            return Guess(family, f"torchvision has it among its models of {family}")
    if home.startswith(("torchvision.", "timm.")) or declared != "image":
        return Guess("classification")
    with evaluating(model), torch.no_grad():
        output = call(model, copied(example_inputs))
    return _by(output)


def _by(output: Any) -> Guess:
    if isinstance(output, Mapping):
        found = output.get("out")
        if isinstance(found, Tensor) and found.ndim == 4:
            return Guess("segmentation", "it gives a map of logits as 'out'")
    first = output[0] if isinstance(output, (list, tuple)) and output else None
    if isinstance(first, Mapping) and {"boxes", "labels", "scores"} <= first.keys():
        return Guess("detection", "it gives boxes, labels and scores")
    return Guess("classification")
