"""Values that float16 cannot square: facts for the report of a half-precision proof."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normswap.graph.norms import is_norm
from normswap.onnx.file.parity import Array
from normswap.onnx.subject import Subject

SQUARE_LIMIT = 255.0
"""Inputs above this have squares that float16 cannot hold (65504)."""


def wide_inputs(subject: Subject, batches: Sequence[Sequence[Array]]) -> dict[str, float]:
    """Norms whose inputs are so large that float16 cannot hold their squares.

    Args:
        subject: the model.
        batches: inputs, real ones if there are any.

    Returns:
        The largest magnitude seen, by module name, where it is above 255.
    """
    seen: dict[str, float] = {}

    def watch(name: str, inputs: tuple[object, ...]) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.numel():
                seen[name] = max(seen.get(name, 0.0), float(value.abs().max()))

    norms = [(name, module) for name, module in subject.model.named_modules() if is_norm(module)]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs))
        for name, module in norms
    ]
    try:
        for batch in batches:
            subject.run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value for name, value in seen.items() if value > SQUARE_LIMIT}
