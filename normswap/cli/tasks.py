"""``--task``: which task a command is about, and which options mean nothing for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from normswap.sources import Source

_logger = logging.getLogger("normswap")

TASKS = ("classification", "segmentation", "detection")

task_option = click.option(
    "--task",
    type=click.Choice(TASKS),
    help="What MODEL is for. [default: what it is certainly for, else classification]",
)

_LABELS = ("mixup", "cutmix", "aa", "reprob", "class_map", "crop_pct")
_WITHOUT_EFFECT = {
    "classification": ("ignore_index", "min_score", "pictures_in"),
    "segmentation": (*_LABELS, "loss", "top", "min_score"),
    "detection": (
        *_LABELS, "loss", "label_smoothing", "scale", "ratio", "mean", "std", "interpolation",
        "image_size", "ignore_index", "confusion", "top",
    ),
}  # fmt: skip
_INSTEAD = {"image_size": "a detector resizes by itself, as its factory says (min_size)"}


def chosen_task(task: str | None, source: Source | None) -> str:
    """The task that was asked for, or the one that the model is certainly for; it is said.

    Args:
        task: what was asked for.
        source: the model; None of an ONNX file, which tells nothing.

    Raises:
        UsageError: options were given that mean nothing for it.
    """
    found = task or ("classification" if source is None else _guessed(source))
    own = source is not None and source.spec.startswith("python:")
    check_options(found, sized=own)  # a factory of one's own may build for a size
    return found


def _guessed(source: Source) -> str:
    from normswap.training.tasks.guess import guess_task

    guess = guess_task(source.model, source.example_inputs(), source.task)
    if guess.why:
        _logger.info("task: %s (%s)", guess.task, guess.why)
    return guess.task


def check_options(task: str, *, sized: bool) -> None:
    """Refuse what was given on the command line and means nothing for a task.

    Args:
        task: one of ``TASKS``.
        sized: whether the model was built for ``--image-size``.

    Raises:
        UsageError: naming the option.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        meant = name not in _WITHOUT_EFFECT[task] or (name == "image_size" and sized)
        teacher = name == "teacher" and task == "detection" and context.params[name] != "none"
        if source is ParameterSource.COMMANDLINE and (teacher or not meant):
            why = _INSTEAD.get(name, f"it means nothing for {task}")
            raise click.UsageError(f"{parameter.opts[0]}: {why}. Leave it out.")


def metric_name(task: str) -> str:
    """What models are compared by."""
    from normswap.training.tasks import TASKS

    return "top-1" if task == "classification" else TASKS[task].metric_name


def percent(value: float | None) -> str | None:
    """A share as the tables show it."""
    return None if value is None else f"{100 * value:.2f} %"
