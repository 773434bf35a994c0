"""``train()`` and ``eval()`` are called by name: only where they mean what torch means by them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from normswap.errors import WalkError


def refuse_other_meanings(model: nn.Module) -> None:
    """Raise if a class in the model has given ``train`` or ``eval`` another meaning.

    ultralytics' ``YOLO`` starts a training run there. A method that only does more than torch's
    own (freezes a part, clears a cache) takes the mode and is fine.

    Raises:
        WalkError: naming the method, and the attribute that holds the network if there is one.
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    odd = {cls for cls in kinds if _other_meaning(cls, cls.train, cls.eval) is not None}
    for name, module in model.named_modules() if odd else ():
        cls: Any = type(module)
        if cls in odd:
            method = _other_meaning(cls, cls.train, cls.eval)
            raise WalkError(
                name or "the model",
                got=f"a {cls.__name__}, whose {method} is a method of its own",
                need="the network itself, whose train() and eval() set the mode",
                hint=_inside(name, module),
            )


@functools.cache
def _other_meaning(cls: type[nn.Module], train: Any, evaluate: Any) -> str | None:
    # the methods are arguments because somebody may put others in their place
    del cls
    if train is not nn.Module.train and not _takes_mode(train):
        return f"train{inspect.signature(train)}".replace("(self, ", "(").replace("(self)", "()")
    if evaluate is not nn.Module.eval and not _takes_nothing(evaluate):
        return f"eval{inspect.signature(evaluate)}".replace("(self, ", "(")
    return None


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(method).parameters.values())[1:]


def _takes_mode(method: Callable[..., Any]) -> bool:
    """Whether the first argument is a mode: True or False, or one of any number."""
    found = _parameters(method)
    if not found:
        return False
    first = found[0]
    if first.kind in (first.VAR_POSITIONAL, first.POSITIONAL_ONLY) or first.name == "mode":
        return True
    return isinstance(first.default, bool) or first.annotation in (bool, "bool")


def _takes_nothing(method: Callable[..., Any]) -> bool:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in variable for p in _parameters(method))


def _inside(name: str, module: nn.Module) -> str:
    """Where the network is: the child with most parameters."""
    sizes = {
        key: sum(p.numel() for p in child.parameters()) for key, child in module.named_children()
    }
    if not sizes:
        return "the module that it runs"
    largest = max(sizes, key=lambda key: sizes[key])
    return f"its attribute {largest}: {'.'.join(filter(None, ('model', name, largest)))}"
