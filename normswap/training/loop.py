"""The fine-tuning loop: forwards, updates, epochs, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.drift import device_of, evaluating
from normswap.errors import TrainingError, in_short
from normswap.provenance import add_history
from normswap.training import processes
from normswap.training.batches import (
    Share,
    check_evaluation_data,
    check_labels,
    evaluation_batches,
    training_batches,
)
from normswap.training.checkpoints import LAST, remove_parts
from normswap.training.curves import CURVE, draw_learning_curve
from normswap.training.diagnosis import explained, first_non_finite
from normswap.training.interrupts import StopRequest, TrainingInterrupted, stop_on_signals
from normswap.training.machinery import (
    borrowed_accelerator,
    make_average,
    make_optimizer,
    make_scheduler,
)
from normswap.training.norms import check_norms, notes_on_norms, scale_schedules
from normswap.training.objective import Objective
from normswap.training.options import FineTune
from normswap.training.parameters import start_training, training_mode
from normswap.training.randomness import rng_kept, seed_everything
from normswap.training.reading import Batch
from normswap.training.records import Epoch, History, Progress, ProgressCallback, Recorder
from normswap.training.resumption import (
    Meter,
    Place,
    check_agreement,
    earlier_run,
    load_run,
    save_best,
    save_run,
)
from normswap.training.scoring import (
    Metrics,
    check_classes,
    class_scores,
    count_hits,
    metrics_from,
)

log = logging.getLogger("normswap")


def finetune(
    model: nn.Module,
    train_data: Any,
    val_data: Any = None,
    options: FineTune | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> History:
    """Train a classifier further, in place, at a small batch size.

    Runs on one CPU or GPU, or on many under ``accelerate launch`` or ``torchrun``. The last batch
    of an epoch may be smaller; if it would hold a single sample where ``batch_size`` is larger,
    that sample is dropped for this epoch.

    Args:
        model: returns logits (N, K); its class count must fit the labels. Training flags and
            ``requires_grad`` are the caller's again afterwards; it stays on the device it trained
            on.
        train_data: a ``Dataset`` of (tensor, class), an (images, labels) pair of tensors, or a
            ``DataLoader``, which keeps its own order and batch size.
        val_data: likewise; scored after each epoch.
        options: the recipe; None takes the defaults of ``FineTune``.
        out: folder for ``last.pt`` and ``best.pt``, ``metrics.jsonl`` and
            ``learning_curve.png``; with several machines it must be one that all of them see.
            None writes nothing, and the run cannot be resumed.
        resume: continue the run in ``out`` exactly where its last checkpoint is; start afresh if
            there is none; do nothing but load the result if it had finished.
        progress: called after every update, in the main process.

    Returns:
        What was done, epoch by epoch.

    Raises:
        TrainingError: options that do not fit the model or the earlier run, a loss that is not
            finite (with step and layer), memory or disk that ran out.
        TrainingInterrupted: Ctrl-C or SIGTERM; the step was finished and a checkpoint written.
        DataError: samples that cannot be read, labels that the model has no class for.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.randn(8, 1, 2, 2), torch.arange(8) % 2
        >>> history = finetune(net, (images, labels), options=FineTune(batch_size=2, epochs=1))
        >>> history.steps
        4
    """
    options = FineTune() if options is None else options
    folder = None if out is None else Path(out)
    if options.keep == "best" and val_data is None:
        raise TrainingError(
            "FineTune.keep",
            got="'best' without val_data",
            need="validation data to say which weights are best",
            hint="val_data, or keep='last'",
        )
    if options.teacher is model:
        raise TrainingError(
            "FineTune.teacher",
            got="the model itself",
            need="another model, for example the BatchNorm original",
            hint="copy.deepcopy(model) before the conversion",
        )
    if val_data is not None:
        check_evaluation_data(val_data)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise TrainingError("out", got=f"{folder}, a file", need="a folder", hint="another name")
    found = earlier_run(folder, resume, options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(rng_kept())
        accelerator = stack.enter_context(borrowed_accelerator(options))
        stack.enter_context(
            training_mode(
                model,
                freeze_backbone=options.freeze_backbone,
                norms_only=options.norms_only,
            )
        )
        stack.enter_context(_teacher_at_work(options.teacher, accelerator.device))
        stop = stack.enter_context(stop_on_signals())
        run = Run(model, train_data, val_data, options, accelerator, folder, stop, progress)
        stack.callback(run.close)
        return run.go(found)


@contextlib.contextmanager
def _teacher_at_work(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    if teacher is None:
        yield
        return
    home = device_of(teacher)
    try:
        with evaluating(teacher.to(device)):
            yield
    finally:
        teacher.to(home)


class Run:
    """One run of ``finetune``, from its parts to its end."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Any,
        val_data: Any,
        options: FineTune,
        accelerator: Any,
        folder: Path | None,
        stop: StopRequest,
        progress: ProgressCallback | None,
    ) -> None:
        self.model, self.val_data, self.options = model, val_data, options
        self.accelerator, self.folder = accelerator, folder
        self.stop, self.progress = stop, progress
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        self.device: torch.device = accelerator.device
        check_norms(model, self.device, self.share.world)
        self.batches = training_batches(
            train_data,
            batch_size=options.batch_size,
            seed=options.seed,
            share=self.share,
            accelerator=accelerator,
            workers=options.workers,
            on_broken=options.on_broken,
        )
        self.updates_per_epoch = math.ceil(self.batches.count / options.gradient_accumulation)
        self.steps = options.epochs * self.updates_per_epoch
        self._assemble()
        self.place, self.meter = Place(), Meter()
        self.epochs: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.broken: set[int] = set()
        self.objective: Objective | None = None
        self.recorder = Recorder(None, step=0, tensorboard=False)
        self.resumed_from: int | None = None

    def _assemble(self) -> None:
        options = self.options
        per_update = self.batches.batch_size * options.gradient_accumulation * self.share.world
        self.learning_rate = options.learning_rate_for(per_update)
        seed_everything(options.seed + self.share.rank)
        self.model.to(self.device)
        self.average = make_average(self.model, options.ema)
        self.wrapped = processes.wrap(self.model, self.accelerator)
        plain = make_optimizer(self.model, options, self.learning_rate)
        self.scheduler = make_scheduler(plain, options, self.learning_rate, self.updates_per_epoch)
        scale_schedules(self.model, self.steps * options.gradient_accumulation)
        # without a gradient scaler accelerate's step and backward only add a search for packages,
        # 1.3 ms per update
        scaled = self.accelerator.scaler is not None
        self.optimizer = self.accelerator.prepare_optimizer(plain) if scaled else plain
        self._say(per_update)

    def _say(self, per_update: int) -> None:
        options = self.options
        log.info(
            "fine-tuning %s images for %d epochs: %d updates of %d images, learning rate %.3g",
            self.batches.samples,
            options.epochs,
            self.steps,
            per_update,
            self.learning_rate,
        )
        if options.gradient_accumulation > 1:
            log.info(
                "gradient accumulation averages gradients over %d forwards; it does not enlarge the"
                " batch that a BatchNorm sees: its statistics still come from %d images",
                options.gradient_accumulation,
                self.batches.batch_size,
            )
        for note in notes_on_norms(self.model, self.share.world):
            log.info("%s", note)

    # the run

    def go(self, found: dict[str, Any] | None) -> History:
        """Train from a checkpoint, or from the start, to the end."""
        check_agreement(self, found)
        if found is not None:
            load_run(self, found)
        self._open_records()
        if found is not None and found["finished"]:
            log.info("the run in %s had finished; nothing to do", self.folder)
            return self._finish()
        self.began, self.began_at = time.perf_counter(), self.place.step
        self.saved = time.monotonic()
        while self.place.epoch < self.options.epochs:
            self._train_epoch()
            self._close_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        start_training(self.model, freeze_backbone=self.options.freeze_backbone)
        batches = self.batches.epoch(self.place.epoch, self.place.batch)
        while self.place.batch < self.batches.count:
            tick = time.perf_counter()
            left = self.batches.count - self.place.batch
            with explained(self.batches.batch_size, self.device):
                seen = self._update(batches, min(self.options.gradient_accumulation, left))
            if seen == 0:  # the loader's length was an estimate, and too high
                break
            self.place.batch += seen
            self.meter.seconds += time.perf_counter() - tick
            self._after_update()

    def _update(self, batches: Iterator[Batch], count: int) -> int:
        """Up to ``count`` forwards and backwards, then one step of the optimizer."""
        seen = 0
        for index in range(count):
            batch = next(batches, None)
            if batch is None:
                break
            with processes.synchronised(self.wrapped, self.accelerator, index == count - 1):
                self._forward_backward(batch, count)
            seen += 1
        if seen:
            self._step()
        return seen

    def _forward_backward(self, batch: Batch, parts: int) -> None:
        check_labels(batch.labels)
        images = batch.images.to(self.device, non_blocking=True)
        objective = self.objective or self._first_look(images)
        check_classes(batch.labels, objective.classes)
        labels = batch.labels.to(self.device, torch.long, non_blocking=True)
        mixed, targets = objective.mix(images, labels)
        with self.accelerator.autocast():
            loss, scores = objective.loss(self.wrapped(mixed), mixed, targets)
        hits = (scores.detach().argmax(1) == labels).sum()
        value, right = torch.stack([loss.detach().double(), hits.double()]).tolist()
        if not math.isfinite(value):
            raise self._diverged(value, mixed)
        self.meter.loss += value * len(labels)
        self.meter.hits += int(right)
        self.meter.images += len(labels)
        self._count_broken(batch.broken)
        part: Any = loss / parts if parts > 1 else loss
        if self.accelerator.scaler is None:
            torch.autograd.backward(part)
        else:
            self.accelerator.backward(part)

    def _first_look(self, images: Tensor) -> Objective:
        """One forward in eval mode, to learn the number of classes."""
        with rng_kept(), evaluating(self.model), torch.no_grad(), self.accelerator.autocast():
            try:
                output = self.model(images[:1])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as error:
                raise TrainingError(
                    "train_data",
                    got=f"images {tuple(images.shape)} of {images.dtype}, which the model refuses:"
                    f" {in_short(error)}",
                    need="preprocessed images that it takes",
                    hint="normswap.data.Preprocessing; for half precision FineTune(amp='bf16')",
                ) from error
        classes = class_scores(output).shape[1]
        self.objective = Objective(self.options, classes)
        return self.objective

    def _diverged(self, value: float, images: Tensor) -> TrainingError:
        with self.accelerator.autocast():
            where = first_non_finite(self.model, images)
        return TrainingError(
            f"step {self.place.step + 1}",
            got=f"a loss of {value}, first seen in {where}",
            need="finite numbers",
            hint=f"a smaller learning_rate, clip_grad, or a longer warm-up{self._kept()}",
        )

    def _check_weights(self) -> None:
        """No update may leave weights behind that no later one can mend."""
        for name, weights in self.model.named_parameters():
            if not weights.isfinite().all():
                raise TrainingError(
                    f"step {self.place.step}",
                    got=f"{name} is not finite any more, although the loss was",
                    need="finite numbers",
                    hint=f"a smaller learning_rate, or clip_grad{self._kept()}",
                )

    def _kept(self) -> str:
        last = Path() if self.folder is None else self.folder / LAST
        return f"; the last good checkpoint is {last}" if last.is_file() else ""

    def _count_broken(self, broken: tuple[int, ...]) -> None:
        new = set(broken) - self.broken
        if new:
            self.broken |= new
            log.warning("samples that cannot be read, replaced: %s", sorted(new))

    def _step(self) -> None:
        if self.options.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.options.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.place.step += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.place.step)
        if self.average is not None:
            self.average.update(self.model, step=self.place.step)

    def _after_update(self) -> None:
        if self.place.step % self.options.log_every == 0:
            self._record_step()
        if self.progress is not None and self.accelerator.is_main_process:
            self.progress(self._progress())
        due = time.monotonic() - self.saved >= self.options.checkpoint_every
        stop, save = processes.any_of(
            self.accelerator, self.stop.name is not None, due and self.folder is not None
        )
        if stop or save:
            self._check_weights()
            self._save()
        if stop:
            self._leave()

    def _leave(self) -> None:
        name = self.stop.name or "a signal in another process"
        hint = "out=… next time, to be able to resume"
        if self.folder is not None:
            hint = f"resume=True: {self.folder / LAST} holds step {self.place.step}"
        error = TrainingInterrupted(
            "finetune",
            got=f"{name} at step {self.place.step}",
            need=f"{self.steps} steps",
            hint=hint,
        )
        error.history = replace(self._history(), interrupted=name)
        raise error

    def _close_epoch(self) -> None:
        totals = [self.meter.loss, self.meter.hits, self.meter.images]
        loss, hits, images = processes.added_up(self.accelerator, totals)
        self._check_weights()
        try:
            score = self._validate()
        except Exception:
            if self.share.world == 1:  # the epoch is not lost: a resumed run validates it first
                self._save()
            raise
        row = Epoch(
            epoch=self.place.epoch + 1,
            step=self.place.step,
            learning_rate=self._learning_rate_now(),
            train_loss=loss / max(images, 1),
            train_top1=hits / max(images, 1),
            val_loss=score.loss if score else None,
            val_top1=score.top1 if score else None,
            val_top5=score.top5 if score else None,
            seconds=self.meter.seconds,
            images_per_second=images / max(self.meter.seconds, 1e-9),
        )
        self.epochs.append(row)
        self.recorder.write("epoch", asdict(row))
        log.info("%s", _line(row, self.options.epochs))
        if not math.isfinite(row.val_loss or 0.0):
            log.warning("epoch %d: the logits on the validation data are not finite", row.epoch)
        if _better(row, self.best):
            self._keep_best(row)
        self.place = Place(epoch=row.epoch, batch=0, step=self.place.step)
        self.meter = Meter()
        self._save()

    def _validate(self) -> Metrics | None:
        if self.val_data is None:
            return None
        shown = self.model if self.average is None else self.average.module
        processes.share_buffers(shown, self.accelerator)
        batches, shared = evaluation_batches(
            self.val_data,
            batch_size=self.options.eval_batch_size,
            workers=self.options.workers,
            on_broken=self.options.on_broken,
            share=self.share,
        )
        with explained(self.options.eval_batch_size, self.device):
            totals = count_hits(shown, batches, self.device, autocast=self.accelerator.autocast)
        if shared:
            totals = torch.tensor(processes.added_up(self.accelerator, totals.tolist()))
        return metrics_from(totals)

    def _finish(self) -> History:
        processes.share_buffers(self.model, self.accelerator)
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        if self.options.keep == "best" and self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        self._draw()
        if self.broken:
            log.warning("%d samples could not be read and were replaced", len(self.broken))
        history = self._history()
        row = history.best if self.options.keep == "best" and history.best else self.epochs[-1]
        add_history(
            self.model,
            "fine-tuned",
            epochs=row.epoch,
            batch_size=self.batches.batch_size,
            images=self.batches.samples,
            optimizer=self.options.optimizer,
            learning_rate=self.learning_rate,
            val_top1=row.val_top1,
            val_loss=row.val_loss,
        )
        return history

    # what it reports

    def _history(self) -> History:
        return History(
            epochs=tuple(self.epochs),
            steps=self.place.step,
            learning_rate=self.learning_rate,
            best=self.best,
            kept=self.options.keep,
            broken=tuple(sorted(self.broken)),
            resumed_from=self.resumed_from,
        )

    def _learning_rate_now(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _progress(self) -> Progress:
        elapsed = time.perf_counter() - self.began
        done = self.place.step - self.began_at
        images = max(self.meter.images, 1)
        return Progress(
            step=self.place.step,
            steps=self.steps,
            epoch=self.place.epoch + 1,
            epochs=self.options.epochs,
            loss=self.meter.loss / images,
            accuracy=self.meter.hits / images,
            learning_rate=self._learning_rate_now(),
            images_per_second=images * self.share.world / max(self.meter.seconds, 1e-9),
            eta_seconds=elapsed / max(done, 1) * (self.steps - self.place.step),
        )

    def _record_step(self) -> None:
        now = asdict(self._progress())
        kept = ("step", "epoch", "loss", "accuracy", "learning_rate", "images_per_second")
        self.recorder.write("step", {name: now[name] for name in kept})

    def _draw(self) -> None:
        if self._writes() and self.folder is not None and self.epochs:
            draw_learning_curve(self.epochs, self.folder / CURVE)

    def _writes(self) -> bool:
        return self.folder is not None and bool(self.accelerator.is_main_process)

    def _open_records(self) -> None:
        if self._writes() and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_parts(self.folder)
            self.recorder = Recorder(
                self.folder, step=self.place.step, tensorboard=self.options.tensorboard
            )

    def close(self) -> None:
        """Close what is open, whatever has happened."""
        self.recorder.close()
        processes.unwrap(self.wrapped, self.accelerator)

    # checkpoints

    def _keep_best(self, row: Epoch) -> None:
        self.best = row
        shown = self.model if self.average is None else self.average.module
        if self.options.keep == "best":
            self.best_weights = {k: v.detach().cpu().clone() for k, v in shown.state_dict().items()}
        if self._writes():
            save_best(self, shown.state_dict())

    def _save(self) -> None:
        if self.folder is not None:
            save_run(self)
        self.saved = time.monotonic()


def _better(row: Epoch, best: Epoch | None) -> bool:
    if row.val_top1 is None or not math.isfinite(row.val_loss or 0.0):
        return False
    return best is None or row.val_top1 > (best.val_top1 or 0.0)


def _line(row: Epoch, epochs: int) -> str:
    text = (
        f"epoch {row.epoch}/{epochs}: loss {row.train_loss:.4f}, top-1 {row.train_top1:.2%}, "
        f"{row.images_per_second:.1f} images/s"
    )
    if row.val_top1 is None:
        return text
    return f"{text}; validation loss {row.val_loss:.4f}, top-1 {row.val_top1:.2%}"
