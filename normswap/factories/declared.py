"""``--batchnorm package.module:Class(weight=g, eps=1e-3)``: a BatchNorm class of one's own."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from normswap.errors import SpecError
from normswap.factories.python_models import find_attribute
from normswap.graph import register_batchnorm
from normswap.trust import current_folder_importable

_NEED = "package.module:Class, with what is called otherwise in brackets"
_HINT = "--batchnorm 'my_layers:MyNorm(weight=gamma, bias=beta, eps=0.001, activation=relu)'"


def declare_batchnorm(text: str) -> type[Any]:
    """Import a class, also from below the current folder, and declare that it is a BatchNorm.

    Args:
        text: ``package.module:Class``, or with the arguments of
            :func:`normswap.register_batchnorm` in brackets.

    Returns:
        The class.

    Raises:
        SpecError: the text cannot be read, or names no class.
        PlanError: it is no module class.
    """
    path, roles = _parsed(text)
    module_name, _, attribute = path.partition(":")
    with current_folder_importable():
        cls: Any = find_attribute(f"--batchnorm {text}", module_name, attribute, what="class")
    declared: type[Any] = register_batchnorm(cls, **roles)
    return declared


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    path, bracket, rest = text.partition("(")
    module_name, _, attribute = path.strip().partition(":")
    if not module_name or not attribute or (bracket and not rest.rstrip().endswith(")")):
        raise _unreadable(text, "no module and class")
    known = [p for p in inspect.signature(register_batchnorm).parameters if p != "cls"]
    roles: dict[str, Any] = {}
    for part in rest.rstrip().removesuffix(")").split(",") if bracket else ():
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not value:
            raise _unreadable(text, f"{part.strip()!r}", f"{', '.join(known)}")
        roles[name] = _value(value)
    return path.strip(), roles


def _value(text: str) -> str | float:
    try:
        number: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return float(number) if isinstance(number, int | float) else str(number)


def _unreadable(text: str, got: str, known: str | None = None) -> SpecError:
    need = _NEED if known is None else f"{_NEED}: NAME=VALUE, NAME one of {known}"
    return SpecError(f"--batchnorm {text}", got=got, need=need, hint=_HINT)
