"""What a run stands on: accelerate, one process or several, signals, errors in plain words."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normswap.errors import TrainingError
from normswap.running import call, leaves, put_channels_last, watched
from normswap.training.options import FineTune

if TYPE_CHECKING:
    from normswap.training.records import History


@contextlib.contextmanager
def borrowed_accelerator(options: FineTune, folder: Path | None = None) -> Iterator[Any]:
    """An ``accelerate.Accelerator`` for one run, with the trackers that it asks for.

    Accelerate keeps its settings once per process. What was set before, the caller's own
    accelerator included, comes back afterwards.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState

    singletons: list[Any] = [AcceleratorState, GradientState]
    if PartialState._shared_state.get("num_processes", 1) == 1:
        singletons.append(PartialState)  # with several processes it holds the process group
    before = [(item, dict(item._shared_state)) for item in singletons]
    for item in singletons:
        item._shared_state.clear()
    try:
        on_cpu = _wants_cpu(options.device)
        _check_precision(options, on_cpu)
        check_trackers(options.track)
        with _gpu(options.device):
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision=_precision(options),
                log_with=list(options.track) or None,
                project_dir=folder,
            )
            try:
                yield accelerator
            finally:
                for tracker in accelerator.trackers:  # end_training() ends the process group too
                    tracker.finish()
    finally:
        for item, state in before:
            if not state and item is PartialState and _several(item):
                continue  # the process group that this run has opened outlives it
            item._shared_state.clear()
            item._shared_state.update(state)


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that accelerate would leave out without a word.

    Raises:
        TrainingError: one that it does not know, or that is not installed.
    """
    from accelerate import tracking

    ready = [str(item.value) for item in tracking.get_available_trackers()]
    for name in names:
        if name in ready:
            continue
        known = sorted(str(item) for item in tracking.LOGGER_TYPE_TO_CLASS)
        there = name in known
        raise TrainingError(
            "FineTune.track",
            got=f"{name!r}, which is {'not installed' if there else 'no tracker'}",
            need="one of " + ", ".join(ready if there and ready else known),
            hint=f"installing {name} (pip install {name.replace('_', '-')})"
            if there
            else "one of those, or leaving it out",
        )


def _several(state: Any) -> bool:
    return bool(state._shared_state.get("num_processes", 1) > 1)


def _wants_cpu(device: str | None) -> bool:
    if device is None:
        return not torch.accelerator.is_available()
    return usable_device(device).type == "cpu"


def _precision(options: FineTune) -> str | None:
    return options.amp or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _check_precision(options: FineTune, on_cpu: bool) -> None:
    if on_cpu and options.amp == "fp16":
        raise TrainingError(
            "FineTune.amp", got="'fp16' on the CPU", need="a GPU for it", hint="'bf16' or None"
        )


def _gpu(device: str | None) -> contextlib.AbstractContextManager[Any]:
    found = torch.device(device) if device else torch.device("cpu")
    if found.type == "cuda" and found.index is not None:
        return torch.cuda.device(found)
    return contextlib.nullcontext()


@contextlib.contextmanager
def memory_spared(model: nn.Module, options: FineTune) -> Iterator[None]:
    """Gradient checkpointing and memory format for a while, as the options ask.

    Raises:
        TrainingError: the model has no gradient checkpointing of its own.
    """
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if options.grad_checkpointing and not callable(switch):
        raise TrainingError(
            "FineTune.grad_checkpointing",
            got=f"{type(model).__name__}, which has no set_grad_checkpointing()",
            need="a model that can recompute its activations, as timm's can",
            hint="smaller images or --amp bf16 (amp='bf16') to save memory",
        )
    before = bool(getattr(model, "grad_checkpointing", False))
    try:
        if options.grad_checkpointing:
            switch(True)
        if options.channels_last:
            put_channels_last(model)
        yield
    finally:
        if options.grad_checkpointing:
            switch(before)
        if options.channels_last:
            model.to(memory_format=torch.contiguous_format)


def wrap(model: nn.Module, accelerator: Any) -> Any:
    """The model itself, or in DistributedDataParallel where there are several processes."""
    if accelerator.num_processes == 1:
        return model
    return accelerator.prepare_model(model)


def unwrap(wrapped: Any, accelerator: Any) -> None:
    """Undo what ``wrap`` did to the model inside."""
    if accelerator.num_processes > 1:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)


def synchronised(
    wrapped: Any, accelerator: Any, now: bool
) -> contextlib.AbstractContextManager[Any]:
    """Average gradients over the processes only in the last forward before an update."""
    if now or accelerator.num_processes == 1:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any] = accelerator.no_sync(wrapped)
    return found


def any_of(accelerator: Any, *flags: bool) -> tuple[bool, ...]:
    """Each flag as soon as one process has raised it, so that all do the same."""
    if accelerator.num_processes == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return tuple(bool(item) for item in accelerator.reduce(raised, "sum").tolist())


def added_up(accelerator: Any, numbers: list[float]) -> list[float]:
    """Sums over the processes."""
    if accelerator.num_processes == 1:
        return numbers
    mine = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    summed: list[float] = accelerator.reduce(mine, "sum").tolist()
    return summed


def gathered(accelerator: Any, item: Any) -> list[Any]:
    """One piece of plain data from every process."""
    if accelerator.num_processes == 1:
        return [item]
    buffer = io.BytesIO()
    torch.save(item, buffer)  # as bytes: all_gather_object cannot pickle every tensor
    found: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, buffer.getvalue())
    return [torch.load(io.BytesIO(part), weights_only=True) for part in found]


def wait_for_all(accelerator: Any) -> None:
    """Go on when every process has come here."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()


