"""How far a long call has come: what every ``progress=`` callable is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Handed to the ``progress`` callable of whatever takes long.

    Attributes:
        done: so much of the total is done.
        total: in the same unit (updates, images, cells, or 1 for shares); None: not known.
        message: what is known by now, in a few words.

    Example:
        >>> def show(now: Progress) -> None:
        ...     print(f"{now.share:.0%} {now.message}")
        >>> show(Progress(1, 4, "loss 0.3"))
        25% loss 0.3
    """

    done: float
    total: float | None
    message: str = ""

    @property
    def share(self) -> float:
        """How much of the total is done, from 0 to 1; 0 where the total is not known."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


ProgressCallback = Callable[[Progress], None]
