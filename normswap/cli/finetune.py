"""``normswap finetune``: train a model further at a small batch size."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from normswap.cli.console import hush, print_json, print_table, progress, say, say_next
from normswap.cli.options import (
    ModelChoice,
    check_device,
    check_output,
    cli_command,
    force_option,
    json_option,
    model_options,
)
from normswap.cli.tasks import metric_name, percent
from normswap.cli.training import Images, RunChoice, run_options
from normswap.errors import NormSwapError
from normswap.files import contents, current, next_folder, put_in_place, remove

if TYPE_CHECKING:
    from torch import nn

    from normswap.sources import Source
    from normswap.training import History

_logger = logging.getLogger("normswap")


def _batch_size(
    _ctx: click.Context, _parameter: click.Parameter, value: str
) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) == 0:
        raise click.BadParameter(f"got {value!r}; need a number from 1 on, or auto.")
    return int(value)


@cli_command("finetune")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option(
    "--batch-size",
    metavar="N|auto",
    default="2",
    show_default=True,
    callback=_batch_size,
    help="Per process; auto: the largest power of two that a GPU has memory for.",
)
@run_options
@click.option(
    "--teacher",
    metavar="MODEL|FILE|auto|none",
    default="auto",
    show_default=True,
    help="Whose logits to keep; auto: the BN original, if its weights can be had again; FILE: the "
    "original with the checkpoint that it came from.",
)
@click.option(
    "--keep",
    type=click.Choice(["last", "best"]),
    help="Which weights to keep. [default: the best on the validation images, the start included]",
)
@click.option(
    "--early-stop",
    type=click.IntRange(min=1),
    help="Epochs without a better score after which to stop.",
)
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="Seconds between checkpoints.",
)
@click.option("--resume", is_flag=True, help="Go on where the run in the output stopped.")
@force_option
@json_option
@model_options
def command(
    *,
    chosen: ModelChoice,
    run: RunChoice,
    output: Path,
    batch_size: int | Literal["auto"],
    teacher: str,
    keep: str | None,
    early_stop: int | None,
    checkpoint_every: float,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train MODEL further at a small batch size.

    Ctrl-C finishes the step, saves, and leaves; the same command with --resume goes on from there,
    exactly. Several GPUs or machines: `accelerate launch -m normswap finetune …`, or torchrun.
    """
    first = int(os.environ.get("RANK", "0")) == 0  # under a launcher, one process writes
    if not first:
        hush()
    if force and resume:
        raise click.UsageError("--resume goes on with a run, --force starts it anew.")
    work = _workplace(output, first=first, force=force, resume=resume)
    import normswap
    from normswap.artifact import check_target
    from normswap.provenance import add_facts
    from normswap.training.checkpoints import RUN_FILES

    check_target(output, force=True)
    source = chosen.load()
    model = source.model
    images = run.open(source, chosen.image_size, chosen.seed)
    device = check_device(chosen.device) if chosen.device else None
    options = run.options(
        batch_size=_fitting(run, model, images, device) if batch_size == "auto" else batch_size,
        seed=chosen.seed,
        keep=keep,
        early_stop=early_stop,
        checkpoint_every=checkpoint_every,
        device=device,
        teacher=None
        if images.task == "detection"
        else _teacher(teacher, source, chosen.trust, new_head=images.new_head),
    )
    if first and not resume:  # not before everything that the new run needs is there
        remove(next_folder(output))
    with progress("fine-tuning") as show:
        history = normswap.finetune(
            model,
            images.train,
            images.val,
            options,
            out=work,
            resume=resume,
            progress=show,
            task=images.task,
        )
    division = run.images.division(chosen.seed)
    if division is not None:
        add_facts(model, division=division)
    if first:
        normswap.save(model.cpu(), work, force=True)
        if work != output:
            put_in_place(work, output, RUN_FILES)
        _print(history, output, images.task, as_json=as_json)
        if not as_json:
            say_next("evaluate", output, *chosen.consent(), "--data", run.images.data)


