"""Every picture of the project. Only here is matplotlib imported, and only when something is drawn.

Takes plain numbers and a path. A picture is written beside its name and renamed: what stands there
is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normswap.files import write_whole

Values = Sequence[float | None]

_FIRST, _OTHERS = "0.35", "tab:blue"
_LONGEST = 60


def drift(errors: Mapping[str, Values], names: Sequence[str], title: str, path: str | Path) -> Path:
    """The errors of all sites along a network, one line each.

    Args:
        errors: label → a value per site; None where there is none.
        names: of the sites.
        title: above the picture.
        path: ``.png``, ``.svg`` or ``.pdf``.
    """
    figure = _figure(9, 4.2)
    axes = figure.subplots()
    for (label, values), style in zip(errors.items(), (":", "--", "-"), strict=False):
        if any(value is not None for value in values):
            shown = [float("nan") if v is None else v for v in values]
            axes.plot(range(len(shown)), shown, style, marker=".", label=label)
    axes.set(ylabel="relative error", title=title, ylim=(0, _above(errors)))
    _name_sites(axes, names)
    _legend_above(axes)
    return _save(figure, path)


def _above(errors: Mapping[str, Values]) -> float | None:
    """Where an axis ends on which the highest point stands below the frame; None: as it likes."""
    known = [v for values in errors.values() for v in values if v is not None and math.isfinite(v)]
    return 1.08 * max(known) if known and max(known) > 0 else None


def costs(
    values: Mapping[str, float], became: Mapping[str, str], title: str, path: str | Path
) -> Path:
    """What the conversion of every site costs by itself, along a network.

    Args:
        values: site → cost, in nats.
        became: site → what it became; one colour each.
        title: above the picture.
        path: ``.png``, ``.svg`` or ``.pdf``.
    """
    figure = _figure(9, 4.2)
    axes = figure.subplots()
    for number, kind in enumerate(sorted({became.get(name, "") for name in values})):
        mine = [i for i, name in enumerate(values) if became.get(name, "") == kind]
        heights = [max(list(values.values())[i], 1e-6) for i in mine]
        axes.bar(mine, heights, color=f"C{number}", label=kind)
    axes.set(ylabel="cost by itself, nats", title=title, yscale="log")
    _name_sites(axes, list(values))
    _legend_above(axes)
    return _save(figure, path)


def learning_curve(
    epochs: Sequence[int],
    panels: Mapping[str, tuple[Values, Values]],
    path: str | Path,
    *,
    percent: bool,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """What was measured over the epochs, in training and in validation.

    Args:
        epochs: their numbers.
        panels: title → (training, validation), side by side.
        path: of the PNG.
        percent: the last panel is a share.
        levels: label → title of a panel → where a horizontal line stands in it.
    """
    from matplotlib.ticker import PercentFormatter

    figure = _figure(4.5 * len(panels), 3.6)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    if percent:
        row[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, (title, (train, val)) in zip(row, panels.items(), strict=True):
        for label, values in (("training", train), ("validation", val)):
            if any(value is not None for value in values):
                axes.plot(epochs, values, marker=".", label=label)
        for style, (label, heights) in zip(("--", ":", "-."), (levels or {}).items(), strict=False):
            if math.isfinite(heights.get(title, math.nan)):
                line = {"color": "black", "linewidth": 1, "linestyle": style}
                axes.axhline(heights[title], label=label, **line)
        axes.set(title=title, xlabel="epoch")
        _count_along(axes, epochs)
        axes.grid(alpha=0.3)
        if axes.lines:
            _legend_above(axes)
    return _save(figure, path)


def _count_along(axes: Any, numbers: Sequence[int]) -> None:
    """Whole numbers along an axis, with room for a single one: no scale of fractions."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if numbers:
        axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path) -> Path:
    """Which class is taken for which, in shares of the right class.

    Args:
        counts: a row for each right class, a column for each class that the model said.
        labels: of both.
        path: ``.png``, ``.svg`` or ``.pdf``.
    """
    labels = [_literal(label) for label in labels]
    shares = [[value / max(sum(row), 1) for value in row] for row in counts]
    edge = min(3.0 + 0.3 * len(labels), 20.0)
    figure = _figure(edge + 1, edge)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 60:
        places = range(len(labels))
        axes.set_xticks(places, labels, rotation=90, fontsize=8)
        axes.set_yticks(places, labels, fontsize=8)
    if len(labels) <= 20:
        for row, values in enumerate(counts):
            for column, value in enumerate(values):
                ink = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, value or "", ha="center", va="center", color=ink, fontsize=7)
    axes.set(xlabel="taken for", ylabel="class")
    figure.colorbar(image, ax=axes, label="share of the class")
    return _save(figure, path)


