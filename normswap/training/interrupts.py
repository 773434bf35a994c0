"""Ctrl-C and SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from normswap.errors import TrainingError

if TYPE_CHECKING:
    from normswap.training.records import History

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
