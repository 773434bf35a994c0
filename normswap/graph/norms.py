"""Which modules are BatchNorm, and what they hold.

Classes of timm and torchvision are looked up only if those packages are already imported: a model
cannot contain a class of a package that nobody imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from normswap import layers
from normswap.errors import WalkError
from normswap.graph.foreign import STANDARD, Foreign, Roles, declared_roles, foreign

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_OWN_FROZEN = (layers.FrozenBatchNorm1d, layers.FrozenBatchNorm2d, layers.FrozenBatchNorm3d)

_OPTIONAL = {
    "BatchNormAct2d": "timm.layers.norm_act",
    "SyncBatchNormAct": "timm.layers.norm_act",
    "FrozenBatchNormAct2d": "timm.layers.norm_act",
    "FrozenBatchNorm2d": "torchvision.ops.misc",
}

# in the place of 0 (torchvision's pretrained detectors have it): it changes no variance that
# float32 can tell from 0
_SMALLEST_EPS = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class BatchNormState:
    """The tensors and numbers of one BatchNorm, whatever its class; tensors are not copies.

    Attributes:
        weight: γ of shape (C,), or None.
        bias: β of shape (C,), or None.
        mean: running mean of shape (C,), or None.
        var: running variance of shape (C,), or None.
        batches: ``num_batches_tracked``, or None.
        eps: ε added to the variance; above 0, because torch trains no BatchNorm without one.
        momentum: share of the newest batch in the running statistics; None: cumulative average.
        channels: C.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None
    eps: float
    momentum: float | None
    channels: int


def _optional_class(name: str) -> type[nn.Module] | None:
    home = sys.modules.get(_OPTIONAL[name])
    return getattr(home, name, None) if home is not None else None


def _frozen_classes() -> tuple[type[nn.Module], ...]:
    found = (_optional_class("FrozenBatchNorm2d"), _optional_class("FrozenBatchNormAct2d"))
    return (*_OWN_FROZEN, *(cls for cls in found if cls is not None))


def _known_forwards() -> set[Callable[..., Any]]:
    optional = (_optional_class(name) for name in _OPTIONAL)
    classes: list[type[nn.Module]] = [
        _BatchNorm,
        nn.SyncBatchNorm,
        layers.SyncBatchNorm,
        *_OWN_FROZEN,
        layers.TracksBatches,
        *layers.fused_classes.values(),
        *(cls for cls in optional if cls is not None),
    ]
    return {cls.forward for cls in classes}


def _fused_forwards() -> set[Callable[..., Any]]:
    optional = (_optional_class(name) for name in _OPTIONAL if name.endswith(("Act", "Act2d")))
    classes = (*layers.fused_classes.values(), *(cls for cls in optional if cls is not None))
    return {cls.forward for cls in classes}


