"""What a fine-tune does: every choice in one frozen dataclass, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import nn

from normswap.checks import above, number, whole
from normswap.errors import TrainingError
from normswap.files import weights_digest
from normswap.losses import LOSSES

_FREE_ON_RESUME = frozenset(
    {
        "check_data",
        "checkpoint_every",
        "device",
        "eval_batch_size",
        "log_every",
        "tensorboard",
        "track",
        "workers",
    }
)
_SAMPLES_OF_THE_RULE = 256
_ADAPTIVE = ("adam", "lamb", "lion", "rmsprop", "adopt", "mars", "soap", "laprop", "adan")


@dataclass(frozen=True)
class FineTune:
    """The recipe of a fine-tune.

    The defaults suit a pretrained network at a batch of one to eight.

    Args:
        batch_size: samples per process in one forward.
        epochs: passes over the training data.
        learning_rate: at the top of the schedule; None takes 0.002 · √(b/256) for Adam's relatives
            (five times that where FRN is in the model) and 0.1 · b/256 for others, where b counts
            the samples of one update over all processes. By this rule the steps of Adam's relatives
            are relative: the rate of a kernel or matrix is multiplied by its size (see
            :func:`normswap.training.relative_steps`); a rate that is given is one for all.
        optimizer: a name that ``timm.optim.create_optimizer_v2`` knows.
        momentum: of optimizers that have one.
        weight_decay: never applied to norm parameters (γ, β, τ, ε) and biases.
        scheduler: a name that ``timm.scheduler.create_scheduler_v2`` knows, stepped per update;
            ``"step"`` and ``"multistep"`` decay after each third of the run.
        warmup_epochs: linear ramp from 1 % of the learning rate; may be a fraction. None takes a
            tenth of the run.
        gradient_accumulation: forwards per update. It does not enlarge a BN's batch.
        clip_grad: largest norm of the gradient, or None.
        loss: of a classifier, ``"cross-entropy"`` or ``"bce"`` (binary, a question for each class,
            as timm's ``a1_in1k`` weights were trained); validated is cross-entropy in any case.
        label_smoothing: of the classes that the loss asks for.
        mixup: timm's mixup α; 0 is off.
        cutmix: timm's cutmix α; 0 is off.
        ema: decay of timm's ``ModelEmaV3`` (with its warm-up), or None. With it the average is
            what is validated, kept as best, and left in the model at the end.
        bn_momentum: weight of one forward in running statistics; None takes each layer's own, or
            less where they would go over fewer samples than with 0.1 at batch 32 (see
            :func:`normswap.training.steady_statistics`).
        amp: ``"bf16"``, ``"fp16"``, or None for what ``accelerate launch`` says, else full
            precision.
        freeze_backbone: train the classifier only, or all but the part that is named ``backbone``;
            the rest stands still, running statistics too.
        passage: share of the run, between 0 and 1, over which per-sample layers (gn, ln, in, frn)
            go from their BatchNorm original to themselves; None trains the pure layers from the
            start. See ``normswap.Passage``.
        norms_only: train the parameters of normalisation layers only.
        teacher: a network whose logits the model shall keep, usually the BN original.
        distillation_weight: share of the teacher in the loss, 0 to 1.
        distillation_temperature: T of the softened softmax.
        early_stop: epochs without a better score on the validation data after which a run ends;
            None trains all of them.
        grad_checkpointing: recompute activations in the backward instead of keeping them, by the
            model's own ``set_grad_checkpointing`` (timm); less memory, about a third more time.
        channels_last: keep images and weights with the channels last while training; faster for
            convolutions on GPUs and many CPUs.
        keep: which weights the model holds at the end: ``"last"``, or ``"best"`` on ``val_data``,
            those of the start included; None takes the best where there is validation data.
        checkpoint_every: seconds between two writes of the last checkpoint (besides the end of
            every epoch); 0 writes one after each update.
        log_every: updates between two lines in ``metrics.jsonl``.
        seed: of everything drawn at random.
        workers: processes that load data. The result does not depend on their number.
        on_broken: a sample that cannot be read: ``"error"``, or ``"skip"`` to take the next
            readable one in its place and count it.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …; None takes what accelerate finds.
        eval_batch_size: samples per forward on ``val_data``.
        check_data: read all of the data before the run, so that one that is resumed notices other
            contents too. Names, sizes and labels, and tensors in memory, are compared anyhow.
        tensorboard: write TensorBoard's event files into ``out`` when it is installed.
        track: names of trackers that accelerate knows (``"tensorboard"``, ``"wandb"``,
            ``"mlflow"`` …), which get every line of ``metrics.jsonl``; they must be installed.

    Example:
        >>> FineTune(batch_size=4, epochs=5).learning_rate_for(samples_per_update=4)
        0.00025
    """

    batch_size: int = 2
    epochs: int = 5
    learning_rate: float | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    scheduler: str = "cosine"
    warmup_epochs: float | None = None
    gradient_accumulation: int = 1
    clip_grad: float | None = None
    loss: str = "cross-entropy"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    bn_momentum: float | None = None
    amp: str | None = None
    freeze_backbone: bool = False
    passage: float | None = None
    norms_only: bool = False
    teacher: nn.Module | None = field(default=None, repr=False)
    distillation_weight: float = 0.5
    distillation_temperature: float = 2.0
    early_stop: int | None = None
    grad_checkpointing: bool = False
    channels_last: bool = False
    keep: str | None = None
    checkpoint_every: float = 300.0
    log_every: int = 50
    seed: int = 0
    workers: int = 0
    on_broken: str = "error"
    device: str | None = None
    eval_batch_size: int = 32
    check_data: bool = False
    tensorboard: bool = True
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self):  # numpy's numbers would make the checkpoints unreadable
            value = getattr(self, item.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, item.name, value.item())
        for name in ("batch_size", "epochs", "gradient_accumulation", "log_every"):
            _require(name, getattr(self, name), whole(getattr(self, name), 1), "an integer ≥ 1")
        _require("eval_batch_size", self.eval_batch_size, whole(self.eval_batch_size, 1), "≥ 1")
        for name in ("workers", "seed"):
            _require(name, getattr(self, name), whole(getattr(self, name), 0), "an integer ≥ 0")
        for name in ("weight_decay", "checkpoint_every", "mixup", "cutmix"):
            value = getattr(self, name)
            _require(name, value, number(value, 0), "a number ≥ 0")
        for name in ("learning_rate", "clip_grad"):
            value = getattr(self, name)
            fine = value is None or above(value, 0)
            _require(name, value, fine, "a number > 0, or None")
        patient = self.early_stop is None or whole(self.early_stop, 1)
        _require("early_stop", self.early_stop, patient, "an integer ≥ 1, or None")
        names = isinstance(self.track, (tuple, list))
        fine = names and all(isinstance(name, str) for name in self.track)
        _require("track", self.track, fine, "a tuple of names")
        object.__setattr__(self, "track", tuple(self.track))
        self._check_shares()
        self._check_choices()

    def _check_shares(self) -> None:
        for name in ("label_smoothing", "momentum", "distillation_weight"):
            value = getattr(self, name)
            _require(name, value, number(value, 0, 1), "a number from 0 to 1")
        fine = self.passage is None or (above(self.passage, 0) and self.passage < 1)
        _require("passage", self.passage, fine, "between 0 and 1, or None")
        fine = self.ema is None or (above(self.ema, 0) and self.ema < 1)
        _require("ema", self.ema, fine, "between 0 and 1, or None")
        fine = self.bn_momentum is None or number(self.bn_momentum, 0, 1)
        _require("bn_momentum", self.bn_momentum, fine, "a number from 0 to 1, or None")
        _require(
            "distillation_temperature",
            self.distillation_temperature,
            above(self.distillation_temperature, 0),
            "a number > 0",
        )
        _require(
            "warmup_epochs",
            self.warmup_epochs,
            self.warmup_epochs is None
            or (number(self.warmup_epochs, 0) and self.warmup_epochs < self.epochs),
            f"0 or more and less than epochs={self.epochs}",
        )

    def _check_choices(self) -> None:
        _require(
            "scheduler",
            f"'none' with warmup_epochs={self.warmup_epochs}",
            not (self.scheduler == "none" and self.warmup_epochs),
            "'constant', which warms up",
        )
        _require("amp", self.amp, self.amp in (None, "bf16", "fp16"), "'bf16', 'fp16' or None")
        known = ", ".join(map(repr, LOSSES))
        fine = isinstance(self.loss, str) and self.loss in LOSSES
        _require("loss", self.loss, fine, f"one of {known}; a function goes to finetune(loss=…)")
        _require("keep", self.keep, self.keep in (None, "last", "best"), "'last', 'best' or None")
        _require(
            "on_broken", self.on_broken, self.on_broken in ("error", "skip"), "'error' or 'skip'"
        )
        _require(
            "freeze_backbone",
            "True together with norms_only",
            not (self.freeze_backbone and self.norms_only),
            "one of the two at most",
        )
        _require(
            "mixup",
            "mixup or cutmix at batch_size=1",
            not (self.mixes and self.batch_size == 1),
            "two samples to mix",
        )

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, with the default filled in."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    def learning_rate_for(self, samples_per_update: int) -> float:
        """The learning rate at the top of the schedule, by the rule if none was given."""
        if self.learning_rate is not None:
            return self.learning_rate
        share = samples_per_update / _SAMPLES_OF_THE_RULE
        return 0.002 * math.sqrt(share) if self.adaptive else 0.1 * share

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer is one of Adam's relatives: its steps do not grow with gradients.

        Small batches make gradients noisy, whose layers' sizes span a factor of 100 relative to
        their weights after a conversion; steps that follow them do harm.
        """
        return any(name in self.optimizer.lower() for name in _ADAPTIVE)

    @property
    def relative(self) -> bool:
        """Whether steps are relative to the weights: by the rule, unless LAMB sees to it itself."""
        by_rule = self.learning_rate is None and self.adaptive
        return by_rule and "lamb" not in self.optimizer.lower()

    def to_json(self) -> dict[str, Any]:
        """Plain data; the teacher appears as its class and a hash of its weights."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        data["teacher"] = None if self.teacher is None else fingerprint(self.teacher)
        return data

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """What changed since ``earlier`` (a ``to_json()``) and would make another run of it."""
        now, then = self.to_json(), with_usual(earlier)
        return [
            f"{name}={now[name]!r} (was {then[name]!r})"
            for name in now
            if name not in _FREE_ON_RESUME and now[name] != then[name]
        ]


def with_usual(earlier: dict[str, Any]) -> dict[str, Any]:
    """``FineTune.to_json()`` of an earlier release; an option it lacked does nothing by default."""
    return {**FineTune().to_json(), **earlier}


def _require(name: str, got: Any, fine: bool, need: str) -> None:
    if not fine:
        raise TrainingError(f"FineTune.{name}", got=repr(got), need=need, hint="another value")


def fingerprint(model: nn.Module) -> str:
    """The class of a model and a hash of its weights."""
    return f"{type(model).__name__} {weights_digest(model.state_dict())[:16]}"
