"""``timm/NAME[.TAG]`` and ``hf-hub:ORG/REPO``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.data import Preprocessing
from normswap.factories.request import Built, Request, explained, unknown_model
from normswap.libraries import library

_NEVER_FROM_A_RECORD = {"pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir"}


def from_timm(request: Request) -> Built:
    """``timm/NAME[.TAG]`` and ``hf-hub:ORG/REPO``.

    Raises:
        SpecError: unknown name or tag, no weights to be had, or no network.
    """
    timm = library("timm")
    with explained(request):
        arguments = dict(request.arguments or _timm_arguments(timm, request))
        name, options = _timm_call(arguments, request)
        if not timm.is_model(name):
            raise unknown_model(request.spec, "timm/", name, timm.list_models())
        model = timm.create_model(name, pretrained=request.pretrained, **options)
    cfg = dict(model.pretrained_cfg or {})
    preprocessing = timm_preprocessing(cfg).resized(request.image_size)
    names = _timm_class_names(cfg, model) if request.pretrained else None
    return Built(model, preprocessing, arguments, names)


def _timm_arguments(timm: Any, request: Request) -> dict[str, Any]:
    if request.spec.startswith("hf-hub:"):
        cfg, name, model_args = timm.models.load_model_config_from_hf(request.name)
        cfg = {key: value for key, value in cfg.items() if _is_plain(value)}
        return {"architecture": name, "config": cfg, "options": dict(model_args or {})}
    arguments: dict[str, Any] = {"architecture": request.name}
    if request.image_size is not None and timm.is_model(request.name):
        cfg = timm.get_pretrained_cfg(request.name)
        if cfg is not None and cfg.fixed_input_size:
            arguments["options"] = {"img_size": list(request.image_size)}
    return arguments


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | tuple | type(None))


def _timm_call(arguments: Mapping[str, Any], request: Request) -> tuple[str, dict[str, Any]]:
    options = dict(arguments.get("options", {}))
    forbidden = sorted(set(options) & _NEVER_FROM_A_RECORD)
    if forbidden:
        raise ValueError(f"{forbidden} are no options of an architecture")
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    if arguments.get("config"):
        options["pretrained_cfg"] = dict(arguments["config"])
    return str(arguments["architecture"]), options


def timm_preprocessing(cfg: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing as timm's ``pretrained_cfg`` tells of it."""
    config = library("timm.data").resolve_data_config({}, pretrained_cfg=dict(cfg) or {"": None})
    size = tuple(config["input_size"])
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) != size[0]:
        mean, std = (mean[0],) * size[0], (std[0],) * size[0]
    return Preprocessing(
        size, mean, std, config["interpolation"], config["crop_pct"], config["crop_mode"]
    )


def _timm_class_names(cfg: Mapping[str, Any], model: nn.Module) -> tuple[str, ...] | None:
    count = getattr(model, "num_classes", None)
    names = cfg.get("label_names")
    if count != cfg.get("num_classes"):
        return None
    if names and len(names) == count:
        descriptions = cfg.get("label_descriptions") or {}
        return tuple(str(descriptions.get(name, name)) for name in names)
    if count != 1000:
        return None
    return tuple(library("timm.data").ImageNetInfo().label_descriptions())
