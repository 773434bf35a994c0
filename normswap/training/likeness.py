"""Whether state from a file has the form of this run's own, before anything takes it over.

``load_state_dict`` of schedulers and optimizers takes whatever it is given, and what does not fit
comes to light updates later, far from the file that is at fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from normswap.reading import Malformed


def check_like(mine: Any, theirs: Any, name: str) -> None:
    """Raise unless ``theirs`` has the keys, types and shapes of ``mine``.

    Args:
        mine: state of this run, of mappings, lists, tensors, numbers and text.
        theirs: what a file holds in its place.
        name: of the state, for the error.

    Raises:
        Malformed: the first difference.
    """
    if isinstance(mine, Mapping):
        _require(isinstance(theirs, Mapping) and mine.keys() == theirs.keys(), name, theirs)
        for key in mine:
            check_like(mine[key], theirs[key], f"{name}.{key}")
    elif isinstance(mine, list | tuple):
        _require(isinstance(theirs, list | tuple) and len(mine) == len(theirs), name, theirs)
        for index, (own, other) in enumerate(zip(mine, theirs, strict=True)):
            check_like(own, other, f"{name}[{index}]")
    elif isinstance(mine, Tensor):
        _require(_same_tensor(mine, theirs), name, theirs)
    else:
        _require(_same_kind(mine, theirs), name, theirs)


def _same_tensor(mine: Tensor, theirs: Any) -> bool:
    fits = isinstance(theirs, Tensor) and theirs.shape == mine.shape
    return fits and theirs.dtype == mine.dtype


def _same_kind(mine: Any, theirs: Any) -> bool:
    number = isinstance(theirs, int | float) and not isinstance(theirs, bool)
    if mine is None:  # what is not known yet may have become a number
        return theirs is None or number
    if isinstance(mine, float):
        return number
    return type(mine) is type(theirs)


def check_optimizer_state(groups: Any, state: Any, parameters: list[Tensor]) -> None:
    """Raise unless what an optimizer remembers of each parameter fits that parameter.

    Args:
        groups: the file's ``param_groups``, whose numbers of parameters are known to be right.
        state: the file's ``state``: parameter number → name → tensor, number or a list of them.
        parameters: those of the optimizer, in the order of the groups.

    Raises:
        Malformed: a tensor that belongs to another parameter, or what is no such state.
    """
    order = [number for group in groups for number in group["params"]]
    _require(order == list(range(len(parameters))), "optimizer.params", order)
    _require(isinstance(state, Mapping) and set(state) <= set(order), "optimizer.state", state)
    shaped = {key for n, own in state.items() for key in own if _shaped(own[key], parameters[n])}
    for number, own in state.items():
        for key, value in own.items():
            name = f"optimizer.state[{number}].{key}"
            _require(_is_plain(value) and (key != "step" or _counts(value)), name, value)
            # factored optimizers keep smaller tensors, but then of every parameter
            _require(key not in shaped or _shaped(value, parameters[number]), name, value)


def _shaped(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _counts(value: Any) -> bool:
    """Whether it is a number of steps; powers of what is below 0 divide by zero later."""
    single = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
    return single and 0 <= float(value) < math.inf


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor | int | float | str | type(None))


def _require(fine: bool, name: str, got: Any) -> None:
    if not fine:
        shown = tuple(got.shape) if isinstance(got, Tensor) else got
        raise Malformed(f"{name} is {shown!r:.60}")
