"""What an update does: timm's optimizer, scheduler and weight average, chosen by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from normswap.copying import values_only
from normswap.errors import TrainingError
from normswap.reading import what_is_wrong
from normswap.training.checkpoints import check_fit
from normswap.training.likeness import check_like, check_optimizer_state
from normswap.training.options import FineTune
from normswap.training.parameters import parameter_groups, relative_steps


class Updates:
    """The model with all that changes it from one update to the next.

    Args:
        model: on its device.
        options: the recipe.
        accelerator: of the run.
        learning_rate: at the top of the schedule.
        per_epoch: updates in an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        options: FineTune,
        accelerator: Any,
        *,
        learning_rate: float,
        per_epoch: int,
    ) -> None:
        self.model, self.clip_grad, self.accelerator = model, options.clip_grad, accelerator
        self.average = make_average(model, options.ema)
        plain = make_optimizer(model, options, learning_rate)
        self.scheduler = make_scheduler(plain, options, learning_rate, per_epoch)
        # without a gradient scaler accelerate's step and backward only add a search for packages,
        # 1.3 ms per update
        scaled = accelerator.scaler is not None
        self.optimizer = accelerator.prepare_optimizer(plain) if scaled else plain
        self._untried = False  # a state that no step has used yet

    @property
    def shown(self) -> nn.Module:
        """The weights to validate and to keep: the average, where there is one."""
        shown: nn.Module = self.model if self.average is None else self.average.module
        return shown

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / float(group.get("lr_scale", 1.0))

    def backward(self, loss: Any) -> None:
        """Gradients of one forward."""
        if self.accelerator.scaler is None:
            torch.autograd.backward(loss)
        else:
            self.accelerator.backward(loss)

    def update(self, number: int) -> None:
        """One step of everything; ``number`` counts from 1.

        Raises:
            TrainingError: the state that was taken over is none for this optimizer.
        """
        if self.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        with self._trying():
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step_update(number)
        if self.average is not None:
            self.average.update(self.model, step=number)

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """What an optimizer remembers of a parameter only its first step shows to be complete."""
        try:
            yield
        except Exception as error:
            if not self._untried or isinstance(error, torch.OutOfMemoryError):
                raise
            raise TrainingError(
                "the optimizer's state in the checkpoint",
                got=what_is_wrong(error),
                need="what the run wrote",
                hint="another output directory, or removing the file to start afresh",
            ) from error
        self._untried = False

    def state(self) -> dict[str, Any]:
        """All of it as plain data."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` gave.

        Raises:
            ValueError, KeyError, RuntimeError: it belongs to another model.
        """
        check_fit(self.model.state_dict(), state["model"])
        if self.average is not None:
            check_fit(self.average.module.state_dict(), state["average"])
        now, then = self.optimizer.state_dict(), state["optimizer"]
        check_like(now["param_groups"], then["param_groups"], "optimizer.param_groups")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_optimizer_state(then["param_groups"], then["state"], parameters)
        if self.scheduler is not None:
            check_like(self.scheduler.state_dict(), state["scheduler"], "scheduler")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._untried = True
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def make_optimizer(model: nn.Module, options: FineTune, learning_rate: float) -> Any:
    """Timm's optimizer by name, with the norms and biases free of weight decay.

    Where the rate is the rule's, steps are relative to the weights.
    """
    from timm.optim import create_optimizer_v2

    groups = parameter_groups(model, options.weight_decay)
    if options.relative:
        groups = relative_steps(groups)
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
    # older releases give None for a name that they do not know, and know no "constant" by name
    if scheduler is None and options.scheduler not in ("none", "constant"):
        raise TrainingError(
            "FineTune.scheduler",
            got=repr(options.scheduler),
            need="a name that this timm knows",
            hint="'cosine'",
        )
    if scheduler is None or not warmup:  # it scales the groups when it first changes them
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    return scheduler


def make_average(model: nn.Module, decay: float | None) -> Any:
    """Timm's moving average of the weights, or None."""
    if decay is None:
        return None
    from timm.utils import ModelEmaV3

    with values_only():
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
