"""What the loop must know of normalisation layers: their history, their schedules, their limits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from normswap import layers
from normswap.errors import TrainingError

log = logging.getLogger("normswap")

_PAPER_RUN = 130_000  # steps of BRN's paper, arXiv 1702.03275, section 4
_PAPER_SCHEDULE = {"warmup": 5_000, "r_ramp": 35_000, "d_ramp": 20_000}
_LONGEST = 0.3  # share of a run that a schedule may take


def norm_state(model: nn.Module) -> dict[str, Any]:
    """Iteration counters, schedules and histories, which are no part of the state dict."""
    schedules = {
        name: {key: getattr(module, key) for key in _PAPER_SCHEDULE}
        for name, module in _renorms(model)
    }
    burn_ins = {name: module.burn_in for name, module in _cross_iteration(model)}
    return {"schedules": schedules, "burn_ins": burn_ins, "layers": layers.training_state(model)}


def load_norm_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put back what ``norm_state`` gave."""
    for name, module in _renorms(model):
        module.set_schedule(**state["schedules"][name])
    for name, module in _cross_iteration(model):
        module.burn_in = state["burn_ins"][name]
    layers.load_training_state(model, state["layers"])


def scale_schedules(model: nn.Module, iterations: int) -> None:
    """Fit the schedules of BRN and CBN into a run.

    BRN with running statistics and no schedule starts open: its statistics are already good. BRN
    with fresh running statistics gets the paper's schedule in proportion (plain BN for 4 % of the
    run, r open at 31 %, d at 19 %). CBN with fresh running statistics and no burn-in gets one of
    30 % of the run: its first-order prediction does not reach as far as weights move at first.
    Any other schedule keeps its iterations unless it would take more than 30 % of the run; then it
    is shortened to that.

    Args:
        model: changed in place.
        iterations: training forwards of the run.
    """
    for name, module in _renorms(model):
        wanted = _schedule(module, iterations)
        if wanted != {key: getattr(module, key) for key in wanted}:
            module.set_schedule(**wanted)
            log.info("%s: BRN schedule %s of %d iterations", name, wanted, iterations)
    longest = int(_LONGEST * iterations)
    for name, module in _cross_iteration(model):
        if module.burn_in > longest or (module.burn_in == 0 and _is_fresh(module)):
            log.info("%s: burn-in of %d iterations, not %d", name, longest, module.burn_in)
            module.burn_in = longest


def _schedule(module: Any, iterations: int) -> dict[str, int]:
    own = {key: int(getattr(module, key)) for key in _PAPER_SCHEDULE}
    length = own["warmup"] + max(own["r_ramp"], own["d_ramp"])
    if length == 0 and _is_fresh(module):
        return {k: round(v * iterations / _PAPER_RUN) for k, v in _PAPER_SCHEDULE.items()}
    longest = _LONGEST * iterations
    if length <= longest or int(module.iteration) >= length:  # it fits, or is over
        return own
    return {key: int(value * longest / length) for key, value in own.items()}


def _is_fresh(module: Any) -> bool:
    # not num_batches_tracked: weights that came from another framework leave it at 0
    return not module.running_mean.any() and bool((module.running_var == 1).all())


def _renorms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "set_schedule") and hasattr(module, "r_ramp"):
            yield name, module


def _cross_iteration(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "burn_in", None), int):
            yield name, module


def check_norms(model: nn.Module, device: torch.device, world: int) -> None:
    """Refuse what cannot train here, before it starts.

    Raises:
        TrainingError: SyncBatchNorm over several processes on the CPU.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and device.type == "cpu":
            if world > 1:
                raise TrainingError(
                    name,
                    got="SyncBatchNorm on the CPU",
                    need="a GPU for each process",
                    hint="another target; gn and frn need no synchronisation",
                )
            log.warning("%s: SyncBatchNorm in one process on the CPU is plain BatchNorm", name)
            return


def notes_on_norms(model: nn.Module, world: int) -> list[str]:
    """What several processes share of the normalisation layers, in words."""
    if world == 1:
        return []
    kinds = {type(module).__name__ for module in model.modules()}
    notes = ["each process normalises its own batch; gradients are averaged over all of them"]
    if any("BatchNorm" in kind or "BatchRenorm" in kind for kind in kinds):
        notes.append(
            "running statistics are those of the first process, handed to all before each forward"
        )
    if any("BatchRenorm" in kind for kind in kinds):
        notes.append("BRN: the correction r, d comes from each process's own batch")
    if any("CrossIteration" in kind for kind in kinds):
        notes.append("CBN: the window of past batches is each process's own and is not shared")
    return notes
