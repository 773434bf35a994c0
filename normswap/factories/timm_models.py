"""``timm/NAME[.TAG]`` and ``hf-hub:ORG/REPO``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.data import Preprocessing
from normswap.errors import SpecError
from normswap.factories.request import Built, Request, explained, unknown_model
from normswap.libraries import library

_NEVER_FROM_THE_HUB = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir"),
    *("pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "model_cfg", "device"),
    *(
        "feature_cfg",
        "features_only",
        "feature_cls",
        "kwargs_filter",
        "pruned",
        "dtype",
        "exportable",
    ),
    *("scriptable", "no_jit"),
}
_CONFIG = {  # of timm's PretrainedCfg what says how to use the weights, not where they come from
    *("architecture", "tag", "input_size", "test_input_size", "min_input_size", "fixed_input_size"),
    *("interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "num_classes"),
    *("label_offset", "label_names", "label_descriptions", "pool_size", "test_pool_size"),
    *("first_conv", "classifier", "license", "hf_hub_id", "source"),
}
_MOST = 65_536
_SHORT = re.compile(r"[A-Za-z0-9_.+-]{1,60}")


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
    channels = options.get("in_chans") or (cfg.get("input_size") or (3,))[0]
    preprocessing = timm_preprocessing(cfg).with_channels(channels).resized(request.image_size)
    names = _timm_class_names(cfg, model) if request.pretrained else None
    return Built(model, preprocessing, arguments, names)


def _timm_arguments(timm: Any, request: Request) -> dict[str, Any]:
    if request.spec.startswith("hf-hub:"):
        cfg, name, model_args = timm.models.load_model_config_from_hf(request.name)
        options = dict(model_args or {})
        for key, value in options.items():
            if not is_hub_option(key, value):
                raise SpecError(
                    request.spec,
                    got=f"the model argument {str(key)[:60]}={value!r:.60}",
                    need="numbers, flags, names and lists of them, within bounds",
                    hint="building it with timm itself, if you trust its author",
                )
        if request.in_chans is not None:
            options["in_chans"] = request.in_chans
        return {"architecture": str(name), "config": _config(cfg), "options": options}
    arguments: dict[str, Any] = {"architecture": request.name}
    if request.in_chans is not None:
        arguments["options"] = {"in_chans": request.in_chans}
    if request.image_size is not None and timm.is_model(request.name):
        cfg = timm.get_pretrained_cfg(request.name)
        if cfg is not None and cfg.fixed_input_size:
            size = {"img_size": list(request.image_size)}
            arguments["options"] = arguments.get("options", {}) | size
    return arguments


def is_hub_option(name: Any, value: Any) -> bool:
    """Whether a model argument from elsewhere is a plain setting: no place, no switch of timm's."""
    known = isinstance(name, str) and name.isidentifier() and name not in _NEVER_FROM_THE_HUB
    return known and _is_plain(value)


def _is_plain(value: Any, depth: int = 3) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 64 and all(_is_plain(v, depth - 1) for v in value)
    if isinstance(value, str):
        return _SHORT.fullmatch(value) is not None
    if isinstance(value, int | float):  # NaN and infinity fail the comparison
        return abs(value) <= _MOST
    return value is None


def _config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a hub's configuration says of input and head, without its URLs, files and loaders."""
    kinds = (str, int, float, bool, list, tuple, type(None))
    return {key: cfg[key] for key in sorted(_CONFIG & set(cfg)) if isinstance(cfg[key], kinds)}


def _timm_call(arguments: Mapping[str, Any], request: Request) -> tuple[str, dict[str, Any]]:
    options = dict(arguments.get("options", {}))
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    if arguments.get("config"):
        options["pretrained_cfg"] = _config(arguments["config"])
    return str(arguments["architecture"]), options


def timm_preprocessing(cfg: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing as timm's ``pretrained_cfg`` tells of it, for its own validation too."""
    known = dict(cfg) or {"": None}
    resolve = library("timm.data").resolve_data_config
    config = resolve({}, pretrained_cfg=known)
    test = resolve({}, pretrained_cfg=known, use_test_size=not cfg.get("fixed_input_size"))
    size = tuple(config["input_size"])
    mean, std = tuple(config["mean"]), tuple(config["std"])
    found = Preprocessing(
        (len(mean), *size[1:]),
        mean,
        std,
        config["interpolation"],
        config["crop_pct"],
        config["crop_mode"],
        test_input_size=_if_other((len(mean), *test["input_size"][1:]), (len(mean), *size[1:])),
        test_crop_pct=_if_other(test["crop_pct"], config["crop_pct"]),
    )
    return found.with_channels(size[0])


def _if_other(value: Any, usual: Any) -> Any:
    return None if value == usual else value


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
