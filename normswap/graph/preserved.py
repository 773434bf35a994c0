"""Run somebody's model and leave no trace: modes, attributes, hooks, buffers and RNG come back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _copied_containers(values: Iterable[Any], depth: int = 4) -> list[tuple[Any, Any]]:
    """Every dict, list and set among ``values`` and inside them, with a shallow copy of each."""
    found: list[tuple[Any, Any]] = []
    for value in values if depth else ():
        if isinstance(value, dict | list | set):
            found.append((value, value.copy()))
            inner = value.values() if isinstance(value, dict) else value
            found += _copied_containers(inner, depth - 1)
    return found


def _restore_container(container: Any, saved: Any) -> None:
    if isinstance(container, list):
        container[:] = saved
    else:
        container.clear()
        container.update(saved)


def _same(container: Any, saved: Any) -> bool:
    """Same members in the same places, compared by identity (``==`` on tensors is no bool)."""
    if len(container) != len(saved):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), saved.items(), strict=True)
        return all(k is j and v is w for (k, v), (j, w) in pairs)
    if isinstance(container, list):
        return all(v is w for v, w in zip(container, saved, strict=True))
    return bool(container == saved)


@contextmanager
def preserved(modules: Sequence[nn.Module], *, values: bool) -> Iterator[None]:
    """Restore every attribute, mode and RNG state of ``modules`` on exit, also after an exception.

    Args:
        modules: all modules of a model.
        values: also copy and restore the values of all buffers. Needed where the model runs on
            its own tensors; on the meta device nothing can change them.
    """
    attributes = [dict(vars(module)) for module in modules]
    modes = [(module, module.training) for module in modules]
    every = [v for held in attributes for v in held.values() if isinstance(v, dict | list | set)]
    empty = [container for container in every if not container]  # most: dictionaries of hooks
    containers = _copied_containers([container for container in every if container])
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    gradients = [(p, p.requires_grad) for p in parameters]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None] if values else []
    copies = [(b, b.detach().clone()) for b in buffers]
    python_rng = random.getstate()
    devices = sorted({t.device.index for t in parameters if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, plain in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(plain)
            _restore_modes(modes)
            for container in empty:
                if container:
                    container.clear()
            for container, saved in containers:
                if not _same(container, saved):
                    _restore_container(container, saved)
            _restore_values(copies)
            for parameter, wanted in gradients:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)
            random.setstate(python_rng)


def _restore_modes(saved: list[tuple[nn.Module, bool]]) -> None:
    for module, training in saved:
        if module.training != training:  # TorchScript's: no attribute of Python's
            module.training = training


def _restore_values(saved: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)
