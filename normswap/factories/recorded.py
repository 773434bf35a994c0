"""The arguments that a file may hand to a factory: names, types and bounds, and nothing else.

A record is what somebody else may have written. Every family of specs has a table of the arguments
that its own builds record; whatever is not in it is refused, whether it would be harmless or not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from normswap import checks
from normswap.errors import SpecError
from normswap.factories.timm_models import is_hub_option
from normswap.libraries import library

MOST_PIXELS = 8192
"""The longest edge of an image that a recorded architecture is built for."""

MOST_CHANNELS = 1024
"""The most channels of an image that a recorded architecture is built for."""

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _edge(value: Any) -> bool:
    return checks.whole(value, 1, MOST_PIXELS)


def _channels(value: Any) -> bool:
    return checks.whole(value, 1, MOST_CHANNELS)


def _size(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_edge, value))
    return pair or _edge(value)


def _share(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and 0 < value < 1


_TORCHVISION: dict[str, Callable[[Any], bool]] = {
    "aux_logits": _flag,
    "transform_input": _flag,
    "aux_loss": _flag,
    "image_size": _edge,
    "frozen_eps": _share,
    "in_chans": _channels,
}
_TIMM: dict[str, Callable[[Any], bool]] = {"img_size": _size, "in_chans": _channels}
_PYTHON: dict[str, Callable[[Any], bool]] = {"image_size": _size, "in_chans": _channels}


def check_recorded(spec: str, arguments: Mapping[str, Any]) -> None:
    """Make sure that a record asks for a known architecture with arguments that it may have.

    Args:
        spec: of any family.
        arguments: as a build of that family recorded them.

    Raises:
        SpecError: another argument, a value out of its bounds, an architecture that is not in the
            library.
    """
    if spec.startswith("torchvision/"):
        _check_name(spec, spec.removeprefix("torchvision/").partition(":"))
        _check(spec, arguments, _TORCHVISION)
    elif spec.startswith("timm/"):
        _check_name(spec, spec.removeprefix("timm/").partition("."))
        named = arguments.get("architecture", spec.removeprefix("timm/"))
        _require(spec, "architecture", named, named == spec.removeprefix("timm/"))
        _require_keys(spec, arguments, ("architecture", "options"))
        _check(spec, _mapping(spec, "options", arguments.get("options", {})), _TIMM)
    elif spec.startswith("hf-hub:"):
        _check_hub(spec, arguments)
    else:
        _check(spec, arguments, _PYTHON)


def _check_name(spec: str, parts: tuple[str, str, str]) -> None:
    name, sign, tag = parts
    known = (
        library("timm").is_model(name)
        if spec.startswith("timm/")
        else name.lower() in library("torchvision.models").list_models()
    )
    _require(spec, "architecture", name, known and (not sign or _TAG.fullmatch(tag) is not None))


def _check_hub(spec: str, arguments: Mapping[str, Any]) -> None:
    """What the hub said when the user named the repository; none of it is asked for again."""
    _require_keys(spec, arguments, ("architecture", "config", "options"))
    name = arguments.get("architecture")
    _require(spec, "architecture", name, isinstance(name, str) and library("timm").is_model(name))
    _mapping(spec, "config", arguments.get("config", {}))
    for key, value in _mapping(spec, "options", arguments.get("options", {})).items():
        _require(spec, f"options.{key}", value, is_hub_option(key, value))


def _check(
    spec: str, arguments: Mapping[str, Any], table: Mapping[str, Callable[[Any], bool]]
) -> None:
    _require_keys(spec, arguments, tuple(table))
    for name, value in arguments.items():
        _require(spec, name, value, table[name](value))


def _mapping(spec: str, name: str, value: Any) -> Mapping[str, Any]:
    _require(spec, name, value, isinstance(value, Mapping))
    found: Mapping[str, Any] = value
    return found


def _require_keys(spec: str, arguments: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in arguments.items():
        _require(spec, str(name), value, name in known)


def _require(spec: str, name: str, value: Any, fine: bool) -> None:
    if not fine:
        raise SpecError(
            f"source {spec[:100]}",
            got=f"the recorded argument {name[:60]}={value!r:.60}",
            need="a known architecture, and only arguments that normswap itself records, in bounds",
            hint="an artefact as normswap wrote it",
        )