def _workplace(output: Path, *, first: bool, force: bool, resume: bool) -> Path:
    """Where the run is worked out: in the output itself, or beside one that it shall replace.

    The earlier run stands until the new one has ended; --resume goes on with the new one.
    """
    if first:
        hint = "--resume to go on with the run in it, --force to replace it, or another -o"
        check_output(output, force=resume or force, hint=hint)
    beside = next_folder(output)
    replaces = beside.is_dir() if resume else force and bool(contents(output))
    work = beside if replaces else output
    if first and resume:
        from normswap.training.checkpoints import LAST

        if not current(work, LAST).is_file():
            _logger.warning("nothing to resume in %s; starting a new run", output)
    return work


def _fitting(run: RunChoice, model: nn.Module, images: Images, device: str | None) -> int:
    """What ``--batch-size auto`` means on the device that will train.

    Raises:
        UsageError: that is the CPU, whose memory says nothing, there are several processes, or a
            detector, which cannot be tried without boxes.
    """
    import torch

    from normswap.training.batch_size import MOST, largest_batch_size

    found = torch.device(device or torch.accelerator.current_accelerator(True) or "cpu")
    reasons = {
        "the CPU": found.type == "cpu",
        "several processes": os.environ.get("WORLD_SIZE", "1") != "1",
        "a detector": images.task == "detection",
    }
    for where in (name for name, given in reasons.items() if given):
        raise click.UsageError(
            f"--batch-size auto: got {where}; need one GPU, whose memory it measures, and a "
            "classifier or a segmenter. Give a number, like --batch-size 2."
        )
    sample, most = images.train[0][0], min(MOST, len(images.train))
    size = largest_batch_size(model.to(found), sample, run.options(device=device), most=most)
    _logger.info("--batch-size auto: %d", size)
    return size


def _teacher(
    name: str, source: Source, trust: tuple[str, ...], *, new_head: bool
) -> nn.Module | None:
    """The network whose logits the model shall keep."""
    from normswap.artifact import load_model
    from normswap.provenance import provenance_of
    from normswap.sources import original, original_of

    if name == "none":
        return None
    if Path(name).is_file() and source.origin is not None:  # the original's checkpoint
        recorded = {**source.origin, "checkpoint": name, "weights": "checkpoint"}
        return original(recorded, trust=provenance_of(source.model).trusted)
    if name != "auto":
        return load_model(name, trust=trust).model
    converted, origin = provenance_of(source.model).plans, source.origin
    if not converted or new_head or origin is None:
        return None
    if origin.get("weights") not in ("pretrained", "checkpoint"):
        return None
    try:
        teacher = original_of(source.model)
    except NormSwapError as error:
        _logger.info("no teacher: %s", error)
        return None
    _logger.info("teacher: the BatchNorm original, %s", origin["spec"])
    return teacher


def _print(history: History, output: Path, task: str, *, as_json: bool) -> None:
    if as_json:
        facts = {"gain": history.gain, "verdict": history.verdict}
        print_json({"output": output, **history.to_json(), **facts})
        return
    shown = _columns(history, task)
    columns = ("epoch", *shown, "images/s")
    print_table(
        columns,
        [
            (row.epoch, *(values[at] for values in shown.values()), f"{row.images_per_second:.1f}")
            for at, row in enumerate(history.epochs)
        ],
        numeric=columns,
    )
    say(history.verdict)
    drawn = "learning curve" if task == "classification" else "pictures"
    say(f"wrote {output}: the {history.kept} weights, checkpoints, metrics and {drawn}")


def _columns(history: History, task: str) -> dict[str, list[str | None]]:
    """What was measured, epoch by epoch, in the words of the task."""
    rows = history.epochs
    losses: dict[str, list[str | None]] = {
        "train loss": [f"{row.train_loss:.4f}" for row in rows],
        "train top-1": [percent(row.train_top1) for row in rows],
        "val loss": [None if row.val_loss is None else f"{row.val_loss:.4f}" for row in rows],
        "val top-1": [percent(row.val_top1) for row in rows],
    }
    if task == "classification":
        return losses
    metric: list[str | None] = [
        None if row.val_metric is None else f"{row.val_metric:.4f}" for row in rows
    ]
    found = {"train loss": losses["train loss"], f"val {metric_name(task)}": metric}
    return found if task == "detection" else {**found, "val loss": losses["val loss"]}
