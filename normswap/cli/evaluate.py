"""``normswap evaluate``: accuracy and loss on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.console import print_json, print_table, progress
from normswap.cli.options import (
    ModelChoice,
    check_device,
    cli_command,
    json_option,
    model_options,
    timeout_option,
)
from normswap.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from normswap.data import Preprocessing


@cli_command("evaluate")
@click.option("--data", required=True, help="CLASS/ folders of images, or a timm data set's name.")
@click.option("--split", default="val", show_default=True, help="Which part of it.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images in one forward.",
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="Processes that read images."
)
@click.option("--skip-broken", is_flag=True, help="Count broken images instead of stopping.")
@timeout_option
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    data: str,
    split: str,
    batch_size: int,
    workers: int,
    skip_broken: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Measure top-1, top-5 and loss on labelled images.

    MODEL may be an ONNX file too: it is run by onnxruntime.
    """
    import normswap
    from normswap.data import labelled_dataset

    model, preprocessing, names = _open(chosen, timeout)
    on_broken = "skip" if skip_broken else "error"
    dataset: Any = labelled_dataset(
        data, preprocessing.resized(chosen.image_size), split, class_names=names
    )
    with progress("evaluating") as show:
        metrics = normswap.evaluate(
            model,
            dataset,
            batch_size=getattr(model, "batch_size", None) or batch_size,
            device=check_device(chosen.device),
            workers=workers,
            on_broken=on_broken,
            progress=lambda seen: show(seen, len(dataset)),
        )
    if as_json:
        print_json({"model": chosen.spec, "data": data, "split": split, **metrics.to_json()})
        return
    print_table(
        ("top-1", "top-5", "loss", "images", "broken"),
        [
            (
                f"{100 * metrics.top1:.2f} %",
                f"{100 * metrics.top5:.2f} %",
                f"{metrics.loss:.4f}",
                metrics.images,
                metrics.broken,
            )
        ],
        numeric=("top-1", "top-5", "loss", "images", "broken"),
    )


def _open(
    chosen: ModelChoice, timeout: float | None
) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    """The model, what it wants of its input, and its class names."""
    if not chosen.spec.endswith(".onnx"):
        source = chosen.load()
        return source.model, source.preprocessing, source.class_names
    from normswap.data import Preprocessing
    from normswap.onnx import load_onnx

    if chosen.checkpoint is not None or chosen.num_classes is not None or not chosen.pretrained:
        raise click.UsageError(
            "An ONNX file brings its weights and its head: leave out --checkpoint, --num-classes "
            "and --no-pretrained."
        )

    file = load_onnx(Path(chosen.spec), timeout=timeout)
    if file.preprocessing is None:
        raise DataError(
            chosen.spec,
            got="an ONNX file that does not say what images it takes",
            need="a file that `normswap export` wrote",
            hint="normswap evaluate with the model it was made from",
        )
    return file, Preprocessing.from_json(file.preprocessing), file.class_names
