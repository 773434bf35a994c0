"""``normswap predict``: what is on images that nobody has labelled."""

from __future__ import annotations

from pathlib import Path

import click

from normswap.cli.console import print_json, print_table, progress, suggest
from normswap.cli.evaluate import open_model
from normswap.cli.images import max_pixels_option
from normswap.cli.options import (
    ModelChoice,
    batch_size_option,
    check_device,
    check_output,
    cli_command,
    json_option,
    model_options,
    timeout_option,
)
from normswap.cli.tasks import chosen_task, task_option


@cli_command("predict")
@task_option
@click.option(
    "-o",
    "--output",
    "pictures_in",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for pictures of masks or boxes over the images.",
)
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Boxes with less are left out.",
)
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="Classes.")
@batch_size_option(32, "Images in one forward.")
@click.option("--skip-broken", is_flag=True, help="Name broken images instead of stopping.")
@max_pixels_option
@timeout_option
@json_option
@model_options
@click.argument("images", type=click.Path(path_type=Path))
def command(
    *,
    chosen: ModelChoice,
    images: Path,
    task: str | None,
    pictures_in: Path | None,
    min_score: float,
    top: int,
    batch_size: int,
    skip_broken: bool,
    max_pixels: int,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Say what is on IMAGES, and how sure MODEL is.

    IMAGES is a folder or one file. A classifier says one class for each, a segmentation network
    which classes are on it and how much of it they cover, a detector its boxes.

    MODEL may be an ONNX file too: onnxruntime runs it, while torch reads the images.
    """
    from normswap.cli import dense
    from normswap.predictions import predictions

    if pictures_in is not None:
        check_output(pictures_in, force=True)
    opened = open_model(chosen, timeout)
    model, preprocessing, names, source = opened
    task = chosen_task(task, source)
    if task != "classification":
        how = {"max_pixels": max_pixels, "on_broken": "skip" if skip_broken else "error"}
        dense.predict(
            opened, chosen, task, images, output=pictures_in, min_score=min_score, how=how,
            as_json=as_json,
        )  # fmt: skip
        return
    with progress("predicting") as show:
        found = list(
            predictions(
                model,
                images,
                preprocessing.resized(chosen.image_size).tested(),
                class_names=names,
                top=top,
                batch_size=getattr(model, "batch_size", None) or batch_size,
                device=check_device(chosen.device),
                max_pixels=max_pixels,
                on_broken="skip" if skip_broken else "error",
                progress=show,
            )
        )
    if as_json:
        print_json(
            [
                {
                    "file": item.file,
                    "classes": [
                        {"class": name, "probability": share}
                        for name, share in zip(item.classes, item.probabilities, strict=True)
                    ],
                    "problem": item.problem,
                }
                for item in found
            ]
        )
        return
    rows = [
        (item.file, name, f"{100 * share:.1f} %")
        for item in found
        for name, share in zip(item.classes, item.probabilities, strict=True)
    ]
    rows += [(item.file, item.problem, "") for item in found if item.problem]
    print_table(("image", "class", "probability"), rows, numeric=("probability",))
    suggest("evaluate", *chosen.words(), "--data", "DATA")
