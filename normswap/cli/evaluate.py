"""``normswap evaluate``: accuracy and loss on labelled images."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from normswap import checks
from normswap.cli.console import print_json, print_table, progress, say, suggest
from normswap.cli.images import ignore_index_option, max_pixels_option
from normswap.cli.options import (
    ModelChoice,
    batch_size_option,
    check_device,
    check_file,
    cli_command,
    json_option,
    model_options,
    timeout_option,
    workers_option,
)
from normswap.cli.tasks import chosen_task, task_option
from normswap.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from torch import nn

    from normswap.data import Preprocessing
    from normswap.sources import Source
    from normswap.training.tasks.confusion import Confusion

_MOST_NUMBERS = 1 << 28

_logger = logging.getLogger("normswap")


_PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".pdf")


def _picture(_ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """The callback of ``--confusion``: what can be drawn and written, found out before the work."""
    if value is None:
        return None
    if value.suffix.lower() not in (*_PICTURES, ""):
        raise click.BadParameter(
            f"got {value.name!r}; need a name ending in {', '.join(_PICTURES)}."
        )
    check_file(value, force=True)
    return value


@cli_command("evaluate")
@click.option(
    "--data",
    required=True,
    help="CLASS/ folders of images, or a timm data set's name; images/ and masks/; COCO's JSON or "
    "YOLO's labels/ with their images.",
)
@task_option
@click.option("--split", default="val", show_default=True, help="Which part of it.")
@batch_size_option(32, "Images in one forward.")
@workers_option
@click.option(
    "--val-split",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Score only the share that finetune kept out of training with the same --val-split and "
    "--seed. [default: what it did, where MODEL remembers this folder]",
)
@click.option(
    "--class-map",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file: the folder of each class, one a line, in the order of the model's outputs.",
)
@max_pixels_option
@ignore_index_option
@click.option("--per-class", is_flag=True, help="Every class by itself, the worst first.")
@click.option(
    "--confusion",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_picture,
    help="Picture to write (.png, .jpg, .svg, .pdf): which class is taken for which.",
)
@click.option("--skip-broken", is_flag=True, help="Count broken images instead of stopping.")
@timeout_option
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    data: str,
    task: str | None,
    split: str,
    batch_size: int,
    workers: int,
    val_split: float | None,
    class_map: Path | None,
    max_pixels: int,
    ignore_index: int,
    per_class: bool,
    confusion: Path | None,
    skip_broken: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Measure MODEL on labelled images: top-1, mean IoU or mAP.

    Top-1, top-5 and loss of a classifier, mean IoU on masks, mAP on boxes.

    MODEL may be an ONNX file too: onnxruntime runs it, while torch reads the images.
    """
    import normswap
    from normswap.cli import dense
    from normswap.data import has_splits, is_divided, is_named, labelled_dataset
    from normswap.regular import read_text
    from normswap.training.tasks.confusion import Confusion

    opened = open_model(chosen, timeout)
    model, preprocessing, names, source = opened
    on_broken = "skip" if skip_broken else "error"
    task = chosen_task(task, source)
    if task != "classification":
        share, seed = _division(model, data, val_split, chosen.seed, divided=is_divided(data))
        dense.evaluate(
            opened, chosen, task,
            {"root": data, "split": split, "val_split": share, "seed": seed,
             "max_pixels": max_pixels, "ignored": ignore_index},
            {"batch_size": batch_size, "workers": workers, "on_broken": on_broken},
            per_class=per_class, confusion=confusion, as_json=as_json,
        )  # fmt: skip
        return
    names = names if class_map is None else tuple(read_text(class_map).split("\n"))
    names = None if names is None else tuple(name.strip() for name in names if name.strip())
    parts = is_named(data) or has_splits(data) or not Path(data).is_dir()
    share, seed = _division(model, data, val_split, chosen.seed, divided=parts)
    usual = preprocessing.resized(chosen.image_size)
    seen = usual.tested()
    read = functools.partial(
        labelled_dataset,
        data,
        seen,
        split,
        val_split=share,
        seed=seed,
        max_pixels=max_pixels,
    )
    dataset: Any = read(class_names=names)
    if names is None:
        dataset = _with_classes_of(model, dataset, read)
    judge = Confusion()
    with progress("evaluating") as show:
        metrics = normswap.evaluate(
            model,
            dataset,
            batch_size=getattr(model, "batch_size", None) or batch_size,
            device=check_device(chosen.device),
            workers=workers,
            on_broken=on_broken,
            task=judge,
            progress=show,
        )
    classes = 0 if judge.counts is None else len(judge.counts)
    labels = getattr(dataset, "class_names", None) or range(classes)
    if confusion is not None and judge.counts is not None:
        _draw(judge, labels, confusion)
    if as_json:
        facts = {"model": chosen.spec, "data": data, "split": split, **metrics.to_json()}
        facts |= {"input_size": seen.input_size, "crop_pct": seen.crop_pct}
        print_json(facts | ({"classes": _classes(judge, labels)} if per_class else {}))
        return
    say(_size_in_words(seen, usual))
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
    if per_class:
        _print_classes(_classes(judge, labels))
    if confusion is not None:
        say(f"wrote {confusion}")
    if chosen.spec.endswith(".onnx"):
        suggest("verify", chosen.spec)
    else:
        suggest("export", *chosen.words(), "-o", f"{chosen.short_name}.onnx")


