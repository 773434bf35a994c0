"""The fine-tuning loop: forwards, updates, epochs, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checks import whole
from normswap.errors import RETURNED, TrainingError, in_short
from normswap.files import sole_writer
from normswap.passage import Passage, as_original, forget_statistics, needs_passage
from normswap.plain import or_none, plain
from normswap.provenance import add_history
from normswap.reading import Malformed
from normswap.running import evaluating, moved, placed
from normswap.training import execution
from normswap.training.batches import (
    Share,
    check_evaluation_data,
    evaluation_batches,
    in_memory,
    named_samples,
    training_batches,
)
from normswap.training.blame import blaming
from normswap.training.checkpoints import (
    BEST,
    FORMAT,
    LAST,
    check_fit,
    check_same,
    earlier_run,
    read_checkpoint,
    reading_checkpoint,
    remove_parts,
    write_checkpoint,
)
from normswap.training.examples import AFTER, BEFORE, draw_examples
from normswap.training.execution import (
    StopRequest,
    TrainingInterrupted,
    borrowed_accelerator,
    explained,
    first_non_finite,
    memory_spared,
    stop_on_signals,
)
from normswap.training.identity import (
    data_changes,
    data_identity,
    machine_changes,
    machine_identity,
    say_what_is_not_known,
)
from normswap.training.likeness import check_like
from normswap.training.optimisation import Updates
from normswap.training.options import FineTune
from normswap.training.parameters import (
    averaging,
    check_norms,
    load_norm_state,
    norm_state,
    notes_on_norms,
    pace_of,
    scale_schedules,
    start_training,
    steady_statistics,
    training_mode,
)
from normswap.training.records import (
    CURVE,
    Epoch,
    History,
    MetricsLog,
    TrainingCallback,
    TrainingProgress,
    draw_learning_curve,
)
from normswap.training.samples import Batch, load_rng_state, rng_kept, rng_state, seed_everything
from normswap.training.scoring import added_up, metrics_from, together
from normswap.training.tasks import LossFunction, MetricFunction, Metrics, Task, task_for

log = logging.getLogger("normswap")


def finetune(
    model: nn.Module,
    train_data: Any,
    val_data: Any = None,
    options: FineTune | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: TrainingCallback | None = None,
    loss: LossFunction | None = None,
    metric: MetricFunction | None = None,
    task: str | Task = "classification",
) -> History:
    """Train a model further, in place, at a small batch size.

    Runs on one CPU or GPU, or on many under ``accelerate launch`` or ``torchrun``. The last batch
    of an epoch may be smaller; if it would hold a single sample where ``batch_size`` is larger,
    that sample is dropped for this epoch.

    Args:
        model: returns logits (N, K); its class count must fit the labels. For segmentation logits
            (N, K, H, W), alone or as ``out`` beside ``aux``; for detection it is called as
            torchvision's detectors are: with lists of images and of targets, for a dict of losses.
            Training flags and ``requires_grad`` are the caller's again afterwards; it stays on the
            device it trained on.
        train_data: a ``Dataset`` of (tensor, class), an (images, labels) pair of tensors, or a
            ``DataLoader``, which keeps its own order and batch size. Labels are masks (H, W) for
            segmentation, ``{"boxes": (n, 4), "labels": (n,)}`` for detection.
        val_data: likewise; scored after each epoch.
        options: the recipe; None takes the defaults of ``FineTune``.
        out: folder for ``last.pt`` and ``best.pt``, ``metrics.jsonl`` and
            ``learning_curve.png``, for segmentation and detection ``before.png`` and ``after.png``;
            with several machines it must be one that all of them see.
            None writes nothing, and the run cannot be resumed.
        resume: continue the run in ``out`` exactly where its last checkpoint is; start afresh if
            there is none; do nothing but load the result if it had finished.
        progress: called after every update, in the main process.
        loss: ``loss(output, labels)``, a scalar to minimise, in place of cross-entropy. The labels
            may be anything then.
        metric: ``metric(output, labels)``, the mean over a batch, higher is better; it says which
            epoch is best. None takes top-1, or the loss where labels are no classes.
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``; a
            ``training.tasks.Task`` of one's own is taken too.

    Returns:
        What was done, epoch by epoch.

    Raises:
        TrainingError: options that do not fit the model or the earlier run, a loss that is not
            finite (with step and layer), memory or disk that ran out.
        TrainingInterrupted: Ctrl-C or SIGTERM; the step was finished and a checkpoint written.
        DataError: samples that cannot be read, labels that the model has no class for.
        BusyError: another run is writing ``out``.

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
    if options.keep is None:
        options = replace(options, keep="last" if val_data is None else "best")
    _check_call(model, val_data, options)
    work = task_for(options, task, loss, metric)
    if val_data is not None:
        check_evaluation_data(val_data)
        pair = in_memory(val_data)
        if pair is not None:
            work.check_data(pair[1])
    if folder is not None and folder.exists() and not folder.is_dir():
        raise TrainingError("out", got=f"{folder}, a file", need="a folder", hint="another name")
    with contextlib.ExitStack() as stack:
        stack.enter_context(rng_kept())
        accelerator = stack.enter_context(borrowed_accelerator(options, folder))
        if folder is not None and accelerator.is_main_process:
            stack.enter_context(sole_writer(folder))
        found = earlier_run(folder, resume, options)
        stack.enter_context(
            training_mode(
                model,
                freeze_backbone=options.freeze_backbone,
                norms_only=options.norms_only,
            )
        )
        stack.enter_context(memory_spared(model, options))
        stack.enter_context(_teacher_at_work(options.teacher, accelerator.device))
        stop = stack.enter_context(stop_on_signals())
        job = Job(model, train_data, val_data, options, work, folder, progress)
        run = Run(job, accelerator, stop, fresh=found is None)
        stack.callback(run.close)
        return run.go(found)


