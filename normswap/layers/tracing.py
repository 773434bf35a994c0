"""What keeps a layer in one piece under ``torch.fx``.

A tracer runs ``forward`` with a stand-in for the tensor, which cannot answer what a layer asks
about shapes, and would bake the mode of the moment in. Torch's own layers are single nodes to it;
these are as well. TorchScript reads the source instead: there a layer has its eval form alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
"""Whether it is TorchScript that reads this; to its compiler a constant."""


def is_stand_in(x: Any) -> bool:
    """Whether ``x`` stands for a tensor while ``torch.fx`` traces."""
    return isinstance(x, fx.Proxy)


def must_be_plain() -> bool:
    """Compilers fuse, exporters translate and functorch differentiates plain operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or bool(torch._C._are_functorch_transforms_active())
    )


def as_one_node(layer: nn.Module, x: Any) -> Tensor:
    """The call of ``layer`` with the stand-in ``x``, as one node of the graph."""
    node: Any = x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})
    return node  # type: ignore[no-any-return]


def renamed(function: Any, name: str) -> Any:
    """The same function under another name, by which TorchScript can call it: it has no super()."""
    code, names = function.__code__, function.__globals__
    found = FunctionType(code, names, name, function.__defaults__, function.__closure__)
    found.__annotations__ = dict(function.__annotations__)
    return found
