"""What a run optimises and what it is judged by: one file per task, chosen here."""

from __future__ import annotations

from normswap.errors import TrainingError
from normswap.training.options import FineTune
from normswap.training.tasks.base import LossFunction, MetricFunction, Metrics, Step, Task
from normswap.training.tasks.classification import Classification
from normswap.training.tasks.custom import Custom
from normswap.training.tasks.detection import Detection
from normswap.training.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
}


def task_for(
    options: FineTune,
    task: str | Task = "classification",
    loss: LossFunction | None = None,
    metric: MetricFunction | None = None,
) -> Task:
    """The task that a caller has asked for.

    Args:
        options: the recipe.
        task: the name of a task, or one of the caller's own.
        loss: in place of the task's own.
        metric: in place of the task's own.

    Raises:
        TrainingError: no task of that name, or options that the loss cannot take.

    Example:
        >>> task_for(FineTune()).name
        'classification'
    """
    if loss is not None or metric is not None:
        if task != "classification":
            raise TrainingError(
                "task",
                got=f"{task!r} together with a loss or a metric of your own",
                need="one or the other",
                hint="leaving task out",
            )
        return Custom(options, loss, metric)
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise TrainingError(
            "task", got=repr(task), need=f"one of {', '.join(TASKS)}", hint="loss=…, metric=…"
        )
    return TASKS[task](options)


__all__ = [
    "TASKS",
    "Classification",
    "Custom",
    "Detection",
    "LossFunction",
    "MetricFunction",
    "Metrics",
    "Segmentation",
    "Step",
    "Task",
    "task_for",
]