def _classes(judge: Confusion, labels: Sequence[Any]) -> list[dict[str, Any]]:
    """Every class by itself, the worst first."""
    found = sorted(judge.by_class(), key=lambda item: item.top1)
    return [
        {
            "class": str(labels[item.number]),
            "top1": item.top1,
            "images": item.images,
            "taken_for": None if item.taken_for is None else str(labels[item.taken_for]),
            "times": item.times,
        }
        for item in found
    ]


def _print_classes(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("class", "top-1", "images", "mostly taken for", "times"),
        [
            (
                row["class"],
                f"{100 * row['top1']:.2f} %",
                row["images"],
                row["taken_for"],
                row["times"],
            )
            for row in rows
        ],
        numeric=("top-1", "images", "times"),
    )


def _draw(judge: Confusion, labels: Sequence[Any], path: Path) -> None:
    """The classes of which there are images."""
    from normswap import pictures

    assert judge.counts is not None
    seen = [item.number for item in judge.by_class()]
    pictures.confusion(judge.counts[seen][:, seen].tolist(), [str(labels[n]) for n in seen], path)


def _division(
    model: nn.Module, data: str, val_split: float | None, seed: int, *, divided: bool
) -> tuple[float | None, int]:
    """Which images of one folder to score: those that the model was not trained on."""
    from normswap.data import listing_digest
    from normswap.provenance import provenance_of

    if divided:
        if val_split is not None:
            raise click.UsageError("--val-split divides one folder; these data have parts already.")
        return None, seed
    if val_split is not None:
        return val_split, seed
    found = [entry["division"] for entry in provenance_of(model).history if "division" in entry]
    if not found:
        return None, seed
    known, name = _checked(found[-1]), Path(data).resolve().name
    if known.get("listing") == listing_digest(data):
        share: float = known["val_split"]
        _logger.info("%s: the %.0f %% that were kept out of training", name, 100 * share)
        return share, known["seed"]
    if known.get("data") == name:
        _logger.warning(
            "%s: the model was trained on images of a folder of this name, whose files have "
            "changed since; all of them are scored",
            name,
        )
    return None, seed


def _checked(division: Any) -> dict[str, Any]:
    """A division as ``finetune`` writes it, from a record that says anything."""
    if isinstance(division, dict):
        share: Any = division.get("val_split")
        if checks.above(share, 0) and share < 1 and type(division.get("seed")) is int:
            return division
    raise ArtifactError(
        "MODEL",
        got=f"a record of its training images that cannot be read: {division!r:.60}",
        need="the share and the seed that finetune wrote",
        hint="--val-split and --seed, which go before it",
    )


def _with_classes_of(model: nn.Module, dataset: Any, read: Callable[..., Any]) -> Any:
    """Folders whose order says nothing of the model's classes are refused, or named by ImageNet."""
    import torch

    from normswap.data import LabelledImages, imagenet_names
    from normswap.running import device_of
    from normswap.training.tasks.classification import class_scores

    if not isinstance(dataset, LabelledImages):
        return dataset
    with torch.no_grad():
        images = torch.stack([dataset[0][0]] * (getattr(model, "batch_size", None) or 1))
        outputs = class_scores(model.eval()(images.to(device_of(model)))).shape[1]
    folders = len(dataset.class_names)
    if outputs == folders:
        return dataset
    if outputs == 1000:
        with contextlib.suppress(DataError):
            return read(class_names=imagenet_names())
    raise DataError(
        "--data",
        got=f"{folders} class folders ({', '.join(dataset.class_names[:3])} …) for a model with "
        f"{outputs} outputs of unknown names",
        need="to know which output each folder is",
        hint="--class-map FILE with a folder's name for each output, a line each",
    )


def _size_in_words(seen: Preprocessing, usual: Preprocessing) -> str:
    """At which size the images were seen, and why."""
    edges = ["×".join(str(edge) for edge in one.input_size[1:]) for one in (seen, usual)]
    text = f"seen at {edges[0]}, crop {seen.crop_pct:g}"
    if seen == usual:
        return text
    return f"{text}: the size for tests, as timm's own validation has it (trained at {edges[1]})"


class Opened(NamedTuple):
    """A model, what it wants of its input, its class names; the source, unless it is a file."""

    model: nn.Module
    preprocessing: Preprocessing
    names: tuple[str, ...] | None
    source: Source | None


def open_model(chosen: ModelChoice, timeout: float | None) -> Opened:
    """MODEL, which may be an ONNX file too."""
    if not chosen.spec.endswith(".onnx"):
        source = chosen.load()
        return Opened(source.model, source.preprocessing, source.class_names, source)
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
    wanted = Preprocessing.from_json(file.preprocessing)
    if (file.batch_size or 1) * math.prod(wanted.input_size) > _MOST_NUMBERS:
        raise DataError(
            chosen.spec,
            got=f"a batch of {file.batch_size} images of {wanted.input_size}",
            need=f"at most {_MOST_NUMBERS:,} numbers at once",
            hint="exporting the model with another batch size",
        )
    return Opened(file, wanted, file.class_names, None)
