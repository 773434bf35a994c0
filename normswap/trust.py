"""Whose code may run: what an artefact names is built only where no foreign code runs for it.

timm's and torchvision's architectures are code that is installed here, and so is the tour's. A
``python:`` source runs a module and an ``hf-hub:`` source downloads: where a *file* names one (and
not the user's own command line), the user must have typed that very spec. This room reads no files,
imports nothing that a file names and builds nothing; it knows no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from normswap.errors import ConsentError, SpecError

Trust = str | Iterable[str] | None
"""The specs that a user consents to: one, several or none."""

_FOREIGN = ("python:", "hf-hub:")
_OWN = frozenset({"python:normswap.tour:digits_net"})
_WORD = r"[A-Za-z_][A-Za-z0-9_]*"
_PYTHON = re.compile(rf"python:({_WORD})(\.{_WORD})*:{_WORD}")
_HUB = re.compile(r"hf-hub:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?", re.ASCII)
_LONGEST = 200


def trusted(trust: Any) -> frozenset[str]:
    """The specs in what a user gave as ``trust``.

    Raises:
        SpecError: it is something else, for example True.

    Example:
        >>> trusted("python:mine.models:net")
        frozenset({'python:mine.models:net'})
    """
    specs = (trust,) if isinstance(trust, str) else () if trust is None else trust
    if not isinstance(specs, Iterable):
        specs = (specs,)
    found = list(specs)
    for spec in found:
        if not isinstance(spec, str) or not spec.startswith(_FOREIGN):
            raise SpecError(
                "--trust (trust=…)",
                got=repr(spec)[:_LONGEST],
                need="the source that you trust, as the artefact names it",
                hint="python:package.module:factory or hf-hub:ORG/REPO",
            )
    return frozenset(found)


def typed(*specs: str) -> frozenset[str]:
    """Those of some specs, typed by the user, that consent is about."""
    return frozenset(spec for spec in specs if spec.startswith(_FOREIGN))


def check_consent(spec: str, trust: frozenset[str]) -> None:
    """Let a recorded source pass if it runs no foreign code, or if the user has typed it.

    Args:
        spec: as a file names it.
        trust: what the user has typed.

    Raises:
        ConsentError: it runs code or downloads, and nobody consented.
        SpecError: it is malformed. Then nothing is offered to be typed: a spec is copied into a
            shell.
    """
    pattern = _PYTHON if spec.startswith("python:") else _HUB
    if not spec.startswith(_FOREIGN) or spec in _OWN:
        return
    if len(spec) > _LONGEST or not pattern.fullmatch(spec):
        raise SpecError(
            "source",
            got=f"the malformed spec {spec[:60]!r}",
            need="python:package.module:factory or hf-hub:ORG/REPO",
            hint="an artefact from somebody whom you trust",
        )
    if spec in trust:
        return
    does = f"runs code of {_place(spec)}" if pattern is _PYTHON else "downloads from the hub"
    raise ConsentError(
        "source",
        got=f"the source {spec}, which {does}",
        need="your consent, because the file names it and not you",
        hint=f"--trust {spec} (trust={spec!r}) if you trust its author, "
        "or load(directory, into=a freshly built BatchNorm model)",
    )


def _place(spec: str) -> str:
    """Where the code would come from; found without importing anything."""
    name = spec.removeprefix("python:").partition(":")[0].partition(".")[0]
    known = sys.modules.get(name)
    if known is not None:
        return str(getattr(known, "__file__", None) or name)
    with current_folder_importable():
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            found = None
    if found is None:
        return f"a module {name}, which is not here"
    return str(found.origin or name)


@contextlib.contextmanager
def current_folder_importable() -> Iterator[None]:
    """Meanwhile the current folder is searched too, after Python's own library."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    packages = (i for i, entry in enumerate(sys.path) if entry.endswith("-packages"))
    sys.path.insert(next(packages, len(sys.path)), folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
