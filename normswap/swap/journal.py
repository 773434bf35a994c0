"""Changes that can be taken back, so that a swap happens as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any

_ABSENT = object()


class Journal:
    """Remembers how to undo every change; a block that raises leaves everything as it was.

    Dictionaries are changed directly, not through ``setattr``: nothing a model overrides can get
    in between, and undoing restores values and order alike.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            while self._undo:
                self._undo.pop()()

    def on_undo(self, action: Callable[[], object]) -> None:
        """Call ``action`` if the block fails."""
        self._undo.append(action)

    def put(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """``mapping[key] = value``."""
        old = mapping.get(key, _ABSENT)
        if old is _ABSENT:
            self.on_undo(lambda: mapping.pop(key, None))
        else:
            self.on_undo(lambda: mapping.__setitem__(key, old))
        mapping[key] = value

    def put_all(self, items: list[Any], values: list[Any]) -> None:
        """``items[:] = values``, the list object staying the same."""
        old = list(items)
        self.on_undo(lambda: items.__setitem__(slice(None), old))
        items[:] = values

    def reclass(self, thing: Any, cls: type) -> None:
        """``thing.__class__ = cls``."""
        old = type(thing)
        self.on_undo(lambda: setattr(thing, "__class__", old))
        thing.__class__ = cls