def accuracy_by_batch(
    lines: Mapping[str, Sequence[tuple[int, float, float, float]]],
    sizes: Sequence[int],
    control: str,
    path: str | Path,
    axis: str = "top-1",
) -> Path:
    """Accuracy against batch size: a line per target, from worst to best seed shaded.

    Args:
        lines: label → (batch size, mean, lowest, highest).
        sizes: all batch sizes.
        control: the label that is drawn in black.
        path: of the PNG.
        axis: what the accuracy is.
    """
    from matplotlib.ticker import NullLocator, PercentFormatter

    figure = _figure(6.4, 4.4)
    axes = figure.subplots()
    for label, points in lines.items():
        at, mean, low, high = ([point[i] for point in points] for i in range(4))
        style = {"color": "black", "linestyle": "--"} if label == control else {}
        (line,) = axes.plot(at, mean, marker="o", label=label, **style)
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="batch size", ylabel=axis)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def recommendation(
    kept: Mapping[str, tuple[float | None, float | None]],
    sites: Mapping[str, tuple[float, float]],
    title: str,
    path: str | Path,
) -> Path:
    """What each target keeps, and how BatchNorm's batch means lie about the running ones.

    Args:
        kept: target → share of the decisions kept, (matched, calibrated).
        sites: layer → (shift, noise), in running standard deviations; empty: no such panel.
        title: above the picture.
        path: ``.png``, ``.svg`` or ``.pdf``.
    """
    from matplotlib.ticker import PercentFormatter

    figure = _figure(9 if sites else 5, 3.8)
    figure.suptitle(title)
    panels = figure.subplots(1, 2 if sites else 1, squeeze=False)[0]
    bars = panels[0]
    for offset, label, index in ((-0.2, "matched", 0), (0.2, "calibrated", 1)):
        shares = [pair[index] for pair in kept.values()]
        known = [(at + offset, share) for at, share in enumerate(shares) if share is not None]
        if known:
            bars.bar(*zip(*known, strict=True), width=0.4, label=label)
    bars.set_xticks(range(len(kept)), list(kept))
    bars.yaxis.set_major_formatter(PercentFormatter(1.0))
    bars.set(title="decisions of the original kept", ylim=(0, 1.05))
    if kept:
        _legend_above(bars)
    if sites:
        axes = panels[1]
        for label, index in (("shift of the mean", 0), ("spread of batch means", 1)):
            axes.plot([pair[index] for pair in sites.values()], marker=".", label=label)
        axes.set(title="BatchNorm, in running standard deviations", ylim=(0, None))
        _name_sites(axes, list(sites))
        _legend_above(axes)
    return _save(figure, path)


def _name_sites(axes: Any, names: Sequence[str]) -> None:
    """Layers along an axis: every name where they are few, else some of them."""
    from matplotlib.ticker import FixedLocator

    every = max(1, math.ceil(len(names) / _MOST_NAMES))
    places = list(range(0, len(names), every))
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.set_xticklabels([names[at] or "(root)" for at in places], rotation=90, fontsize=7)


_MOST_NAMES = 40


def _legend_above(axes: Any) -> None:
    """A legend between title and frame, where no curve and no name is."""
    axes.set_title(axes.get_title(), pad=24, fontsize="medium")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize="small"
    )


