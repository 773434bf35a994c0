"""What ``finetune`` and ``sweep`` share: the options of a run, its images, the head for them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.images import ImageChoice, image_options
from normswap.cli.options import Function, workers_option
from normswap.cli.tasks import chosen_task, task_option
from normswap.losses import LOSSES

if TYPE_CHECKING:
    from normswap.sources import Source
    from normswap.training import FineTune

_logger = logging.getLogger("normswap")


@dataclass(frozen=True)
class Images:
    """What to train on and to validate on, for which task; whether the model got a new head."""

    train: Any
    val: Any
    new_head: bool
    task: Any


@dataclass(frozen=True)
class RunChoice:
    """Where the images are, what they are for, and how to train on them."""

    images: ImageChoice
    recipe: dict[str, Any]
    task: str | None = None

    def options(self, **more: Any) -> FineTune:
        """The library's own options."""
        from normswap.training import FineTune

        on_broken = "skip" if self.images.skip_broken else "error"
        return FineTune(
            on_broken=on_broken, check_data=self.images.check_data, **self.recipe, **more
        )

    def open(self, source: Source, image_size: int | tuple[int, int] | None, seed: int) -> Images:
        """Training and validation images; the model's head is made to fit their classes."""
        from normswap.provenance import remember
        from normswap.sources import fit_head

        task = chosen_task(self.task, source)
        self.images.check_division(task)
        preprocessing = self.images.preprocessing(source.preprocessing.resized(image_size))
        remember(source.model, preprocessing=preprocessing.to_json())
        read = self.images.reader(preprocessing, seed, task)
        found = read(train=True)
        names, new_head = fit_head(source, found.class_names)
        train = read(train=True, class_names=names)
        val = read(train=False, class_names=names) if self.images.validation else None
        self.images.check_files(train, *([] if val is None else [val]))
        return Images(train, val, new_head, task)


def run_options(function: Function) -> Function:
    """Add the options of a training run; the callback gets them as ``run: RunChoice``."""

    @image_options
    @functools.wraps(function)
    def wrapper(*, images: ImageChoice, task: str | None, **rest: Any) -> Any:
        recipe = {name: rest.pop(name) for name in _RECIPE if name in rest}
        return function(run=RunChoice(images, recipe, task), **rest)

    for option in (*reversed(_RUN_OPTIONS), task_option):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


_POSITIVE = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(0, 1)
_RUN_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--epochs", type=click.IntRange(min=1), default=5, show_default=True, help="Passes over it."
    ),
    click.option(
        "--lr",
        "learning_rate",
        type=_POSITIVE,
        help="Learning rate. [default: by batch size, times the size of each weight]",
    ),
    click.option("--optimizer", default="adamw", show_default=True, help="A name timm knows."),
    click.option(
        "--weight-decay",
        type=click.FloatRange(min=0),
        default=1e-4,
        show_default=True,
        help="Never on norms and biases.",
    ),
    click.option("--warmup-epochs", type=click.FloatRange(min=0), help="[default: a tenth]"),
    click.option(
        "--grad-accum",
        "gradient_accumulation",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Forwards per update; does not enlarge BN's batch.",
    ),
    click.option("--clip-grad", type=_POSITIVE, help="Largest norm of the gradient."),
    click.option(
        "--loss",
        type=click.Choice(list(LOSSES)),
        default="cross-entropy",
        show_default=True,
        help="bce: a question for each class, as timm's a1_in1k weights were trained.",
    ),
    click.option("--label-smoothing", type=_SHARE, default=0.0, help="Of the classes in --loss."),
    click.option("--mixup", type=click.FloatRange(min=0), default=0.0, help="timm's mixup alpha."),
    click.option(
        "--cutmix", type=click.FloatRange(min=0), default=0.0, help="timm's cutmix alpha."
    ),
    click.option("--ema", type=_SHARE, help="Decay of the weights' moving average."),
    click.option(
        "--bn-momentum",
        type=_SHARE,
        help="Weight of a batch in running statistics. [default: the layers' own, less in small"
        " batches]",
    ),
    click.option("--amp", type=click.Choice(["bf16", "fp16"]), help="Mixed precision."),
    click.option("--freeze-backbone", is_flag=True, help="Train the heads only."),
    click.option(
        "--passage",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Share of the run over which gn, ln, in, frn go from their BatchNorm original to"
        " themselves.",
    ),
    click.option(
        "--grad-checkpointing", is_flag=True, help="Recompute activations to save memory (timm)."
    ),
    click.option("--channels-last", is_flag=True, help="Memory format while training."),
    click.option("--norms-only", is_flag=True, help="Train the normalisers only."),
    workers_option,
    click.option(
        "--track",
        multiple=True,
        metavar="NAME",
        help="Report to a tracker that accelerate knows: tensorboard, wandb, mlflow, … May be"
        " repeated.",
    ),
)


def _name(option: Callable[[Any], Any]) -> str:
    """Under which name the callback gets an option; click says so once a function has it."""

    def function() -> None: ...

    return str(option(function).__click_params__[0].name)


_RECIPE = tuple(_name(option) for option in _RUN_OPTIONS)
