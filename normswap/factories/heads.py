"""Put a head of another size on a model, taken from a fresh model of that size."""

from __future__ import annotations

from torch import nn


def graft_head(model: nn.Module, fresh: nn.Module) -> list[str]:
    """Put into ``model`` those layers of ``fresh`` whose weights have another shape.

    Layers that hold other tensors than their counterpart are of another kind (an FRN where
    ``fresh`` has a BatchNorm), not of another size: they stay.

    Returns:
        Their names.
    """
    names = []
    old = dict(model.named_modules())
    for name, module in fresh.named_modules():
        mine = {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)}
        if not mine or name not in old or not name:
            continue
        theirs = {k: tuple(p.shape) for k, p in old[name].named_parameters(recurse=False)}
        if mine.keys() == theirs.keys() and mine != theirs:
            like = next(old[name].parameters())
            parent, _, leaf = name.rpartition(".")
            module.to(device=like.device, dtype=like.dtype).train(old[name].training)
            setattr(model.get_submodule(parent), leaf, module)
            names.append(name)
    return names