def _check_call(model: nn.Module, val_data: Any, options: FineTune) -> None:
    """Refuse options that cannot do what they say."""
    if options.keep == "best" and val_data is None:
        raise TrainingError(
            "FineTune.keep",
            got="'best' without validation data",
            need="validation data to say which weights are best",
            hint="leaving --no-validation out (val_data), or --keep last (keep='last')",
        )
    if options.early_stop is not None and val_data is None:
        raise TrainingError(
            "FineTune.early_stop",
            got=f"{options.early_stop} without validation data",
            need="validation data to say when a run gets no better",
            hint="leaving --no-validation out (val_data), or leaving --early-stop out (early_stop)",
        )
    if options.bn_momentum is not None and not averaging(model):
        raise TrainingError(
            "FineTune.bn_momentum",
            got=f"{options.bn_momentum:g} for a model without running statistics",
            need="a layer that keeps some, such as bn, brn or cbn",
            hint="leaving --bn-momentum out (bn_momentum)",
        )
    if options.teacher is model:
        raise TrainingError(
            "FineTune.teacher",
            got="the model itself",
            need="another model, for example the BatchNorm original",
            hint="copy.deepcopy(model) before the conversion",
        )


@contextlib.contextmanager
def _teacher_at_work(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    if teacher is None:
        yield
        return
    with placed(device, teacher), evaluating(teacher):
        yield


@dataclass(frozen=True)
class Job:
    """What a caller of ``finetune`` has asked for."""

    model: nn.Module
    train_data: Any
    val_data: Any
    options: FineTune
    task: Task
    folder: Path | None
    progress: TrainingCallback | None


@dataclass
class Place:
    """Where a run is: epochs done, batches of this epoch done, updates done."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Meter:
    """Sums over the present epoch, of this process; ``judged`` images can be right or wrong."""

    loss: float = 0.0
    hits: int = 0
    images: int = 0
    seconds: float = 0.0
    judged: int = 0

    def add(self, loss: float, right: float | None, images: int) -> None:
        """Count one forward."""
        self.loss += loss * images
        self.images += images
        if right is not None:
            self.hits += int(right)
            self.judged += images


@dataclass
class Record:
    """What a run has found out so far."""

    epochs: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    best_weights: dict[str, Tensor] | None = None
    broken: set[int] = field(default_factory=set)
    resumed_from: int | None = None
    original: Metrics | None = None
    start: Metrics | None = None

    def state(self) -> dict[str, Any]:
        """Plain data; the best weights have a file of their own."""
        return {
            "epochs": [asdict(row) for row in self.epochs],
            "best": None if self.best is None else asdict(self.best),
            "broken": sorted(self.broken),
            "original": None if self.original is None else asdict(self.original),
            "start": None if self.start is None else asdict(self.start),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Record:
        """The inverse of ``state``."""
        return cls(
            epochs=[Epoch.from_json(row) for row in state["epochs"]],
            best=None if state["best"] is None else Epoch.from_json(state["best"]),
            broken={operator.index(number) for number in state["broken"]},
            original=_looked(state["original"]),
            start=_looked(state["start"]),
        )


@dataclass
class Clock:
    """When this call of ``finetune`` began, where, and when it saved last."""

    step: int = 0
    began: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.monotonic)


class Run:
    """One run of ``finetune``, from its parts to its end."""

    def __init__(self, job: Job, accelerator: Any, stop: StopRequest, *, fresh: bool) -> None:
        self.job, self.options, self.model, self.task = job, job.options, job.model, job.task
        self.accelerator, self.stop = accelerator, stop
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        self.device: torch.device = accelerator.device
        check_norms(self.model, self.device, self.share.world)
        self.batches = training_batches(
            job.train_data,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            share=self.share,
            accelerator=accelerator,
            workers=self.options.workers,
            on_broken=self.options.on_broken,
        )
        self.model.to(self.device)
        self.task.meet(self.model, job.train_data)
        self.record = self._looked_before() if fresh else Record()
        seed_everything(self.options.seed + self.share.rank)
        self.passage = self._make_passage()
        self.updates = Updates(
            self.model,
            self.options,
            accelerator,
            learning_rate=self.learning_rate,
            per_epoch=self.updates_per_epoch,
        )
        if self.passage is not None and self.updates.shown is not self.model:
            self.passage.follow(self.updates.shown)
        self.wrapped = execution.wrap(self.model, accelerator)
        scale_schedules(self.model, self.steps * self.options.gradient_accumulation)
        self.place, self.meter, self.clock = Place(), Meter(), Clock()
        self.metrics_log = MetricsLog(None, step=0, tensorboard=False)
        self.identity: dict[str, Any] = {}
        self._begun = False
        self._say()

    @property
    def updates_per_epoch(self) -> int:
        """Updates in one epoch."""
        return math.ceil(self.batches.count / self.options.gradient_accumulation)

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.options.epochs * self.updates_per_epoch

    @property
    def images_per_update(self) -> int:
        """Over all forwards and processes."""
        return self.batches.batch_size * self.options.gradient_accumulation * self.share.world

    @property
    def learning_rate(self) -> float:
        """At the top of the schedule."""
        rate = self.options.learning_rate_for(self.images_per_update)
        by_rule = self.options.learning_rate is None and self.options.adaptive
        return rate * pace_of(self.model) if by_rule else rate

    def _looked_before(self) -> Record:
        """The BatchNorm original and the start on the validation data."""
        if self.job.val_data is None:
            return Record()
        start = self._validate(self.model)
        original = None
        with as_original(self.model) as possible:
            if possible:
                same = not needs_passage(self.model)  # with running statistics it is the start
                original = start if same else self._validate(self.model)
        for name, found in (("the BatchNorm original", original), ("the start", start)):
            if found is not None:
                said = found.in_words(self.task.metric_name)
                log.info("%s on the validation data: %s", name, said)
        return Record(original=original, start=start)

    def _make_passage(self) -> Passage | None:
        if self.options.passage is None:
            return None
        return Passage(self.model, steps=max(1, round(self.options.passage * self.steps)))

    def _say(self) -> None:
        options = self.options
        log.info(
            "training on %s images, %s: %d updates of %d images, learning rate %.3g%s",
            self.batches.samples,
            "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs",
            self.steps,
            self.images_per_update,
            self.learning_rate,
            ", by the size of each weight" if options.relative else "",
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
        if self.job.folder is not None:
            self.identity = self._identify()
        with reading_checkpoint((self.job.folder or Path()) / LAST):
            self._check_agreement(found)
            if found is not None:
                self._resume(found)
                if not isinstance(found["finished"], bool):
                    raise Malformed(f"finished is {found['finished']!r:.40}")
        self._open_records()
        if found is None:
            self._record_start()
        if found is not None and found["finished"]:
            log.info("the run in %s had finished; nothing to do", self.job.folder)
            return self._finish()
        self.clock = Clock(self.place.step)
        while not self._ended():
            self._train_epoch()
            self._close_epoch()
        return self._finish()

    def _ended(self) -> bool:
        """Whether all epochs are done, or the last ones were no better, as ``early_stop`` asks."""
        if self.place.epoch == self.options.epochs:
            return True
        patience, best = self.options.early_stop, self.record.best
        if patience is None or best is None:
            return False
        since = [e for e in self.record.epochs if e.epoch > best.epoch and e.passage in (None, 1)]
        return len(since) >= patience

    def _train_epoch(self) -> None:
        start_training(self.model, freeze_backbone=self.options.freeze_backbone)
        batches = self.batches.epoch(self.place.epoch, self.place.batch)
        with steady_statistics(self.model, self.batches.batch_size, self.options.bn_momentum):
            self._train_on(batches)

    def _train_on(self, batches: Iterator[Batch]) -> None:
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
            with execution.synchronised(self.wrapped, self.accelerator, index == count - 1):
                self._forward_backward(batch, count)
            seen += 1
        if seen:
            self.place.step += 1
            self.updates.update(self.place.step)
            if self.passage is not None:
                self.passage.step()
        return seen

    def _forward_backward(self, batch: Batch, parts: int) -> None:
        with blaming(self.task, batch, self.job.train_data):
            self.task.check_data(batch.labels)
        images = moved(batch.images, self.device, non_blocking=True)
        if self.options.channels_last and isinstance(images, Tensor) and images.ndim == 4:
            images = images.to(memory_format=torch.channels_last)
        labels = moved(batch.labels, self.device, non_blocking=True)
        if not self._begun:
            self._first_look(images)
        with blaming(self.task, batch, self.job.train_data), self.accelerator.autocast():
            loss, right, seen = self.task.step(self.wrapped, images, labels)
        value, hits = _numbers(loss, right)
        if not math.isfinite(value):
            raise self._diverged(value, seen)
        self.meter.add(value, hits, len(batch.labels))
        self._count_broken(batch.broken)
        self.updates.backward(loss / parts if parts > 1 else loss)

    def _first_look(self, images: Any) -> None:
        """One forward in eval mode, from which the task learns what it must."""
        with rng_kept(), evaluating(self.model), torch.no_grad(), self.accelerator.autocast():
            try:
                output = self.model(images[:1])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as error:
                raise TrainingError(
                    "train_data",
                    got=f"{_described(images)}, which the model refuses: {in_short(error)}",
                    need="preprocessed images that it takes",
                    hint="--image-size, --mean and --std (normswap.data.Preprocessing); "
                    "--amp bf16 (amp='bf16') for half precision",
                ) from error
        self.task.begin(output)
        self._begun = True

    def _diverged(self, value: float, images: Any) -> TrainingError:
        with self.accelerator.autocast():
            where = first_non_finite(self.model, images)
        return TrainingError(
            f"step {self.place.step + 1}",
            got=f"a loss of {value}, first seen in {where}",
            need="finite numbers",
            hint="a smaller --lr (learning_rate), --clip-grad (clip_grad), or a longer "
            f"--warmup-epochs (warmup_epochs){self._kept()}",
        )

    def _check_weights(self) -> None:
        """No update may leave weights behind that no later one can mend."""
        for name, weights in self.model.named_parameters():
            if not weights.isfinite().all():
                raise TrainingError(
                    f"step {self.place.step}",
                    got=f"{name} is not finite any more, although the loss was",
                    need="finite numbers",
                    hint="a smaller --lr (learning_rate), or --clip-grad (clip_grad)"
                    f"{self._kept()}",
                )

    def _kept(self) -> str:
        last = Path() if self.job.folder is None else self.job.folder / LAST
        return f"; the last good checkpoint is {last}" if last.is_file() else ""

    def _count_broken(self, broken: tuple[int, ...]) -> None:
        new = set(broken) - self.record.broken
        if new:
            self.record.broken |= new
            names = named_samples(self.job.train_data, new)
            log.warning("samples that cannot be read, replaced: %s", names)

    def _after_update(self) -> None:
        if self.place.step % self.options.log_every == 0:
            self._record_step()
        if self.job.progress is not None and self.accelerator.is_main_process:
            self.job.progress(self._progress())
        due = time.monotonic() - self.clock.saved >= self.options.checkpoint_every
        stop, save = execution.any_of(
            self.accelerator, self.stop.name is not None, due and self.job.folder is not None
        )
        if stop or save:
            self._check_weights()
            self._save()
        if stop:
            self._leave()

    def _leave(self) -> None:
        name = self.stop.name or "a signal in another process"
        hint = "out=… next time, to be able to resume"
        if self.job.folder is not None:
            hint = f"--resume (resume=True): {self.job.folder / LAST} holds step {self.place.step}"
        error = TrainingInterrupted(
            "finetune",
            got=f"{name} at step {self.place.step}",
            need=f"{self.steps} steps",
            hint=hint,
        )
        error.history = replace(self._history(), interrupted=name)
        raise error

    def _close_epoch(self) -> None:
        meter = self.meter
        totals = [meter.loss, meter.hits, meter.images, meter.judged]
        loss, hits, images, judged = execution.added_up(self.accelerator, totals)
        self._check_weights()
        try:
            score = None if self.job.val_data is None else self._validate(self.updates.shown)
        except Exception:
            if self.share.world == 1:  # the epoch is not lost: a resumed run validates it first
                self._save()
            raise
        row = Epoch(
            epoch=self.place.epoch + 1,
            step=self.place.step,
            learning_rate=self.updates.learning_rate,
            train_loss=loss / max(images, 1),
            train_top1=hits / judged if judged else None,
            val_loss=self._loss_of(score),
            val_top1=or_none(score.top1) if score else None,
            val_top5=or_none(score.top5) if score else None,
            val_metric=score.metric if score else None,
            passage=None if self.passage is None else self.passage.share,
            seconds=self.meter.seconds,
            images_per_second=images / max(self.meter.seconds, 1e-9),
        )
        self.record.epochs.append(row)
        self.metrics_log.write("epoch", asdict(row))
        log.info("%s", _line(row, self.options.epochs, self.task.metric_name))
        if not math.isfinite(row.val_loss or 0.0):
            log.warning("epoch %d: the logits on the validation data are not finite", row.epoch)
        if _better(row, self.record.best):
            self._keep_best(row)
        self.place = Place(epoch=row.epoch, batch=0, step=self.place.step)
        self.meter = Meter()
        self._save()

    def _loss_of(self, score: Metrics | None) -> float | None:
        return score.loss if score is not None and self.task.loses_in_eval else None

    def _validate(self, shown: nn.Module) -> Metrics:
        execution.share_buffers(shown, self.accelerator)
        batches, shared = evaluation_batches(
            self.job.val_data,
            batch_size=self.options.eval_batch_size,
            workers=self.options.workers,
            on_broken=self.options.on_broken,
            share=self.share,
        )
        with explained(self.options.eval_batch_size, self.device):
            # in full precision also under AMP: what is validated is what ``evaluate`` measures
            totals = added_up(self.task, shown, batches, self.device, data=self.job.val_data)
        if shared:
            totals = together(self.task, execution.gathered(self.accelerator, tuple(totals)))
        return metrics_from(self.task, totals)

    def _finish(self) -> History:
        if self.passage is not None:  # a loader may have had fewer batches than it said
            self.passage.finish()
        execution.share_buffers(self.model, self.accelerator)
        if self.updates.shown is not self.model:
            self.model.load_state_dict(self.updates.shown.state_dict())
        if self.options.keep == "best" and self.record.best_weights is not None:
            self.model.load_state_dict(self.record.best_weights)
        self._draw()
        if self.record.broken:
            log.warning("%d samples could not be read and were replaced", len(self.record.broken))
        forget_statistics(self.model)
        history = self._history()
        log.info("%s", history.verdict, extra=RETURNED)
        best = history.best if self.options.keep == "best" else None
        row = best or history.epochs[-1]
        add_history(
            self.model,
            "fine-tuned",
            epochs=history.epochs[-1].epoch,
            kept=_kept_of(row, self.options.keep),
            batch_size=self.batches.batch_size,
            images=self.batches.samples,
            optimizer=self.options.optimizer,
            learning_rate=self.learning_rate,
            val_top1=row.val_top1,
            val_loss=row.val_loss,
            **self._compared(row),
        )
        return history

    def _compared(self, row: Epoch) -> dict[str, Any]:
        found = {"val_metric": row.val_metric, "passage": self.options.passage}
        for name in ("original", "start"):
            metrics = getattr(self.record, name)
            if metrics is not None:
                found[f"{name}_top1"] = or_none(metrics.top1)
                found[f"{name}_metric"] = metrics.metric
        return {key: value for key, value in found.items() if value is not None}

    # what it reports

    def _history(self) -> History:
        return History(
            epochs=tuple(self.record.epochs),
            steps=self.place.step,
            learning_rate=self.learning_rate,
            best=self.record.best,
            kept=self.options.keep or "last",
            broken=tuple(sorted(self.record.broken)),
            resumed_from=self.record.resumed_from,
            original=self.record.original,
            start=self.record.start,
        )

    def _progress(self) -> TrainingProgress:
        elapsed = time.perf_counter() - self.clock.began
        done = self.place.step - self.clock.step
        images = max(self.meter.images, 1)
        epoch, epochs, loss = self.place.epoch + 1, self.options.epochs, self.meter.loss / images
        accuracy = self.meter.hits / self.meter.judged if self.meter.judged else None
        top1 = "" if accuracy is None else f", top-1 {100 * accuracy:.1f} %"
        speed = images * self.share.world / max(self.meter.seconds, 1e-9)
        return TrainingProgress(
            done=self.place.step,
            total=self.steps,
            message=f"epoch {epoch}/{epochs}, loss {loss:.3f}{top1}, {speed:.1f} images/s",
            epoch=epoch,
            epochs=epochs,
            loss=loss,
            accuracy=accuracy,
            learning_rate=self.updates.learning_rate,
            images_per_second=speed,
            eta_seconds=elapsed / max(done, 1) * (self.steps - self.place.step),
        )

    def _record_step(self) -> None:
        now = self._progress()
        kept = ("step", "epoch", "loss", "accuracy", "learning_rate", "images_per_second")
        self.metrics_log.write("step", {name: getattr(now, name) for name in kept})

    def _draw(self) -> None:
        if self._writes() and self.job.folder is not None and self.record.epochs:
            draw_learning_curve(
                self.record.epochs,
                self.job.folder / CURVE,
                original=self.record.original,
                start=self.record.start,
                metric=self.task.metric_name,
            )
            self._draw_examples(AFTER)

    def _draw_examples(self, name: str) -> None:
        """What is true and what the model says of some validation images, as a picture."""
        if self._writes() and self.job.folder is not None and self.job.val_data is not None:
            draw_examples(self.task, self.model, self.job.val_data, self.job.folder / name)

    def _writes(self) -> bool:
        return self.job.folder is not None and bool(self.accelerator.is_main_process)

    def _open_records(self) -> None:
        options, folder = self.options, self.job.folder if self._writes() else None
        if options.track:
            facts = {k: v for k, v in options.to_json().items() if _simple(v)}
            self.accelerator.init_trackers("normswap", config=facts)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_parts(folder)
        self.metrics_log = MetricsLog(
            folder,
            step=self.place.step,
            tensorboard=options.tensorboard and "tensorboard" not in options.track,
            also=self.accelerator.log if options.track else None,
        )

    def close(self) -> None:
        """Close what is open, whatever has happened."""
        self.metrics_log.close()
        execution.unwrap(self.wrapped, self.accelerator)

    # checkpoints

    def _record_start(self) -> None:
        """What was there before the first step: epoch 0, which the others must come up to."""
        start, original = self.record.start, self.record.original
        if start is None:
            return
        self._draw_examples(BEFORE)
        known = (("start", start), ("original", original))
        scores = {f"{name}_{k}": v for name, m in known if m for k, v in m.to_json().items()}
        self.metrics_log.write("start", {"step": 0, **plain(scores)})
        row = Epoch(
            epoch=0,
            step=0,
            learning_rate=self.updates.learning_rate,
            train_loss=None,
            train_top1=None,
            val_loss=self._loss_of(start),
            val_top1=or_none(start.top1),
            val_top5=or_none(start.top5),
            seconds=0.0,
            images_per_second=None,
            val_metric=start.metric,
        )
        if self.options.keep == "best" and _better(row, None):
            self._keep_best(row)

    def _keep_best(self, row: Epoch) -> None:
        weights = self.updates.shown.state_dict()
        self.record.best = row
        if self.options.keep == "best":
            self.record.best_weights = {k: v.detach().cpu().clone() for k, v in weights.items()}
        if row.epoch:
            self._write_best(weights)

    def _write_best(self, weights: dict[str, Tensor]) -> None:
        if self._writes() and self.job.folder is not None and self.record.best is not None:
            state = {"format": FORMAT, "model": weights, "epoch": asdict(self.record.best)}
            write_checkpoint(self.job.folder / BEST, state)

    def _save(self) -> None:
        """Write all of the run, from every process, into one file."""
        if self.job.folder is not None:
            if self.record.best_weights is not None and self._starts_best():
                self._write_best(self.record.best_weights)  # not before there is a last one too
            everyone = execution.gathered(self.accelerator, self._own_state())
            if self.accelerator.is_main_process:
                write_checkpoint(self.job.folder / LAST, self.state() | {"processes": everyone})
            execution.wait_for_all(self.accelerator)  # who starts again must find this one
        self.clock.saved = time.monotonic()

    def _starts_best(self) -> bool:
        best, folder = self.record.best, self.job.folder
        return (
            best is not None and best.epoch == 0 and not (folder or Path()).joinpath(BEST).exists()
        )

    def state(self) -> dict[str, Any]:
        """What all processes have in common, as plain data."""
        return {
            "format": FORMAT,
            "options": self.options.to_json(),
            "data": self._data(),
            "identity": self.identity,
            "finished": self._ended(),
            "place": asdict(self.place),
            **self.record.state(),
            **self.updates.state(),
            "passage": None if self.passage is None else self.passage.state(),
        }

    def _own_state(self) -> dict[str, Any]:
        """What each process has for itself."""
        return {
            "rng": rng_state(),
            "norms": norm_state(self.model),
            "data": self.batches.state(),
            "meter": asdict(self.meter),
        }

    def _data(self) -> dict[str, int]:
        return {
            "samples": self.batches.samples,
            "batches": self.batches.count,
            "batch_size": self.batches.batch_size,
            "processes": self.share.world,
        }

    def _identify(self) -> dict[str, Any]:
        contents = self.options.check_data
        return {
            "training data": data_identity(self.job.train_data, contents=contents),
            "validation data": data_identity(self.job.val_data, contents=contents),
            "machine": machine_identity(self.device),
        }

    def _check_identity(self, folder: Path, then: dict[str, Any]) -> None:
        """Other data are refused; another machine goes on after one line."""
        for kind in ("training data", "validation data"):
            check_same(folder, data_changes(kind, self.identity[kind], then.get(kind)))
        say_what_is_not_known(self.identity)
        other = machine_changes(self.identity["machine"], then.get("machine"))
        if other:
            log.warning("resumed with %s: the last bits may come out otherwise", ", ".join(other))

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave, and what this process had for itself."""
        self.updates.load_state(state)
        if not isinstance(state["processes"], list) or len(state["processes"]) != self.share.world:
            raise Malformed(f"the state of other than {self.share.world} processes")
        if self.passage is not None:
            _check_passage(self.passage.state(), state["passage"])
            self.passage.load_state(state["passage"])
        own = state["processes"][self.share.rank]
        self.place, self.meter = Place(**state["place"]), Meter(**own["meter"])
        check_like(asdict(Meter()), asdict(self.meter), "meter")
        self.record = Record.from_state(state)
        self.batches.load_state(own["data"])
        load_norm_state(self.model, own["norms"])
        load_rng_state(own["rng"])

    def _check_model(self, found: dict[str, Any], folder: Path) -> None:
        try:
            check_fit(self.model.state_dict(), found["model"])
        except ValueError as error:
            raise TrainingError(
                f"resume from {folder}",
                got=f"a model that differs from the run's: {error}",
                need="the model the run was started with",
                hint="it, or another folder for a new run",
            ) from error

    def _resume(self, found: dict[str, Any]) -> None:
        """Go to where a checkpoint was written.

        Raises:
            TrainingError: other data or another model than the checkpoint's.
        """
        folder = self.job.folder or Path()
        now, then = self._data(), found["data"]
        check_same(folder, [f"{k}={now[k]} (was {then[k]})" for k in now if now[k] != then[k]])
        self._check_identity(folder, found.get("identity", {}))
        self._check_place(folder / LAST, found["place"])
        self._check_model(found, folder)
        self.load_state(found)
        self.record.resumed_from = self.place.step
        if self.options.keep == "best" and self.record.best is not None:
            best = read_checkpoint(folder / BEST)
            with reading_checkpoint(folder / BEST):
                check_fit(self.updates.shown.state_dict(), best["model"])
                self.record.best_weights = best["model"]
        log.info("resumed at step %d of %d", self.place.step, self.steps)

    def _check_place(self, path: Path, place: dict[str, int]) -> None:
        """A place that this run can come to."""
        ends = {"epoch": self.options.epochs, "batch": self.batches.count, "step": self.steps}
        for name, end in ends.items():
            if not whole(place.get(name), 0) or place[name] > end:
                raise TrainingError(
                    str(path),
                    got=f"{name}={place.get(name)}",
                    need=f"a place in the run: {name} from 0 to {end}",
                    hint="removing the file to start afresh",
                )

    def _check_agreement(self, found: dict[str, Any] | None) -> None:
        """Every process must have found the same checkpoint.

        Raises:
            TrainingError: they see different files, as on machines without a common file system.
        """
        own = None if found is None else found["place"]["step"]
        steps = execution.gathered(self.accelerator, own)
        if any(step != own for step in steps):
            raise TrainingError(
                str(self.job.folder),
                got="checkpoints of the steps " + ", ".join(map(str, steps)) + " in the processes",
                need="the same one in all of them",
                hint="a folder that all machines see",
            )


def _kept_of(row: Epoch, keep: str | None) -> str:
    """Which weights a model holds in the end."""
    when = f"epoch {row.epoch}" if row.epoch else "the start"
    return f"{keep or 'last'}, {when}"


def _simple(value: Any) -> bool:
    """Whether every tracker can take a value."""
    return isinstance(value, (int, float, str, bool))


def _numbers(loss: Tensor, right: Tensor | None) -> tuple[float, float | None]:
    """Both as numbers; one wait for the device, not two."""
    if right is None:
        return loss.item(), None
    value, hits = torch.stack([loss.detach().double(), right.double()]).tolist()
    return value, hits


def _check_passage(own: dict[str, Any], state: dict[str, Any]) -> None:
    steps, done = state["steps"], state["done"]
    if not whole(steps, 1) or not whole(done, 0, steps):
        raise Malformed(f"passage at step {done!r:.40} of {steps!r:.40}")
    sites = own["sites"] if done < steps else {}  # at its end nothing of it is left
    check_like({**own, "sites": sites}, state, "passage")


def _looked(state: Any) -> Metrics | None:
    if state is None:
        return None
    check_like(asdict(Metrics(0.0, 0.0, 0.0, 0)), state, "metrics")
    return Metrics(**state)


def _better(row: Epoch, best: Epoch | None) -> bool:
    if row.score is None or not math.isfinite(row.val_loss or 0.0) or math.isnan(row.score):
        return False
    if row.passage is not None and row.passage < 1:
        return False
    if best is None or best.score is None:
        return True
    if row.score != best.score:
        return row.score > best.score
    if row.val_loss is None or best.val_loss is None:
        return best.epoch == 0  # what comes up to the start has seen the data
    return row.val_loss < best.val_loss  # as often right, and more often sure


def _line(row: Epoch, epochs: int, metric: str) -> str:
    def scores(top1: float | None) -> str:
        return "" if top1 is None else f", top-1 {top1:.2%}"

    text = f"epoch {row.epoch}/{epochs}: loss {row.train_loss:.4f}{scores(row.train_top1)}, "
    text += f"{row.images_per_second:.1f} images/s"
    found = []
    if row.val_loss is not None:
        found.append(f"loss {row.val_loss:.4f}{scores(row.val_top1)}")
    if row.val_metric is not None:
        found.append(f"{metric} {row.val_metric:.4g}")
    return f"{text}; validation {', '.join(found)}" if found else text


def _described(images: Any) -> str:
    if isinstance(images, Tensor):
        return f"images {tuple(images.shape)} of {images.dtype}"
    return f"a list of images, the first {tuple(images[0].shape)} of {images[0].dtype}"
