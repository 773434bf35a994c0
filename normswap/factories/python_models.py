"""``python:package.module:factory``: models of one's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normswap.data import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from normswap.errors import NormSwapError, SpecError, in_short
from normswap.factories.request import Built, Request
from normswap.factories.timm_models import timm_preprocessing
from normswap.graph import qualified_names
from normswap.graph.walker import ready_to_run
from normswap.modes import refuse_other_meanings
from normswap.trust import current_folder_importable


def from_python(request: Request) -> Built:
    """``python:package.module:factory``, also below the current folder.

    The factory gets ``num_classes``, ``pretrained``, ``image_size`` and ``in_chans`` if it names
    them. What the model takes is, in this order: an attribute ``preprocessing`` of the model or the
    factory; the channels of the first layer that fixes them (unless a full ``input_size`` says
    otherwise and the model runs on that); the edges of ``image_size``, of an attribute
    ``input_size`` of the model or the factory, of a ``pretrained_cfg`` or ``default_cfg`` of either
    (which also gives mean, deviation and interpolation), or 224. A model whose ``task`` is
    ``"detection"`` is given lists of images from 0 to 1, which it normalises itself.

    Raises:
        SpecError: no such module or attribute, or it gives no ``nn.Module``.
    """
    module_name, _, attribute = request.name.partition(":")
    if not module_name or not attribute:
        raise SpecError(
            request.spec,
            got="no module or no factory",
            need="python:package.module:factory",
            hint="for example python:my_models:make_net",
        )
    with current_folder_importable():
        factory = _find_factory(request.spec, module_name, attribute)
        if request.recorded:
            _check_at_home(request.spec, factory, module_name, attribute)
        options = _factory_options(factory, request)
        model = _call(factory, request, options)
    if not isinstance(model, nn.Module):
        raise SpecError(
            request.spec,
            got=f"a {type(model).__name__}",
            need="a factory that returns a torch.nn.Module",
            hint="naming the function that builds the model",
        )
    refuse_other_meanings(model)
    names = getattr(model, "class_names", None)
    return Built(
        model,
        _python_preprocessing(model, factory).resized(request.image_size),
        {k: v for k, v in options.items() if k not in ("num_classes", "pretrained")},
        tuple(str(name) for name in names) if isinstance(names, list | tuple) else None,
        str(getattr(model, "task", "image")),
        pretrained=bool(options.get("pretrained")),
        spec=_home_of(factory) or request.spec,
    )


def _call(factory: Callable[..., Any], request: Request, options: dict[str, Any]) -> Any:
    try:
        return factory(**options)
    except NormSwapError:
        raise
    except (Exception, SystemExit) as error:  # a factory that ends the program is none
        raise SpecError(
            request.spec,
            got=f"{type(error).__name__} from the factory ({in_short(error)})",
            need="a factory that builds its model from " + (", ".join(options) or "no arguments"),
            hint="calling it from Python, or --debug for the traceback",
        ) from error


def canonical(spec: str) -> str:
    """The spec that names a factory where it is defined; a record must name it there.

    Raises:
        SpecError: no such module or attribute.
    """
    module_name, _, attribute = spec.removeprefix("python:").partition(":")
    with current_folder_importable():
        return _home_of(_find_factory(spec, module_name, attribute)) or spec


def _home_of(factory: Callable[..., Any]) -> str | None:
    """``python:module:name`` of the place where a factory is defined, if it has a name there."""
    inner = inspect.unwrap(factory)
    home, name = str(inner.__module__), str(getattr(inner, "__qualname__", ""))
    return f"python:{home}:{name}" if _is_at_home(factory, home, name) else None


def _is_at_home(factory: Any, module_name: str, attribute: str) -> bool:
    """Whether a module defines what it calls by that name, rather than having imported it."""
    own = vars(sys.modules.get(module_name, types.ModuleType("")))
    inner = inspect.unwrap(factory)
    if own.get(attribute) is not factory or factory.__module__ != module_name:
        return False
    if isinstance(inner, type):
        return inner.__module__ == module_name
    return isinstance(inner, types.FunctionType) and inner.__globals__ is own


def _check_at_home(spec: str, factory: Any, module_name: str, attribute: str) -> None:
    if not _is_at_home(factory, module_name, attribute):
        raise SpecError(
            spec,
            got=f"a factory that {module_name} does not define itself",
            need="one attribute that is defined in that very module, because a file names it",
            hint=_home_of(factory) or "load(directory, into=a freshly built BatchNorm model)",
        )


def find_attribute(spec: str, module_name: str, attribute: str, *, what: str) -> Any:
    """Import a module and get something out of it.

    Args:
        spec: as the user wrote it, for error texts.
        module_name: dotted name of the module.
        attribute: dotted name in it.
        what: what it is to be, for error texts.

    Raises:
        SpecError: no such module or attribute, or a module of Python's own library.
    """
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise SpecError(
            spec,
            got="a module of Python's own library",
            need="a module that builds models",
            hint="python:your_package.module:factory",
        )
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # code that ends the program, too
        raise SpecError(
            spec,
            got=f"{type(error).__name__} on importing {module_name} ({in_short(error)})",
            need="a module that Python can import from here",
            hint="running in the folder that holds it, or installing it",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), 3)
            raise SpecError(
                spec,
                got=f"no {part} in {getattr(found, '__name__', module_name)}",
                need=f"the name of a {what}",
                hint=", ".join(near) or "another name",
            )
        found = getattr(found, part)
    return found


def _find_factory(spec: str, module_name: str, attribute: str) -> Callable[..., Any]:
    found = find_attribute(spec, module_name, attribute, what="factory")
    if not isinstance(found, type | types.FunctionType | types.MethodType) and not hasattr(
        found, "__wrapped__"
    ):
        raise SpecError(
            spec,
            got=f"a {type(found).__name__}",
            need="a function or class that builds a model",
            hint="wrapping it in a function",
        )
    factory: Callable[..., Any] = found
    return factory


def _factory_options(factory: Callable[..., Any], request: Request) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options: dict[str, Any] = dict(request.arguments or {})
    for name in ("num_classes", "in_chans"):
        value = getattr(request, name)
        if value is None:
            continue
        if name not in parameters and not open_ended:
            raise SpecError(
                request.spec,
                got=f"{name}={value}",
                need=f"a factory that takes {name}",
                hint=f"adding that argument to the factory, or leaving {name} out",
            )
        options[name] = value
    if "pretrained" in parameters:
        options["pretrained"] = request.pretrained
    if request.image_size is not None and "image_size" in parameters:
        height, width = request.image_size
        options["image_size"] = height if height == width else request.image_size
    return options


def _python_preprocessing(model: nn.Module, factory: Callable[..., Any]) -> Preprocessing:
    owners = (model, factory)
    for owner in owners:
        given = getattr(owner, "preprocessing", None)
        if isinstance(given, Preprocessing):
            return given
        if isinstance(given, Mapping):
            return Preprocessing.from_json(given)
    configs = (getattr(o, n, None) for o in owners for n in ("pretrained_cfg", "default_cfg"))
    known = (dict(cfg) for cfg in configs if isinstance(cfg, Mapping) and cfg.get("input_size"))
    config = next((timm_preprocessing(cfg) for cfg in known), None)
    sizes = (getattr(owner, "input_size", None) for owner in owners)
    size = next((size for size in sizes if size is not None), None)
    channels, rank = _first_layer(model)
    if size is None and config is not None and rank == len(config.input_size) - 1:
        return config.with_channels(channels)
    full = _full_size(size, model)
    if full[0] != channels and len(full) == rank + 1 and not _takes(model, full):
        full = (channels, *full[1:])
    if getattr(model, "task", None) == "detection" and config is None:
        return Preprocessing(full, (0.0,) * full[0], (1.0,) * full[0], "bilinear", 1.0)
    if config is None or len(full) != len(config.input_size):
        return _plain_preprocessing(full)
    return replace(config.with_channels(full[0]), input_size=full)


def _takes(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether the model runs on one input of that size, looked at without arithmetic."""
    try:
        with ready_to_run(
            model, torch.zeros(1, *size), qualified_names(model), mode="eval", meta=True
        ) as (inputs, _):
            model(inputs)
    except Exception:  # noqa: BLE001 - whatever the model raises
        return False
    return True


def _plain_preprocessing(size: tuple[int, ...]) -> Preprocessing:
    channels = size[0]
    if channels == 3:
        return Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return Preprocessing(size, (0.0,) * channels, (1.0,) * channels, "bilinear")


def _full_size(size: Any, model: nn.Module) -> tuple[int, ...]:
    channels, rank = _first_layer(model)
    if size is None:
        return (channels, *{0: (), 1: (224,), 2: (224, 224), 3: (16, 112, 112)}[rank])
    if isinstance(size, int):
        return (channels, *([size] * rank)) if rank else (size,)
    edges = tuple(int(edge) for edge in size)
    return (channels, *edges) if len(edges) == rank and rank else edges


def _first_layer(model: nn.Module) -> tuple[int, int]:
    """Channels and spatial rank of the first layer that fixes them; an RGB image if none does."""
    ranks = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    for module in model.modules():
        for kind, rank in ranks.items():
            if isinstance(module, kind):
                channels = getattr(module, "in_channels", None)
                return int(channels or getattr(module, "num_features", None) or 3), rank
        if isinstance(module, nn.Linear):
            return module.in_features, 0
    return 3, 2
