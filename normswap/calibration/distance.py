"""The loss: how far the model is from its original, at the outputs and at the sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.drift import Agreement, Pair
from normswap.errors import CalibrationError
from normswap.running import call, copied, hooked, leaves


class Distance:
    """The loss of one forward pass through both models: outputs and sites."""

    def __init__(
        self, pairs: tuple[Pair, ...], model: nn.Module, teacher: nn.Module, site_weight: float
    ) -> None:
        self.pairs, self.model, self.teacher = pairs, model, teacher
        self.site_weight = site_weight
        self._kept: dict[str, list[Tensor]] = {}
        self._errors: list[Tensor] = []
        self.decisions = Agreement()

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
                reference = [leaf.clone() for leaf in leaves(call(self.teacher, copied(batch)))]
            found = leaves(call(self.model, copied(batch)))
        self.decisions.add(found, reference)
        outputs = [
            _output_loss(ours, theirs)
            for ours, theirs in zip(found, reference, strict=False)
            if ours.shape == theirs.shape and theirs.numel()
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
