"""The names of operations: what torch's functions and modules are called in a report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

PRODUCER_OPS = frozenset(
    {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)} | {"linear"}
)

VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
    | {"permute", "transpose", "swapaxes", "movedim", "t", "view_as", "reshape_as"}
)

# class name of an activation module -> canonical name of the operation
_ACTIVATION_CLASSES = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "PReLU": "prelu",
    "RReLU": "rrelu",
    "ELU": "elu",
    "SELU": "selu",
    "CELU": "celu",
    "GELU": "gelu",
    "GELUTanh": "gelu",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "Swish": "silu",
    "SwishMe": "silu",
    "Mish": "mish",
    "MishMe": "mish",
    "HardMish": "hard_mish",
    "HardMishMe": "hard_mish",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
    "Hardsigmoid": "hardsigmoid",
    "HardSigmoid": "hardsigmoid",
    "HardSigmoidMe": "hardsigmoid",
    "Hardtanh": "hardtanh",
    "Sigmoid": "sigmoid",
    "LogSigmoid": "logsigmoid",
    "Tanh": "tanh",
    "Tanhshrink": "tanhshrink",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Softshrink": "softshrink",
    "Hardshrink": "hardshrink",
    "Threshold": "threshold",
    "GLU": "glu",
    "StarReLU": "star_relu",
    "SquaredReLU": "squared_relu",
}

REPLACEABLE = {"relu": "ReLU", "silu": "SiLU"}
"""Activations whose calls are known for certain, so that a layer may take their place."""

ACTIVATION_FUNCTIONS = frozenset(_ACTIVATION_CLASSES.values()) - {
    "quick_gelu",
    "hard_mish",
    "star_relu",
}

_SYNONYMS = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "rsub": "sub",
    "imul": "mul",
    "rmul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "rtruediv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
    "log_sigmoid": "logsigmoid",
    "native_batch_norm": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "batch_norm_impl_index": "batch_norm",
}


def op_of(function: Callable[..., Any]) -> str:
    """Canonical name of a torch function: in-place and operator forms share one name."""
    name = getattr(function, "__name__", type(function).__name__).strip("_")
    return _SYNONYMS.get(name, name)


def activation_op(function: Callable[..., Any]) -> str | None:
    """Canonical name of a functional activation, or None."""
    name = op_of(function)
    return name if name in ACTIVATION_FUNCTIONS else None


def activation_module_op(module: nn.Module) -> str | None:
    """Canonical name of what an activation module claims to be, or None.

    Only a module that runs ``nn.ReLU``'s own forward is called ``relu``: everything that takes a
    ReLU's place relies on it.
    """
    cls = type(module)
    if isinstance(module, nn.ReLU) and replaceable_op(module):
        return "relu"
    name = cls.__name__
    op = name.lower() if isinstance(module, nn.ReLU) else _ACTIVATION_CLASSES.get(name)
    return None if op == "relu" else op


def is_plain(module: nn.Module) -> bool:
    """Whether a producer or an activation is torch's own, to the last method, with nothing added.

    Such a module is one operation. What any other runs has to be looked at.
    """
    if module._modules or module._forward_pre_hooks:
        return False
    own = vars(module)
    if "forward" in own or "_conv_forward" in own:
        return False
    cls: Any = type(module)
    return _has_torch_methods(cls, cls.forward, getattr(cls, "_conv_forward", None))


@functools.cache
def _has_torch_methods(cls: type[nn.Module], *methods: object) -> bool:
    # the methods are arguments because somebody may put others in their place
    del cls
    homes = (getattr(method, "__module__", "torch.nn.modules.") for method in methods)
    return all(home.startswith("torch.nn.modules.") for home in homes)


def replaceable_op(module: nn.Module) -> str | None:
    """The name in ``REPLACEABLE`` of a module that runs torch's own forward of it, or None."""
    for op, name in REPLACEABLE.items():
        if isinstance(module, cls := getattr(nn, name)):
            genuine = type(module).forward is cls.forward and "forward" not in vars(module)
            return op if genuine else None
    return None


def producer_module_op(module: nn.Module) -> str | None:
    """``conv2d``, ``linear`` … for a module that can be a producer, or None."""
    if isinstance(module, _ConvNd):
        rank = len(module.kernel_size)
        return f"conv_transpose{rank}d" if module.transposed else f"conv{rank}d"
    return "linear" if isinstance(module, nn.Linear) else None
