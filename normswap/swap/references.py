"""Put a module in another's place, wherever the model refers to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.swap.journal import Journal

_MACHINERY = frozenset(vars(nn.Module()))


def replace_everywhere(
    model: nn.Module, replacements: dict[nn.Module, nn.Module], journal: Journal
) -> nn.Module:
    """Replace modules under all their names, and in plain attributes, lists, tuples and dicts.

    Returns:
        The model: another object only if the root itself was replaced.
    """
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in replacements:
                journal.put(parent._modules, key, replacements[child])
        for key, value in list(vars(parent).items()):
            if key not in _MACHINERY:
                _replace_in_attribute(vars(parent), key, value, replacements, journal)
    return replacements.get(model, model)


def _replace_in_attribute(
    attributes: dict[str, Any],
    key: str,
    value: Any,
    replacements: dict[nn.Module, nn.Module],
    journal: Journal,
) -> None:
    def new(item: Any) -> Any:
        return replacements.get(item, item) if isinstance(item, nn.Module) else item

    def stale(items: Iterable[Any]) -> bool:
        return any(new(item) is not item for item in items)

    if isinstance(value, nn.Module) and stale([value]):
        journal.put(attributes, key, new(value))
    elif isinstance(value, list) and stale(value):
        journal.put_all(value, [new(item) for item in value])
    elif type(value) is tuple and stale(value):
        journal.put(attributes, key, tuple(new(item) for item in value))
    elif isinstance(value, dict) and stale(value.values()):
        for name, item in list(value.items()):
            journal.put(value, name, new(item))


def put_at(model: nn.Module, name: str, module: nn.Module, journal: Journal) -> None:
    """Register ``module`` under one qualified name, in the place of what is there."""
    parent_name, _, key = name.rpartition(".")
    journal.put(model.get_submodule(parent_name)._modules, key, module)