def is_batchnorm(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm of any kind, known or not."""
    cls: Any = type(module)
    return _is_batchnorm_class(cls) or foreign(module) is not None


@functools.cache  # for good: what a class descends from was there before it
def _is_batchnorm_class(cls: type[nn.Module]) -> bool:
    return issubclass(cls, (_BatchNorm, *_frozen_classes()))


def _runs_known_forward(module: nn.Module) -> bool:
    if declared_roles(module) is not None or "forward" in vars(module):
        return False
    cls: Any = type(module)
    return _is_known(cls, cls.forward)


@functools.cache  # for good: a class that runs a known forward descends from the known class
def _is_known(cls: Any, forward: object) -> bool:
    return _is_batchnorm_class(cls) and forward in _known_forwards()


def _other(module: nn.Module) -> Foreign | None:
    """What is known of a BatchNorm that does not run a known class's forward."""
    return None if _runs_known_forward(module) else foreign(module)


def _roles(module: nn.Module) -> Roles:
    found = _other(module)
    return STANDARD if found is None else found.roles


def check_known(module: nn.Module, name: str) -> None:
    """Raise unless the walker knows what the BatchNorm ``module`` computes.

    Raises:
        WalkError: for a subclass with a ``forward`` of its own that does not compute BatchNorm's
            formula, an instance patched like that, or a lazy module that has no parameters yet.
    """
    check_initialised(module, name)
    own = {*module._parameters, *module._buffers}
    roles = _roles(module)
    apart = (n for n in (roles.weight, roles.bias) if n not in own)
    computed = [n for n in apart if getattr(module, n, None) is not None]
    if computed:
        raise WalkError(
            name or "the model",
            got=f"a BatchNorm whose {computed[0]} is computed (pruned or parametrized)",
            need="a BatchNorm that holds its own parameters",
            hint="torch.nn.utils.prune.remove or parametrize.remove_parametrizations before",
        )
    if not _runs_known_forward(module) and foreign(module) is None:
        kind = type(module).__name__
        raise WalkError(
            name or "the model",
            got=f"{kind}, a BatchNorm with a forward of its own that computes something else",
            need="a BatchNorm whose computation is known",
            hint=f"--exclude '{name}' (exclude={name!r}) to leave it as it is",
        )


def check_initialised(module: nn.Module, name: str) -> None:
    """Raise if ``module`` is lazy and has no parameters yet.

    Raises:
        WalkError: naming it.
    """
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise WalkError(
            name or "the model",
            got=f"an uninitialised {type(module).__name__}",
            need="modules with parameters",
            hint="one forward pass of the model before converting it",
        )


def fused_parts(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The ``(drop, act)`` that a norm carries inside, as timm's ``…Act`` classes do, or None."""
    if type(module).forward not in _fused_forwards():
        found = _other(module)
        apart = found is not None and not isinstance(found.act, nn.Identity)
        return (found.drop, found.act) if found is not None and apart else None
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        return drop, act
    return None


def channels_of(module: nn.Module) -> int:
    """Number of features C of a BatchNorm: what its tensors say, for they may have been cut."""
    roles = _roles(module)
    held = (getattr(module, name, None) for name in (roles.mean, roles.weight, roles.bias))
    found = next((t.numel() for t in held if isinstance(t, Tensor)), None)
    return int(module.num_features) if found is None else found  # type: ignore[arg-type]


def spatial_rank_of(module: nn.Module) -> int:
    """Number of spatial dimensions that the class of a BatchNorm suggests: 1, 2 or 3."""
    name = type(module).__name__.lower()
    return next((rank for rank in (1, 3) if f"{rank}d" in name), 2)


def state_of(module: nn.Module) -> BatchNormState:
    """Read a BatchNorm of any known class."""
    found = _other(module)
    roles = STANDARD if found is None else found.roles
    momentum = roles.momentum
    eps = float(getattr(module, "eps", 1e-5)) if found is None else found.eps
    return BatchNormState(
        weight=_flat(getattr(module, roles.weight, None)),
        bias=_flat(getattr(module, roles.bias, None)),
        mean=_flat(getattr(module, roles.mean, None)),
        var=_flat(getattr(module, roles.var, None)),
        batches=getattr(module, "num_batches_tracked", None),
        eps=max(eps, _SMALLEST_EPS),
        momentum=getattr(module, momentum, 0.1) if isinstance(momentum, str) else momentum,
        channels=channels_of(module),
    )


def _flat(tensor: Tensor | None) -> Tensor | None:
    """(1, C, 1, 1), as some hold it, as (C,); the same memory and the same gradient flag."""
    if tensor is None or tensor.ndim == 1:
        return tensor
    return tensor.detach().reshape(-1).requires_grad_(tensor.requires_grad)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normaliser of any kind: torch's, or one that looks like it.

    Example:
        >>> is_norm(nn.GroupNorm(1, 4)), is_norm(nn.Conv2d(4, 4, 1))
        (True, False)
    """
    if isinstance(module, _NORMS):
        return True
    own = module.parameters(recurse=False)
    return "norm" in type(module).__name__.lower() and all(item.ndim <= 1 for item in own)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a BatchNorm's tensors; torch's default if it has none."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    floats = (t.dtype for t in tensors if t.is_floating_point())
    return next(floats, torch.get_default_dtype())
