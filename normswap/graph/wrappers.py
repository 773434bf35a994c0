"""Models whose modules are hidden behind a wrapper: refused with the advice that fits."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from normswap.errors import WalkError
from normswap.graph import norms
from normswap.modes import refuse_other_meanings

_WRAPPERS = {
    "DistributedDataParallel": "convert the module inside it before wrapping it",
    "FullyShardedDataParallel": "convert the model before sharding it",
    "DataParallel": "convert the module inside it (model.module)",
    "OptimizedModule": "convert the original model, then torch.compile the result",
    "ScriptModule": "convert the Python model, then script the result",
    "RecursiveScriptModule": "convert the Python model, then script the result",
}
_CODE = ("OptimizedModule", "ScriptModule", "RecursiveScriptModule")
"""Wrappers of code: a part of a model that holds no norm may be one."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if the model, or a part of it that holds a norm, is wrapped so that it is hidden.

    Raises:
        WalkError: with the advice that fits the wrapper; also for lazy modules without parameters,
            and for models whose ``train`` or ``eval`` means something else.
    """
    if not isinstance(model, nn.Module):
        raise WalkError(
            "the model",
            got=f"a {type(model).__name__}",
            need="a torch.nn.Module",
            hint="normswap.load_model(name).model for a model by name",
        )
    refuse_other_meanings(model)
    for name, module in model.named_modules():
        norms.check_initialised(module, name)
        wrapper = _wrapper_of(module)
        apart = name and wrapper in _CODE and not _holds_norm(module)
        if wrapper is not None and not apart:
            kind = type(module).__name__
            raise WalkError(
                name or "the model",
                got=f"a {wrapper}" + ("" if kind == wrapper else f" ({kind})"),
                need="a plain eager module",
                hint=f"to {_WRAPPERS[wrapper]}",
            )


def eagerly(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """A context in which compiled parts run as they were written: nothing is compiled anew."""
    if any(_wrapper_of(module) == "OptimizedModule" for module in modules):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def _wrapper_of(module: nn.Module) -> str | None:
    cls: Any = type(module)
    found = _wrapper(cls)
    if found is None and getattr(module, "_compiled_call_impl", None) is not None:
        return "OptimizedModule"  # compiled in place by Module.compile
    return found


@functools.cache
def _wrapper(cls: type[nn.Module]) -> str | None:
    known = (c for c in cls.__mro__ if c.__name__ in _WRAPPERS and c.__module__.startswith("torch"))
    return next((c.__name__ for c in known), None)


def _holds_norm(module: nn.Module) -> bool:
    """Whether a module has a BatchNorm anywhere inside, as a module or in its compiled code."""
    if isinstance(module, torch.jit.ScriptModule):
        return "batch_norm" in str(module.inlined_graph)
    return any(norms.is_batchnorm(part) for part in module.modules())