def share_buffers(model: nn.Module, accelerator: Any) -> None:
    """Give every process the running statistics of the first one."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(TrainingError):  # noqa: N818  (like KeyboardInterrupt: no error)
    """A run that was asked to stop and did, after the step it was in.

    Attributes:
        history: what had been done by then; ``history.interrupted`` names the signal.
    """

    history: History | None = None


class StopRequest:
    """Whether a signal has asked the run to stop, and which."""

    name: str | None = None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal; a second Ctrl-C stops at once."""
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request for a while.

    Only the main thread may set signal handlers; elsewhere the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_ONE_VALUE = "expected more than 1 value per channel"


def first_non_finite(model: nn.Module, images: Any) -> str:
    """Where infinite or undefined numbers first appear in a forward, in words.

    Runs one forward in the model's present mode; running statistics are put back.
    """
    if not all(torch.isfinite(leaf).all() for leaf in leaves(images)):
        return "the input images"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name}"
    found: list[str] = []

    def see(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
            kind = type(model.get_submodule(name)).__name__
            found.append(f"{name or 'the model'} ({kind})")

    with watched(model, see), _buffers_kept(model), torch.no_grad():
        call(model, images)
    return f"the output of {found[0]}" if found else "the loss itself; every layer is finite"


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextlib.contextmanager
def explained(batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn torch's errors about memory and batches of one into ones that say what to do."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        text = str(error).lower()
        if is_out_of_memory(error):
            raise _out_of_memory(batch_size, device) from error
        if _ONE_VALUE in text:
            raise _one_value(batch_size, str(error)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of torch's says."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY)


def _out_of_memory(batch_size: int, device: torch.device) -> TrainingError:
    return TrainingError(
        str(device),
        got=f"out of memory at batch_size={batch_size}",
        need="memory for the activations of one batch",
        hint="a smaller --batch-size (batch_size), smaller images, --grad-accum "
        "(gradient_accumulation) to make up for it, --amp bf16 (amp='bf16'), or "
        "--grad-checkpointing (timm: model.set_grad_checkpointing())",
    )


def _one_value(batch_size: int, text: str) -> TrainingError:
    return TrainingError(
        "BatchNorm",
        got=f"one value per channel at batch_size={batch_size} ({text})",
        need="several values to take a variance of",
        hint="--batch-size 2 (batch_size=2), or converting to gn, frn, brn or cbn",
    )


def usable_device(device: str | torch.device) -> torch.device:
    """The device by that name, if this machine has it.

    Raises:
        TrainingError: it does not.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        present = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        raise TrainingError(
            "device",
            got=repr(str(device)),
            need="a device of this machine",
            hint=f"{str(present)!r}",
        ) from error
    return found
