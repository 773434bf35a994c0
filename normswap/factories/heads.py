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
    _take_numbers(old, dict(fresh.named_modules()))
    return names


def _take_numbers(old: dict[str, nn.Module], fresh: dict[str, nn.Module]) -> None:
    """What detection heads know of their size besides their weights."""
    for name, module in fresh.items():
        for key in _COUNTS if name in old else ():
            if isinstance(getattr(module, key, None), int) and hasattr(old[name], key):
                setattr(old[name], key, getattr(module, key))


_COUNTS = ("num_classes", "num_columns")  # torchvision's RetinaNet and FCOS, SSD


def detector_classes(model: nn.Module) -> range | None:
    """The class numbers that a detector of torchvision's parts can learn, or None.

    R-CNNs and SSDs have a background, number 0, which no box may have; RetinaNet and FCOS have not.

    Example:
        >>> import torchvision
        >>> builder = torchvision.models.detection.ssdlite320_mobilenet_v3_large
        >>> detector_classes(builder(weights=None, weights_backbone=None, num_classes=4))
        range(1, 4)
    """
    for name, module in model.named_modules():
        part = name.rpartition(".")[2]
        if part == "cls_score" and isinstance(getattr(module, "out_features", None), int):
            return range(1, int(getattr(module, "out_features")))  # noqa: B009
        if part == "classification_head":
            for key, first in (("num_columns", 1), ("num_classes", 0)):
                if isinstance(getattr(module, key, None), int):
                    return range(first, int(getattr(module, key)))
    return None
