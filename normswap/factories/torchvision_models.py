"""``torchvision/NAME[:WEIGHTS]``: classification, segmentation, video, detection, optical flow."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from normswap.data import Preprocessing
from normswap.errors import SpecError
from normswap.factories.heads import graft_head
from normswap.factories.request import Built, Request, explained, no_weights, unknown_model
from normswap.factories.stems import take_channels
from normswap.libraries import library

logger = logging.getLogger("normswap")


def from_torchvision(request: Request) -> Built:
    """``torchvision/NAME[:WEIGHTS]``: anything ``torchvision.models.get_model`` builds.

    Frozen BNs of pretrained detectors come back as ordinary BNs in the same function, because a
    frozen one is nothing that could be swapped.

    Raises:
        SpecError: unknown name or weights, no weights to be had, or no network.
    """
    models = library("torchvision.models")
    name, _, tag = request.name.partition(":")
    if name.lower() not in models.list_models():
        raise unknown_model(request.spec, "torchvision/", name, models.list_models())
    builder = models.get_model_builder(name)
    weights = _torchvision_weights(models, request, name, tag)
    arguments = dict(
        request.arguments
        if request.arguments is not None
        else _torchvision_arguments(builder, weights, request, tagged=bool(tag))
    )
    with explained(request):
        model = _torchvision_model(builder, weights, arguments, request)
    task = _torchvision_task(builder)
    preprocessing = _torchvision_preprocessing(name, weights, task).resized(request.image_size)
    preprocessing = preprocessing.with_channels(arguments.get("in_chans", 3))
    names = weights.meta.get("categories") if request.pretrained and weights else None
    if request.num_classes not in (None, len(names or ())):
        names = None
    return Built(model, preprocessing, arguments, tuple(names) if names else None, task)


def _torchvision_weights(models: Any, request: Request, name: str, tag: str) -> Any:
    choices = list(models.get_model_weights(name))
    if tag:
        wanted = tag.rpartition(".")[2]
        known = models.get_model_weights(name).__members__
        if wanted not in known:
            raise SpecError(
                request.spec,
                got=f"weights {tag}",
                need=f"one of {', '.join(known) or 'none: this model has no weights'}",
                hint=f"torchvision/{name}" + (f":{next(iter(known))}" if known else ""),
            )
        return known[wanted]
    if not choices:
        if request.pretrained:
            raise no_weights(request.spec, [])
        return None
    default = models.get_model_weights(name).DEFAULT
    # quantised weights have their BNs folded away; their origin has not
    return default.meta.get("unquantized", default)


def _torchvision_arguments(
    builder: Callable[..., nn.Module], weights: Any, request: Request, *, tagged: bool
) -> dict[str, Any]:
    """What the builders infer from weights, written out so that it can be had without them."""
    known = inspect.signature(builder).parameters
    name = builder.__name__
    like_weights = weights is not None and (request.pretrained or tagged)
    arguments: dict[str, Any] = {}
    if "googlenet" in name or "inception" in name:
        has_aux = any(key.startswith(("aux1.", "aux2.", "AuxLogits.")) for key in request.keys)
        default = not (request.pretrained and "googlenet" in name)
        arguments = {
            "aux_logits": has_aux if request.keys else default,
            "transform_input": like_weights,
        }
    elif "aux_loss" in known:
        has_aux = any(key.startswith("aux_classifier.") for key in request.keys)
        arguments = {"aux_loss": has_aux if request.keys else like_weights}
    elif name.startswith("vit_") and like_weights:
        arguments = {"image_size": weights.meta["min_size"][0]}
    if request.in_chans not in (None, 3):
        arguments["in_chans"] = request.in_chans
        if "transform_input" in arguments:
            arguments["transform_input"] = False  # it speaks of red, green and blue
    return arguments


def _torchvision_model(
    builder: Callable[..., nn.Module], weights: Any, arguments: dict[str, Any], request: Request
) -> nn.Module:
    known = inspect.signature(builder).parameters
    apart = ("frozen_eps", "in_chans")
    options = {key: value for key, value in arguments.items() if key not in apart}
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if "transform_input" in arguments:
        options["init_weights"] = not (request.pretrained or request.filled_later)
    resized = {} if request.num_classes is None else {"num_classes": request.num_classes}
    if not request.pretrained:
        model = _with_eps(builder(weights=None, **options, **resized), arguments.get("frozen_eps"))
        return take_channels(model, arguments.get("in_chans"), request.spec, pretrained=False)
    if not options.get("aux_logits", True):
        del options["aux_logits"]  # what weights imply; saying it aloud is refused
    model = builder(weights=weights, **options)
    frozen_eps = _thaw(model)
    if frozen_eps is not None:
        arguments["frozen_eps"] = frozen_eps
    if request.num_classes is not None:
        options |= {key: arguments[key] for key in ("aux_logits",) if key in arguments}
        graft_head(model, builder(weights=None, **options, **resized))
    return take_channels(model, arguments.get("in_chans"), request.spec, pretrained=True)


def _thaw(model: nn.Module) -> float | None:
    """Turn torchvision's frozen BNs into ordinary ones; gives their epsilon, None if none is."""
    frozen_kind = library("torchvision.ops").FrozenBatchNorm2d
    eps: float | None = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, frozen_kind):
                continue
            # torch refuses to train with an epsilon of 0, which torchvision gives some detectors
            eps = max(float(child.eps), 1e-12)
            norm = nn.BatchNorm2d(child.running_mean.numel(), eps=eps)
            norm.load_state_dict(child.state_dict(), strict=False)
            setattr(parent, name, norm.train(child.training))
    if eps is not None:
        logger.info("made the frozen BatchNorms of this detector ordinary ones")
    return eps


def _with_eps(model: nn.Module, eps: Any) -> nn.Module:
    if eps is not None:
        backbone = getattr(model, "backbone", model)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = float(eps)
    return model


def _torchvision_task(builder: Callable[..., nn.Module]) -> str:
    home = builder.__module__
    for part, task in (("detection", "detection"), ("optical_flow", "flow"), ("video", "video")):
        if f".{part}." in f"{home}.":
            return task
    return "image"


def _torchvision_preprocessing(name: str, weights: Any, task: str) -> Preprocessing:
    if task in ("detection", "flow"):  # both resize or normalise by themselves
        edge = 320 if task == "detection" else 128
        return Preprocessing(
            (3, edge, edge), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, crop_mode="squash"
        )
    if weights is None:
        edge = 299 if "inception" in name else 224
        return Preprocessing((3, edge, edge), interpolation="bilinear")
    preset = weights.transforms()
    crop = list(getattr(preset, "crop_size", None) or preset.resize_size)
    resize = list(preset.resize_size)
    height, width = crop[0], crop[-1]
    size: tuple[int, ...] = (3, height, width)
    if task == "video":
        frames = max(16, int(weights.meta.get("min_temporal_size", 16)))
        size = (3, frames, height, width)
    return Preprocessing(
        size,
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
        height / resize[0],
    )
