"""What a run is driven by: accelerate, timm's optimizer, scheduler and weight average."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from normswap.errors import TrainingError
from normswap.training.options import FineTune
from normswap.training.parameters import parameter_groups
from normswap.training.scoring import usable_device


@contextlib.contextmanager
def borrowed_accelerator(options: FineTune) -> Iterator[Any]:
    """An ``accelerate.Accelerator`` for one run.

    Accelerate keeps its settings once per process. What was set before, the caller's own
    accelerator included, comes back afterwards.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState

    singletons: list[Any] = [AcceleratorState, GradientState]
    if PartialState._shared_state.get("num_processes", 1) == 1:
        singletons.append(PartialState)  # with several processes it holds the process group
    before = [(item, dict(item._shared_state)) for item in singletons]
    for item in singletons:
        item._shared_state.clear()
    try:
        on_cpu = _wants_cpu(options.device)
        _check_precision(options, on_cpu)
        with _gpu(options.device):
            yield Accelerator(cpu=on_cpu, mixed_precision=_precision(options))
    finally:
        for item, state in before:
            if not state and item is PartialState and _several(item):
                continue  # the process group that this run has opened outlives it
            item._shared_state.clear()
            item._shared_state.update(state)


def _several(state: Any) -> bool:
    return bool(state._shared_state.get("num_processes", 1) > 1)


def _wants_cpu(device: str | None) -> bool:
    if device is None:
        return not torch.accelerator.is_available()
    return usable_device(device).type == "cpu"


def _precision(options: FineTune) -> str | None:
    return options.amp or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _check_precision(options: FineTune, on_cpu: bool) -> None:
    if on_cpu and options.amp == "fp16":
        raise TrainingError(
            "FineTune.amp", got="'fp16' on the CPU", need="a GPU for it", hint="'bf16' or None"
        )


def _gpu(device: str | None) -> contextlib.AbstractContextManager[Any]:
    found = torch.device(device) if device else torch.device("cpu")
    if found.type == "cuda" and found.index is not None:
        return torch.cuda.device(found)
    return contextlib.nullcontext()


def make_optimizer(model: nn.Module, options: FineTune, learning_rate: float) -> Any:
    """Timm's optimizer by name, with the norms and biases free of weight decay."""
    from timm.optim import create_optimizer_v2

    groups = parameter_groups(model, options.weight_decay)
    return _by_name(
        "optimizer",
        options.optimizer,
        "timm.optim.list_optimizers()",
        lambda: create_optimizer_v2(
            groups,
            # timm's sgd is Nesterov's, which needs a momentum; this is the plain one
            opt="momentum"
            if options.optimizer == "sgd" and not options.momentum
            else options.optimizer,
            lr=learning_rate,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        ),
    )


def make_scheduler(
    optimizer: Any, options: FineTune, learning_rate: float, updates_per_epoch: int
) -> Any:
    """Timm's scheduler by name, stepped per update; None for ``"none"``."""
    from timm.scheduler import create_scheduler_v2

    if options.scheduler == "plateau":  # timm keeps no state of it, so no resume would be exact
        raise TrainingError(
            "FineTune.scheduler",
            got="'plateau', which timm has deprecated",
            need="a schedule that is known in advance",
            hint="'cosine'",
        )
    warmup = round(options.warmup * updates_per_epoch)
    third = options.epochs / 3  # timm's own points, 90 epochs on, lie beyond any fine-tune
    points: dict[str, Any] = {}
    if options.scheduler == "step":
        points = {"decay_epochs": third}
    elif options.scheduler == "multistep":
        points = {"decay_milestones": [third, 2 * third]}
    scheduler, _ = _by_name(
        "scheduler",
        options.scheduler,
        "'cosine'",
        lambda: create_scheduler_v2(
            optimizer,
            sched=options.scheduler,
            num_epochs=options.epochs,
            **points,
            warmup_epochs=warmup / updates_per_epoch,
            warmup_lr=learning_rate / 100,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        ),
    )
    return scheduler


def make_average(model: nn.Module, decay: float | None) -> Any:
    """Timm's moving average of the weights, or None."""
    if decay is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _by_name(field: str, name: str, known: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise TrainingError(
            f"FineTune.{field}",
            got=f"{name!r} ({error})",
            need=f"a {field} that timm knows and these options suit",
            hint=known,
        ) from error
