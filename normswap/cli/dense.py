"""What ``evaluate`` and ``predict`` do for masks and boxes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.console import print_json, print_table, progress, say, say_next
from normswap.cli.options import ModelChoice, check_device
from normswap.cli.tasks import percent

if TYPE_CHECKING:
    from normswap.cli.evaluate import Opened


def evaluate(
    opened: Opened,
    chosen: ModelChoice,
    task: str,
    folder: dict[str, Any],
    how: dict[str, Any],
    *,
    per_class: bool,
    confusion: Path | None,
    as_json: bool,
) -> None:
    """Measure mean IoU or mAP and print it; ``folder`` is for ``read_folder``, ``how`` the rest."""
    import normswap
    from normswap.data import read_folder
    from normswap.training import FineTune
    from normswap.training.tasks import task_for

    model = opened.model
    size = opened.preprocessing.resized(chosen.image_size).tested()
    dataset = read_folder(task, preprocessing=size, class_names=opened.names, **folder)
    how["batch_size"] = getattr(model, "batch_size", None) or how["batch_size"]
    judge: Any = task_for(FineTune(), task)
    with progress("evaluating") as show:
        metrics = normswap.evaluate(
            model,
            dataset,
            device=check_device(chosen.device),
            task=judge,
            progress=show,
            **how,
        )
    names = [str(name) for name in dataset.class_names]
    found = judge.summary if task == "detection" else {"mean IoU": metrics.metric}
    if confusion is not None:
        from normswap import pictures

        pictures.confusion(judge.counts.tolist(), names[: len(judge.counts)], confusion)
    classes = _classes(judge.by_class, names)
    if as_json:
        facts = {"model": chosen.spec, "task": task, "data": folder["root"], **metrics.to_json()}
        print_json(facts | {"found": found} | ({"classes": classes} if per_class else {}))
        return
    more = {} if math.isnan(metrics.loss) else {"loss": f"{metrics.loss:.4f}"}
    counts = {"images": metrics.images, "broken": metrics.broken}
    row = {**{name: percent(value) for name, value in found.items()}, **more, **counts}
    print_table(tuple(row), [tuple(row.values())], numeric=tuple(row))
    if per_class:
        measured = "IoU" if task == "segmentation" else "mAP"
        print_table(
            ("class", measured),
            [(row["class"], percent(row["score"])) for row in classes],
            numeric=(measured,),
        )
    if confusion is not None:
        say(f"wrote {confusion}")
    if task == "segmentation" and not chosen.spec.endswith(".onnx"):
        say_next("export", *chosen.words(), "-o", f"{chosen.short_name}.onnx")


def _classes(by_class: Any, names: list[str]) -> list[dict[str, Any]]:
    """Every class that occurs by itself, the worst first."""
    pairs = by_class.items() if isinstance(by_class, dict) else enumerate(by_class)
    known = [(number, score) for number, score in pairs if not math.isnan(score)]
    return [
        {"class": names[number] if number < len(names) else str(number), "score": score}
        for number, score in sorted(known, key=lambda pair: pair[1])
    ]


def predict(
    opened: Opened,
    chosen: ModelChoice,
    task: str,
    images: Path,
    *,
    output: Path | None,
    min_score: float,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """Say what is where on images, and draw it; ``how`` is more for ``dense_predictions``."""
    from normswap.dense_predictions import dense_predictions

    with progress("predicting") as show:
        found = list(
            dense_predictions(
                opened.model,
                images,
                opened.preprocessing.resized(chosen.image_size).tested(),
                task=task,
                class_names=opened.names,
                min_score=min_score,
                pictures_in=output,
                device=check_device(chosen.device),
                progress=show,
                **how,
            )
        )
    if as_json:
        print_json([item.to_json() for item in found])
        return
    rows: list[tuple[Any, ...]] = [
        (item.file, thing.name, percent(thing.share), thing.place)
        for item in found
        for thing in item.things
    ]
    rows += [(item.file, item.problem, None, "") for item in found if item.problem]
    columns: tuple[str, ...] = ("image", "class", "of the pixels")
    if task == "detection":
        columns = ("image", "class", "score", "box")
    print_table(columns, [row[: len(columns)] for row in rows], numeric=columns[2:3])
    if output is not None:
        say(f"the pictures are in {output}")
