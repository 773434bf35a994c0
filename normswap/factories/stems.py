"""A first convolution for another number of input channels, by timm's rule for pretrained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import SpecError
from normswap.libraries import library

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def take_channels(
    model: nn.Module, channels: int | None, spec: str, *, pretrained: bool
) -> nn.Module:
    """Let a model of red, green and blue take another number of channels, in place.

    Args:
        model: its first convolution is replaced.
        channels: None or 3: nothing changes.
        spec: for error texts.
        pretrained: whether the weights mean something: they are summed for one channel, repeated
            and scaled for more than three, as timm does; else the new ones are fresh.

    Raises:
        SpecError: the model begins with something else, or with several convolutions.
    """
    if channels in (None, 3):
        return model
    stems = [n for n, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)][:1]
    inputs = [
        n
        for n, m in model.named_modules()
        if isinstance(m, _CONVOLUTIONS) and m.in_channels == 3 and m.groups == 1
    ]
    if not stems or inputs != stems:
        raise SpecError(
            spec,
            got=f"in_chans={channels} for a model with {len(inputs)} convolutions of 3 channels",
            need="one that begins with one such convolution",
            hint="a timm model, or a factory of your own (python:module:factory)",
        )
    _replace(model, stems[0], int(channels or 3), pretrained=pretrained)
    transform: Any = getattr(model, "transform", None)
    if hasattr(transform, "image_mean"):  # a detector normalises by itself
        for name in ("image_mean", "image_std"):
            old = list(getattr(transform, name))
            setattr(transform, name, [old[i % len(old)] for i in range(int(channels or 3))])
    return model


def _replace(model: nn.Module, name: str, channels: int, *, pretrained: bool) -> None:
    old: Any = model.get_submodule(name)
    new = type(old)(
        channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    if pretrained:
        with torch.no_grad():
            new.weight.copy_(adapted_stem(old.weight, channels))
            if old.bias is not None:
                new.bias.copy_(old.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def adapted_stem(weight: Tensor, channels: int) -> Tensor:
    """The weight of a first convolution for another number of channels, by timm's rule.

    Args:
        weight: of shape (O, 3, kernel …).
        channels: how many it is to take.
    """
    flat = weight.detach().flatten(3) if weight.ndim > 4 else weight.detach()
    adapted: Tensor = library("timm.models").adapt_input_conv(channels, flat)
    return adapted.reshape(weight.shape[0], channels, *weight.shape[2:])
