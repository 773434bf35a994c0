"""Run somebody's model and leave no trace: modes, attributes, hooks, buffers and RNG come back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
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
def preserved(model: nn.Module, *, values: bool) -> Iterator[None]:
    """Restore every attribute, mode and RNG state of ``model`` on exit, also after an exception.

    Args:
        model: any module.
        values: also copy and restore the values of all buffers. Needed where the model runs on
            its own tensors; on the meta device nothing can change them.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    containers = _copied_containers([v for module in modules for v in vars(module).values()])
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if values else []
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    python_rng = random.getstate()
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, plain in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(plain)
            for container, saved in containers:
                if not _same(container, saved):
                    _restore_container(container, saved)
            _restore_values(buffers)
            for parameter, wanted in gradients:
                parameter.requires_grad_(wanted)
            random.setstate(python_rng)


def _restore_values(saved: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)
