"""Normalisers that carry the dropout and the activation that follow them.

timm's ``BatchNormAct2d`` is three layers in one module, ``act(drop(norm(x)))``, with ``drop`` and
``act`` as children. Whatever replaces it must carry both, under the same names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.tracing import as_one_node, is_scripting, is_stand_in, renamed

if TYPE_CHECKING:
    from collections.abc import Callable

fused_classes: dict[type[nn.Module], type[nn.Module]] = {}
"""Which class a normaliser turns into when it takes over a dropout and an activation."""


class Fused(nn.Module):
    """Mixin, left of a normaliser: ``act(drop(norm(x)))``, keywords ``drop`` and ``act``.

    ``class MyNormAct2d(Fused, MyNorm2d)`` beside a layer is all that it takes: the class registers
    itself as what ``MyNorm2d`` turns into.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations, and knows none of these
        drop: nn.Module
        act: nn.Module
        _unfused_forward: Callable[[Tensor], Tensor]

    _is_one_node = True

    def __init__(
        self,
        *args: Any,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Normalise, drop, activate."""
        if not is_scripting():  # noqa: SIM102 - what is in it is no TorchScript
            if self._is_one_node and is_stand_in(input):
                return as_one_node(self, input)
        y: Tensor = self.act(self.drop(self._unfused_forward(input)))
        return y

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is Fused:
            norm: Any = cls.__bases__[1]
            fused_classes[norm] = cls
            cls._unfused_forward = renamed(norm.forward, "_unfused_forward")


class GroupNormAct(Fused, nn.GroupNorm):
    """``act(drop(GroupNorm(x)))``; keywords ``drop`` and ``act``, identity if absent."""

    _is_one_node = False  # nothing in it asks the tensor anything


class InstanceNormAct1d(Fused, nn.InstanceNorm1d):
    """``act(drop(InstanceNorm1d(x)))``; see :class:`GroupNormAct`."""


class InstanceNormAct2d(Fused, nn.InstanceNorm2d):
    """``act(drop(InstanceNorm2d(x)))``; see :class:`GroupNormAct`."""


class InstanceNormAct3d(Fused, nn.InstanceNorm3d):
    """``act(drop(InstanceNorm3d(x)))``; see :class:`GroupNormAct`."""


def fuse(norm: nn.Module, drop: nn.Module, act: nn.Module) -> nn.Module:
    """Make ``norm`` carry ``drop`` and ``act``, in place; its own state-dict keys stay.

    Args:
        norm: an instance of one of the keys of ``fused_classes``.
        drop: what runs after it.
        act: what runs after that.

    Returns:
        ``norm`` itself.

    Raises:
        LayerError: no fused class for this normaliser.

    Example:
        >>> import torch
        >>> norm = nn.GroupNorm(1, 4)
        >>> fuse(norm, nn.Identity(), nn.ReLU()) is norm
        True
        >>> norm(torch.randn(2, 4, 3, 3)).min().item()
        0.0
    """
    fused = fused_classes.get(type(norm))
    if fused is None:
        raise LayerError(
            "fuse",
            got=f"a {type(norm).__name__}",
            need="one of " + ", ".join(kind.__name__ for kind in fused_classes),
            hint="nn.Sequential(norm, drop, act)",
        )
    norm.__class__ = fused
    norm.add_module("drop", drop)
    norm.add_module("act", act)
    return norm
