"""Cross-Iteration BatchNorm on a GPU: the gradient of its normalisation in two kernels.

They read x and the gradient twice each and write ∂x once; torch's own would go over ∂x again, and
take a dozen launches for what is of channels alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layers.gpu import batch_renorm_kernels, cross_iteration_kernels
from normswap.layers.gpu.batch_renorm import cut_batch
from normswap.layers.gpu.launching import (
    PLANS,
    CannotLaunchError,
    Kinds,
    Launch,
    are_usual,
    as_batch,
    is_aligned,
    kind,
    memory_format_of,
    on_device_of,
    takes,
)
from normswap.layers.gpu.tiles import power_of_two


class _Plan(NamedTuple):
    memory_format: torch.memory_format
    parts: int
    sums: Launch
    pull: Launch


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    share: Tensor | float,
    eps: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """What x, γ, β have for gradients, lean and growth; or None where the eager form must do.

    ``lean`` is minus the gradient of μ̄ and ``growth`` minus twice that of σ̄², both (C,).

    Args:
        grad: of the output.
        x: the batch.
        weight: γ, or None.
        bias: β, or None.
        mean: (C,), μ̄.
        variance: (C,), σ̄².
        share: what the batch has of both, (C,) or one number.
        eps: ε.
        needed: whether x, γ, β and what depends on μ̄ and σ̄² ask for one.
    """
    shares = share if isinstance(share, Tensor) else None
    kinds = (kind(weight), kind(bias), kind(mean), kind(variance), kind(shares))
    aligned = is_aligned(x)
    plan = _plan(x.shape, x.stride(), x.dtype, x.get_device(), aligned, kinds, needed)
    if plan is None or grad.dtype != x.dtype:
        return None
    grad = as_batch(grad, plan.memory_format)
    sums = mean.new_empty((2, plan.parts, x.shape[1]))
    grad_x = torch.empty_like(x) if needed[0] else None
    found = (
        torch.empty_like(weight) if weight is not None and needed[1] else None,
        torch.empty_like(bias) if bias is not None and needed[2] else None,
        torch.empty_like(mean) if needed[3] else None,
        torch.empty_like(mean) if needed[3] else None,
    )
    one = 1.0 if isinstance(share, Tensor) else float(share)
    try:
        with on_device_of(x):
            plan.sums(x, grad, mean, sums)
            vectors = mean, variance, weight, shares, sums
            plan.pull(x, grad, grad_x, *vectors, *found, one, float(eps))
    except CannotLaunchError:
        return None
    return grad_x, *found


@lru_cache(maxsize=PLANS)
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: int,
    aligned: bool,  # noqa: ARG001 - a kernel is compiled for it
    kinds: Kinds,
    needed: tuple[bool, ...],  # noqa: ARG001 - for that too
) -> _Plan | None:
    memory_format = memory_format_of(shape, stride) if takes(shape, dtype) else None
    if memory_format is None or not are_usual(kinds, device):
        return None
    if any(one is not None and one[0] != torch.float32 for one in kinds[2:]):
        return None
    cut, constants = cut_batch(shape, memory_format)
    sums = Launch(batch_renorm_kernels.backward_sums, cut.programs, constants, cut.warps)
    constants = (*constants, power_of_two(cut.parts))
    pull = Launch(cross_iteration_kernels.backward, cut.programs, constants, cut.warps)
    return _Plan(memory_format, cut.parts, sums, pull)