def accuracy_bars(
    shares: Mapping[str, float], chance: float, title: str, axis: str, path: str | Path
) -> Path:
    """Accuracies as horizontal bars, the first in another colour.

    Args:
        shares: label → accuracy from 0 to 1.
        chance: what guessing gives, drawn as a line.
        title: above the picture.
        axis: below it.
        path: of the PNG.
    """
    figure = _figure(8, 0.45 * len(shares) + 1.2)
    axes = figure.subplots()
    values = [100 * share for share in shares.values()]
    bars = axes.barh(list(shares), values, color=_OTHERS)
    bars[0].set_color(_FIRST)
    axes.bar_label(bars, [f"{value:.1f} %" for value in values], padding=4)
    axes.axvline(100 * chance, color="0.4", linewidth=1, linestyle=":")
    at = (100 * chance + 1, len(shares) - 0.35)
    axes.text(*at, "chance", color="0.4", fontsize="small", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_title(title, loc="left")
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


@dataclass(frozen=True)
class Scene:
    """An image and what is on it.

    Attributes:
        image: (H, W, 3), 0 to 255 or 0 to 1.
        title: above it.
        boxes: (x0, y0, x1, y1) in pixels, what stands beside it, and the number of its class.
        mask: (H, W) class numbers, or None.
        classes: how many there are, for the colours.
        names: of the classes of the mask, for its legend.
    """

    image: Any
    title: str = ""
    boxes: Sequence[tuple[Sequence[float], str, int]] = ()
    mask: Any = None
    classes: int = 1
    names: Sequence[str] = ()


def scenes(rows: Sequence[Sequence[Scene]], path: str | Path) -> Path:
    """Images in rows, with their boxes and masks over them.

    Args:
        rows: as many scenes in each.
        path: ``.png``, ``.svg`` or ``.pdf``.
    """
    height, width = rows[0][0].image.shape[:2]
    edge = 4.0
    figure = _figure(edge * len(rows[0]), edge * height / width * len(rows) + 0.4)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes, scene in zip(line, row, strict=True):
            _draw_scene(axes, scene)
    return _save(figure, path)


def _draw_scene(axes: Any, scene: Scene) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    many = scene.classes > 20
    colours = colormaps["gist_ncar" if many else "tab20"]

    def colour_of(number: int) -> Any:
        # of the palette's pairs the dark ones first: the names on them are white
        pair, light = number % 10, number // 10 % 2
        return colours(number / scene.classes if many else 2 * pair + light)

    height, width = scene.image.shape[:2]
    axes.imshow(scene.image, extent=_edges(width, height))
    if scene.mask is not None:
        _draw_mask(axes, scene, colour_of)
    for (x0, y0, x1, y1), text, number in scene.boxes:
        colour = colour_of(number)
        frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2)
        axes.add_patch(frame)
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.8}
        style = {"fontsize": 7, "color": "white", "va": "bottom", "bbox": box, "clip_on": True}
        axes.text(x0, y0, _literal(text), **style)
    axes.set_title(_literal(scene.title), fontsize=9)
    axes.set_axis_off()


def _draw_mask(axes: Any, scene: Scene, colour_of: Callable[[int], Any]) -> None:
    """The classes but the first, each in its colour; those that are there are named."""
    import numpy as np
    from matplotlib.patches import Patch

    values = np.asarray(scene.mask)
    over = np.zeros((*values.shape, 4))
    handles = []
    for number in (int(n) for n in np.unique(values) if 0 < n < scene.classes):
        colour = (*colour_of(number)[:3], 0.55)
        over[values == number] = colour
        name = scene.names[number] if number < len(scene.names) else str(number)
        handles.append(Patch(color=colour, label=_literal(name)))
    height, width = values.shape
    axes.imshow(over, interpolation="nearest", extent=_edges(width, height))
    if handles:
        axes.legend(handles=handles[:12], fontsize=6, loc="lower right")


def _edges(width: int, height: int) -> tuple[float, float, float, float]:
    """Where an image ends: matplotlib has pixels' centres at whole numbers, boxes their edges."""
    return (0, width, height, 0)


def _literal(name: str) -> str:
    """A name as it is, and no formula, which a broken one would end the drawing with."""
    text = "".join(sign if sign.isprintable() else "?" for sign in name)
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…").replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    return write_whole(path, lambda part: figure.savefig(part, format=kind, dpi=120))
