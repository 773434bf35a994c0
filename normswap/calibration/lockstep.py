"""Forward passes of two models side by side, that wait for each other at every site.

A batch is cut into lanes. Each lane is one forward pass in a thread of its own, of which only one
runs at any time; it stops where it is told to and goes on when told to, with another value if there
is one. So what a layer is to become can be computed from all images, of both models, before any of
them goes through it, for models of any form, and a layer is run once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph import call

Stop = tuple[str, str]
"""What happens there (``before``, ``after``) and the name of the module."""

_running = threading.local()


class _Abandoned(BaseException):
    """Ends a pass that nobody waits for any more."""


class Lane:
    """One forward pass that waits at every watched module."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model, self._batch = model, batch
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = self._over = self._abandoned = False
        self._error: BaseException | None = None
        self._at: tuple[Stop, Tensor] | None = None
        self._instead: Tensor | None = None

    def _run(self) -> None:
        self._go.acquire()
        _running.lane = self
        try:
            if not self._abandoned:
                torch.set_num_threads(self._threads)
                with torch.no_grad():  # the mode belongs to the thread
                    call(self._model, self._batch)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the lane is driven
            self._error = error
        self._over, self._at = True, None
        self._came.release()

    def wait(self, stop: Stop, value: Tensor) -> Tensor | None:
        """Called inside the pass: say where it is, and what to go on with instead of ``value``."""
        self._at = stop, value
        del value
        self._came.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        instead, self._instead, self._at = self._instead, None, None
        return instead

    def advance(self, instead: Tensor | None = None) -> tuple[Stop, Tensor] | None:
        """Go on until the next stop; None at the end of the pass."""
        self._instead, self._at = instead, None
        if not self._started:
            self._started = True
            self._thread.start()
        self._go.release()
        self._came.acquire()
        if self._error is not None:
            raise self._error
        return self._at

    def close(self) -> None:
        """End the pass wherever it is."""
        if self._started and not self._over:
            self._abandoned = True
            self._go.release()
            self._thread.join()


def stop_before(name: str) -> Any:
    """A forward pre-hook (with keyword arguments) that stops the lane with the module's input."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lane = getattr(_running, "lane", None)
        if lane is None:
            return None
        instead = lane.wait(("before", name), args[0] if args else next(iter(kwargs.values())))
        return None if instead is None else ((instead,), {})

    return hook


def stop_after(name: str) -> Any:
    """A forward hook that stops the lane with the module's output."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        lane = getattr(_running, "lane", None)
        if lane is not None:
            lane.wait(("after", name), output)

    return hook


class Ahead:
    """Lanes of the original, that run ahead until they have what is asked for."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes
        self._kept: list[dict[Stop, Tensor]] = [{} for _ in lanes]

    def take(self, stop: Stop) -> list[Tensor] | None:
        """What every lane has at ``stop``, and forget it; None if one never gets there."""
        found = [self._fetch(index, stop) for index in range(len(self._lanes))]
        return (
            None if any(value is None for value in found) else [v for v in found if v is not None]
        )

    def _fetch(self, index: int, stop: Stop) -> Tensor | None:
        kept = self._kept[index]
        while stop not in kept:
            at = self._lanes[index].advance()
            if at is None:
                return None
            kept[at[0]] = at[1]
        return kept.pop(stop)


@contextmanager
def lanes(model: nn.Module, batches: list[Any]) -> Iterator[list[Lane]]:
    """One lane per batch; all of them have ended afterwards."""
    found = [Lane(model, batch) for batch in batches]
    try:
        yield found
    finally:
        for lane in found:
            lane.close()


def stops(found: list[Lane]) -> Iterator[tuple[Stop, list[Tensor], list[Tensor]]]:
    """Walk all lanes from stop to stop: where they are, their values, and what to go on with.

    Whoever iterates writes the values to go on with into the last list, or leaves it empty.
    """
    instead: list[Tensor] = []
    while True:
        ats = [lane.advance(instead[i] if instead else None) for i, lane in enumerate(found)]
        here = [at for at in ats if at is not None]
        if len(here) < len(found) or len({at[0] for at in here}) > 1:
            return  # the end, or passes that went different ways
        instead = []
        values = [at[1] for at in here]
        stop = here[0][0]
        del ats, here
        yield stop, values, instead
        values.clear()
