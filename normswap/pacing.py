"""A long call's time: what is left of it, when to end whatever runs, and threads that do not help.

Two threads of one program wait for each other after every small operation, and do so spinning. On a
machine that others use too, one of them mostly waits for its turn: a step that takes one thread
0.05 s was seen to take two of them 6.7 s. So a caller of a time to hold looks whether one thread is
faster, and takes that one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

import torch

_MORE, _ONCE = 1.5, 5.0
"""What a time asked for may be exceeded by: this factor, and seconds for what is done once."""
_SLOWER = 3.0
"""More threads are left aside if they take so many times longer than one."""


class OutOfTimeError(Exception):
    """Whoever looked at the clock should have ended."""


class Budget:
    """A time that was asked for, and what it is spent on.

    Args:
        seconds: asked for.
        clock: what they are read from.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds, self.clock, self.begun = seconds, clock, clock()
        self.stages: dict[str, float] = {}
        self.stage = ""
        self._opened = self.begun

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self.clock() - self.begun

    @property
    def left(self) -> float:
        """Of what was asked for; below 0 beyond it."""
        return self.seconds - self.spent

    @property
    def at_most(self) -> float:
        """Seconds until whatever runs has to end."""
        return _MORE * self.seconds + _ONCE - self.spent

    def enter(self, stage: str) -> None:
        """What the time is spent on from now on."""
        now = self.clock()
        if self.stage:
            self.stages[self.stage] = self.stages.get(self.stage, 0.0) + now - self._opened
        self.stage, self._opened = stage, now

    def ending(self, seconds: float) -> Callable[[], float]:
        """A clock that raises :class:`OutOfTimeError` when it is read after so many seconds."""
        until = self.clock() + min(seconds, self.at_most)

        def read() -> float:
            now = self.clock()
            if now > until:
                raise OutOfTimeError
            return now

        return read

    @property
    def over(self) -> str:
        """A sentence where it took longer than was asked for, and what did; else nothing."""
        self.enter(self.stage)
        if self.spent <= 1.1 * self.seconds + 1 or not self.stages:
            return ""
        longest = max(self.stages, key=lambda stage: self.stages[stage])
        return (
            f"It took {self.spent:.0f} s and not the {self.seconds:g} s asked for: "
            f"single steps are too slow here to end sooner; {longest} took "
            f"{self.stages[longest]:.0f} s."
        )


class Threads(AbstractContextManager["Threads"]):
    """As many of torch's threads as help; afterwards as many as before.

    Args:
        clock: to compare with.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._before = clock, torch.get_num_threads()
        self.slower: float | None = None
        """How many times longer they took, where they were left aside."""

    def look(self, run: Callable[[], object], enough: float) -> float:
        """Time a short piece of work, and go on with one thread where that is much faster.

        Args:
            run: the piece.
            enough: a first run that takes longer is not repeated.

        Returns:
            Seconds that it takes from now on.
        """
        seconds = self._timed(run)
        if seconds <= enough:  # the first run of all is slower for other reasons
            seconds = self._timed(run)
        if torch.get_num_threads() == 1:
            return seconds
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = self._timed(run)
        if seconds > _SLOWER * alone:
            self.slower = seconds / max(alone, 1e-9)
            return alone
        torch.set_num_threads(threads)
        return seconds

    def _timed(self, run: Callable[[], object]) -> float:
        begun = self._clock()
        run()
        return self._clock() - begun

    @property
    def note(self) -> str:
        """A sentence where threads were left aside; else nothing."""
        if self.slower is None:
            return ""
        return (
            f"Measured with one thread: {self._before} threads took {self.slower:.0f} times as "
            "long, as where other programs use the cores. OMP_NUM_THREADS=1 does the same for "
            "other commands."
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.set_num_threads(self._before)
