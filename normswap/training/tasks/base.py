"""What the loop asks of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from normswap.errors import TrainingError
from normswap.pictures import Scene
from normswap.training.options import FineTune

LossFunction = Callable[[Any, Any], Tensor]
"""``loss(output, labels)``: a scalar to minimise."""
MetricFunction = Callable[[Any, Any], Any]
"""``metric(output, labels)``: a number, the mean over the batch; higher is better."""


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found.

    Attributes:
        top1: share of images whose highest logit is the right class, 0 to 1; NaN where labels are
            no classes.
        top5: share of images whose class is among the five highest logits; likewise.
        loss: mean cross-entropy in nats, or the mean of the caller's loss; NaN for detectors, which
            say none in eval mode.
        images: how many were seen.
        broken: how many could not be read and were left out.
        metric: mean IoU of a segmentation, mAP of a detection, the mean of the caller's metric, or
            None.
    """

    top1: float
    top5: float
    loss: float
    images: int
    broken: int = 0
    metric: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        data = asdict(self)
        return data if self.metric is not None else {k: data[k] for k in data if k != "metric"}

    @property
    def score(self) -> float:
        """What models are compared by, higher is better: the metric, else top-1, else -loss."""
        if self.metric is not None:
            return self.metric
        return -self.loss if math.isnan(self.top1) else self.top1

    def __str__(self) -> str:
        return self.in_words()

    def in_words(self, metric: str = "metric") -> str:
        """What is known, in a line; ``metric`` is what the metric is called."""
        found = {
            "top-1": f"{self.top1:.2%}",
            "top-5": f"{self.top5:.2%}",
            "loss": f"{self.loss:.4f}",
            metric: "nan" if self.metric is None else f"{self.metric:.4f}",
        }
        parts = [f"{name} {text}" for name, text in found.items() if not text.startswith("nan")]
        return ", ".join([*parts, f"{self.images} images"])


class Step(NamedTuple):
    """One forward of a training step.

    Attributes:
        loss: to be minimised, a scalar.
        right: how many of the images were right, where that can be said, else None.
        images: what the model was given; a tuple holds several arguments.
    """

    loss: Tensor
    right: Tensor | None
    images: Any


class Task:
    """What a run optimises and what it is judged by.

    Args:
        options: the recipe.
    """

    name: ClassVar[str]
    metric_name: ClassVar[str] = "metric"
    loses_in_eval: ClassVar[bool] = True
    """Whether ``measure`` finds a loss; detectors have none in eval mode."""
    sums: tuple[str, ...] = ()
    """Names of what ``measure`` adds up; known once ``measure`` or ``begin`` has seen an output."""

    def __init__(self, options: FineTune) -> None:
        self.options = options

    def meet(self, model: nn.Module, data: Any) -> None:
        """Look at the model and the data set before anything runs."""

    def check_data(self, labels: Any) -> None:
        """Refuse labels that the task cannot use, before anything runs."""

    def begin(self, output: Any) -> None:
        """Look at the output of the first forward, in eval mode."""

    def step(self, forward: Callable[..., Any], images: Any, labels: Any) -> Step:
        """One forward in training mode, and its loss."""
        raise NotImplementedError

    def measure(self, output: Any, labels: Any) -> Any:
        """Sums over a batch in eval mode, float64 on the CPU, in the order of ``sums``.

        A task that is judged by no sums gives other plain data, and has an ``add`` and a ``judge``.
        """
        raise NotImplementedError

    def add(self, before: Any, found: Any) -> Any:
        """Both measures as one; where several processes share the data, theirs too."""
        return before + found

    def judge(self, found: Any, images: int, broken: int) -> Metrics:
        """What the measures of all batches say together."""
        return self.metrics(dict(zip(self.sums, found.tolist(), strict=True)), images, broken)

    def scenes(
        self,
        image: Tensor,  # noqa: ARG002  (for the tasks that draw)
        label: Any,  # noqa: ARG002
        output: Any,  # noqa: ARG002
        names: Sequence[str] | None,  # noqa: ARG002
    ) -> tuple[Scene, Scene] | None:
        """What is true of an image and what the model says, to be drawn; None: nothing is."""
        return None

    def metrics(self, sums: dict[str, float], images: int, broken: int) -> Metrics:
        """What the sums over all batches say."""
        raise NotImplementedError


def refuse_loss_by_name(options: FineTune, where: str) -> None:
    """Refuse a loss that a task would silently drop.

    Args:
        options: the recipe.
        where: why the task has no use for it, for the error text.

    Raises:
        TrainingError: the loss is not the usual one.
    """
    if options.loss != FineTune.loss:
        raise TrainingError(
            "FineTune.loss",
            got=f"{options.loss!r} {where}",
            need="a loss by name for classification alone",
            hint="leaving it out",
        )


def logits_in(output: Any, axes: int, *, keys: tuple[str, str], need: str, hint: str) -> Tensor:
    """The logits in a model's output: itself, the first of a tuple, or one of a mapping's keys.

    Args:
        output: what the model gave.
        axes: how many axes logits have for the task.
        keys: where a mapping may hold them, the first that is there counts.
        need: what is needed, for the error text.
        hint: what to try, for the error text.

    Raises:
        TrainingError: the output holds none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get(keys[0], output.get(keys[1]))
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim != axes:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise TrainingError("model", got=f"an output {shape}", need=need, hint=hint)
    return found
