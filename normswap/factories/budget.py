"""A model that a file asks for is no larger than what the file holds for it.

A record of a hundred bytes may ask for a million blocks, or for a head of a billion classes. The
weights beside it say how large the model is: building stops as soon as it is several times larger,
before the memory is filled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from normswap.errors import SpecError

_TIMES, _NUMBERS = 4, 1 << 22
"""Some architectures build parts that they drop again, or register tied weights twice."""
_MODULES_EACH, _MODULES = 64, 4096
"""Many modules have no tensors: activations, dropout, containers."""


@contextlib.contextmanager
def no_larger_than(tensors: Collection[Tensor]) -> Iterator[None]:
    """Meanwhile building a model that could not hold these tensors alone is an error.

    Args:
        tensors: the weights that it is built for.

    Raises:
        SpecError: the model under construction is too large for them.
    """
    numbers = _TIMES * sum(tensor.numel() for tensor in tensors) + _NUMBERS
    modules = _MODULES_EACH * len(tensors) + _MODULES
    left = {"numbers": numbers, "modules": modules}

    def take(what: str, count: int) -> None:
        left[what] -= count
        if left[what] < 0:
            raise SpecError(
                "source",
                got="a record of a model far larger than the weights beside it",
                need=f"one of at most {numbers:,} numbers in {modules:,} modules",
                hint="copying the artefact again, or asking its author for it",
            )

    def tensor_registered(_owner: nn.Module, _name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, _UNINITIALISED):
            take("numbers", value.numel())

    def module_registered(_owner: nn.Module, _name: str, _module: nn.Module | None) -> None:
        take("modules", 1)

    with contextlib.ExitStack() as stack:
        for register, hook in (
            (register_module_parameter_registration_hook, tensor_registered),
            (register_module_buffer_registration_hook, tensor_registered),
            (register_module_module_registration_hook, module_registered),
        ):
            stack.callback(register(hook).remove)
        yield


_UNINITIALISED = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
