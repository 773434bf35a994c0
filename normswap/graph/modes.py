"""Whether a module can run other operations in training than in eval mode.

Read off the code: what never reads ``training`` cannot depend on it. Dropout reads it, but is
recorded as the same call in both modes.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from normswap.graph.callsites import MethodSource, method_source
from normswap.graph.norms import is_batchnorm

_DROPOUTS = frozenset(
    f"{home}.{name}"
    for home in ("F", "functional", "nn.functional", "torch.nn.functional", "torch")
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
)

_FUNCTIONS = (FunctionType, MethodType)
_EMPTY = CellType()


def any_depends_on_mode(modules: Iterable[nn.Module]) -> bool:
    """Whether any of a model's modules, the BatchNorms apart, may depend on the mode.

    Hooks and methods set on an instance may do anything, so they count as a yes.
    """
    others = [module for module in modules if not is_batchnorm(module)]
    classes = {type(module) for module in others}
    return any(class_depends_on_mode(c) for c in classes) or any(map(_is_patched, others))


def _is_patched(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    held = [(n, v) for n, v in vars(module).items() if isinstance(v, _FUNCTIONS)]
    return any(hasattr(type(module), name) for name, _ in held) or any(
        _any_depends(type(module), f) for _, f in held if isinstance(f, FunctionType)
    )


def class_depends_on_mode(cls: type[nn.Module]) -> bool:
    """Whether ``forward``, or a function that it calls by name, torch's own apart, may do so."""
    known: Any = cls
    if issubclass(cls, torch.jit.ScriptModule):
        return True  # its code is not Python's
    return _class_depends_on_mode(known, cls.forward, cls.train)


@functools.cache
def _class_depends_on_mode(cls: type[nn.Module], forward: object, train: object) -> bool:
    # the methods are arguments because somebody may put others in their place
    if train is not nn.Module.train or not isinstance(forward, FunctionType):
        return True
    return _any_depends(cls, forward)


def _any_depends(cls: type[nn.Module], start: FunctionType) -> bool:
    seen: set[FunctionType] = set()  # not their code: all that one decorator wraps share it
    waiting = [start]
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        waiting += _enclosed(function)
        if _is_torch(function.__module__):
            continue
        if _depends_on_mode(function):
            return True
        for name in _names(function.__code__):
            waiting += _functions(function.__globals__.get(name))
            for ancestor in cls.__mro__:  # all of them: super() may be called
                waiting += _functions(vars(ancestor).get(name))
    return False


def _functions(found: Any) -> list[FunctionType]:
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, staticmethod | classmethod):
        found = found.__func__
    return [found] if isinstance(found, FunctionType) else []


def _enclosed(function: FunctionType) -> list[FunctionType]:
    """The functions that a decorator has put ``function`` around."""
    cells = (cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY)
    return [found for cell in cells for found in _functions(cell)]


def _is_torch(module: str | None) -> bool:
    return module is not None and (module == "torch" or module.startswith("torch."))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif constant == "training":  # getattr(self, "training")
            yield constant


def _depends_on_mode(function: FunctionType) -> bool:
    if "training" not in _names(function.__code__):
        return False
    source = method_source(function)
    return source is None or _reads_mode(source)


def _reads_mode(source: MethodSource) -> bool:
    """Whether ``training`` is read for anything but to hand it to a dropout."""
    harmless = {
        id(argument)
        for call in source.calls.values()
        if ast.unparse(call.func) in _DROPOUTS
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
    }
    readers = (
        node
        for node in ast.walk(source.definition)
        if (isinstance(node, ast.Attribute) and node.attr == "training")
        or (isinstance(node, ast.Constant) and node.value == "training")
    )
    return any(id(node) not in harmless for node in readers)
