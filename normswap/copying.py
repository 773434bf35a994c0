"""Copies of models: whatever a model keeps of its last forward is no obstacle.

``copy.deepcopy`` refuses tensors that hang in a graph of gradients. Models hold such tensors after
an ordinary forward: a feature kept for a loss, a cache of attention biases, the weight that an
old-style ``weight_norm`` computes. Their values are copied, their history is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import SwapError, in_short

Model = TypeVar("Model", bound=nn.Module)


class _ValuesOnly(TorchFunctionMode):
    """Within it, ``deepcopy`` takes of a tensor with a history its value."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def values_only() -> AbstractContextManager[Any]:
    """A context in which others may ``deepcopy`` a model that has run."""
    return _ValuesOnly()


def copied(model: Model) -> Model:
    """A deep copy of a model that may have run before.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy. Tensors that were computed with gradients are detached in it.

    Raises:
        SwapError: it holds something that Python cannot copy.

    Example:
        >>> import torch
        >>> net = torch.nn.utils.spectral_norm(nn.Linear(2, 2))
        >>> _ = net(torch.zeros(1, 2))
        >>> copied(net).weight.requires_grad
        False
    """
    try:
        with _ValuesOnly():
            return copy.deepcopy(model)
    except Exception as error:
        raise SwapError(
            "the model",
            got=f"a part that cannot be copied ({type(error).__name__}: {in_short(error)})",
            need="a model that copy.deepcopy can copy",
            hint="taking locks, files, generators and the like out of its attributes",
        ) from error


def forget_history(*models: nn.Module) -> None:
    """Detach what models keep of earlier forwards, in place: its values stay as they are.

    A cache that was filled with gradients on could be differentiated through once, and never again.

    Args:
        models: any modules. Tensors in their attributes count, and in lists and dicts there.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> net.feature = net(torch.zeros(1, 2))
        >>> forget_history(net)
        >>> net.feature.requires_grad
        False
    """
    for model in models:
        for module in model.modules():
            _detach_in(vars(module), set(module._parameters) | {"_parameters", "_modules"})


def _detach_in(held: dict[Any, Any], passed_over: Collection[Any] = (), depth: int = 4) -> None:
    for key, value in list(held.items()):
        if key in passed_over:
            continue
        if isinstance(value, Tensor) and value.grad_fn is not None:
            held[key] = value.detach()
        elif depth and isinstance(value, dict):
            _detach_in(value, depth=depth - 1)
        elif depth and isinstance(value, list):
            items = dict(enumerate(value))
            _detach_in(items, depth=depth - 1)
            value[:] = items.values()
