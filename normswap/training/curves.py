"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normswap.training.records import Epoch

CURVE = "learning_curve.png"


def draw_learning_curve(epochs: Sequence[Epoch], path: str | Path) -> Path:
    """Draw loss and accuracy over the epochs, training and validation.

    Args:
        epochs: ``History.epochs``.
        path: of the PNG; it is replaced whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    numbers = [item.epoch for item in epochs]
    left, right = figure.subplots(1, 2)
    for axes, title, train, val in (
        (left, "loss", [e.train_loss for e in epochs], [e.val_loss for e in epochs]),
        (right, "top-1", [e.train_top1 for e in epochs], [e.val_top1 for e in epochs]),
    ):
        axes.plot(numbers, train, marker=".", label="training")
        if any(value is not None for value in val):
            axes.plot(numbers, val, marker=".", label="validation")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as PNG; an earlier one under that name is replaced whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=120)
    part.replace(path)
    return path
