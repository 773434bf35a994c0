"""Put a module in another's place, wherever the model refers to it."""

from __future__ import annotations

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
    key: Any,
    value: Any,
    replacements: dict[nn.Module, nn.Module],
    journal: Journal,
    depth: int = 4,
) -> None:
    """Replace modules in a plain attribute: itself, or inside lists, tuples and dicts."""
    if isinstance(value, nn.Module):
        if value in replacements:
            journal.put(attributes, key, replacements[value])
    elif depth and isinstance(value, dict):
        for name, item in list(value.items()):
            _replace_in_attribute(value, name, item, replacements, journal, depth - 1)
    elif depth and isinstance(value, list | tuple):
        items: dict[Any, Any] = dict(enumerate(value))
        for index, item in enumerate(value):
            _replace_in_attribute(items, index, item, replacements, journal, depth - 1)
        if any(items[index] is not item for index, item in enumerate(value)):
            _put_sequence(attributes, key, value, list(items.values()), journal)


def _put_sequence(
    attributes: dict[str, Any],
    key: Any,
    old: list[Any] | tuple[Any, ...],
    new: list[Any],
    journal: Journal,
) -> None:
    if isinstance(old, list):
        journal.put_all(old, new)
    else:
        named = hasattr(old, "_fields")
        journal.put(attributes, key, type(old)(*new) if named else tuple(new))


def put_at(model: nn.Module, name: str, module: nn.Module, journal: Journal) -> None:
    """Register ``module`` under one qualified name, in the place of what is there."""
    parent_name, _, key = name.rpartition(".")
    journal.put(model.get_submodule(parent_name)._modules, key, module)
