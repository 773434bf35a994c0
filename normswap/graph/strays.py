"""Calls of ``batch_norm`` on activations that belong to no BatchNorm module: found, and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normswap.graph.callsites import running_place
from normswap.graph.sites import Other


class Strays:
    """Collects such calls, one entry for each place or set of statistics.

    Args:
        names: first qualified name of every module of the model.
        stored: ``id`` of each parameter and buffer → its owner and its name there.
    """

    def __init__(
        self, names: Mapping[nn.Module, str], stored: Mapping[int, tuple[nn.Module, str]]
    ) -> None:
        self._names = names
        self._stored = stored
        self.found: dict[Any, Other] = {}
        self._counts: dict[str, int] = {}

    def add(
        self, owner: nn.Module, hidden: nn.Module | None, x: Tensor, others: list[Tensor]
    ) -> None:
        """Note one call.

        Args:
            owner: the innermost module of the model that is running.
            hidden: a module that runs inside of it and that torch does not know of, or None.
            x: what is normalised.
            others: the call's other tensors.
        """
        held = [self._stored[id(t)] for t in others if id(t) in self._stored]
        tensors = tuple(f"{self._names[module]}.{name}".lstrip(".") for module, name in held)
        key = (self._names[owner], id(hidden) if hidden is not None else tensors or running_place())
        if key in self.found:
            return
        channels, rank = (x.shape[1] if x.ndim > 1 else 1), max(x.ndim - 2, 0)
        if hidden is not None:
            kind = type(hidden).__name__
            name = self._numbered(_joined(self._names[owner], _path(owner, hidden) or kind))
            reason = (
                f"a {kind} that is no submodule: a plain attribute or list holds it "
                "(an nn.ModuleList would register it)"
            )
        else:
            kind = "batch_norm"
            name = self._numbered(f"{self._names[owner]}:batch_norm")
            on = f" with {', '.join(n for _, n in held)}" if held else ""
            reason = (
                f"{type(owner).__name__} calls batch_norm itself{on}: there is no module to replace"
            )
        self.found[key] = Other(name, kind, channels, rank, reason)

    def _numbered(self, name: str) -> str:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"


def _joined(owner: str, path: str) -> str:
    return f"{owner}.{path}" if owner else path


def _path(owner: nn.Module, module: nn.Module) -> str | None:
    """How the code of ``owner`` reaches a module that hangs in one of its attributes."""
    found = (place for name, value in vars(owner).items() for place in _held(value, name))
    return next((path for path, held in found if held is module), None)


def _held(value: Any, path: str, depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _held(item, f"{path}[{index}]", depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _held(item, f"{path}[{key!r}]", depth - 1)
