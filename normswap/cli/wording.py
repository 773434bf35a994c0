"""What the library advises, said to somebody who typed a command: options, and no Python.

A hint of the library names both, ``--skip-broken (on_broken='skip')``; here the brackets go. What
only Python can do goes too, and options that the command does not have, unless nothing else is
advised. Settings of a target, ``gn(groups=8)``, are typed as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from normswap.errors import NormSwapError
from normswap.targets import TARGETS

_ARGUMENT = re.compile(r"(^|[\s(])[a-z]\w*=|^[a-z]+(_[a-z]+)+$|\w\(|^normswap\.|^[a-z_]+$")
_CALL = re.compile(r"(?<![\w:.])(?:\w+\.)*(\w+)\([^\s)]|\b\w+\.\w+\(\)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_BETWEEN = re.compile(r"(,? or |, |; )")


def reword(error: NormSwapError, options: Mapping[str, str]) -> None:
    """Let an error speak of the options of a command.

    Args:
        error: changed in place, so that its traceback stays.
        options: argument → option, ``learning_rate`` → ``--lr`` for example.
    """
    argument = error.where.removeprefix("FineTune.")
    where = without_arguments(options.get(argument, error.where))
    hint = worded(error.hint, options.values())
    if (where, hint) != (error.where, error.hint):
        error.where, error.hint = where, hint
        error.args = (f"{where}: got {error.got}; need {error.need}. Try {hint}.",)


def worded(hint: str, options: Collection[str]) -> str:
    """A hint without Python.

    Example:
        >>> worded("removing it, or --skip-broken (on_broken='skip')", ["--skip-broken"])
        'removing it, or --skip-broken'
        >>> worded("removing it, or --skip-broken (on_broken='skip')", [])
        'removing it'
        >>> worded("another model, or load(directory, into=…)", [])
        'another model'
        >>> worded("load(directory, into=…)", [])
        'in Python load(directory, into=…)'
        >>> worded("groups=4 or 8", [])
        'groups=4 or 8'
    """
    text = without_arguments(hint)
    words = _BETWEEN.split(_shielded(text))
    parts = [(between, part) for between, part in zip(["", *words[1::2]], words[::2], strict=True)]
    kept = [pair for pair in parts if not _foreign(pair[1], options)]
    if len(kept) == len(parts):
        return text
    if not kept:
        return f"in Python {hint}" if any(_called(part) for _, part in parts) else text
    last = parts[-1][0] if len(kept) > 1 else ""
    kept[-1] = (last, kept[-1][1])
    return _unshielded(
        "".join(between * (at > 0) + part for at, (between, part) in enumerate(kept))
    )


def _foreign(part: str, options: Collection[str]) -> bool:
    """Whether an alternative is Python, or an option that the command lacks."""
    if "`" in part:  # a whole command to copy
        return False
    return _called(part) or any(found not in options for found in _OPTION.findall(part))


def _called(part: str) -> bool:
    return any(found[1] not in TARGETS for found in _CALL.finditer(part))


def without_arguments(text: str) -> str:
    """A text without the brackets that hold arguments of Python."""
    at = 0
    while (at := text.find(" (", at)) >= 0:
        end = _closing(text, at + 1)
        if _ARGUMENT.search(text[at + 2 : end]) and "--" in text[:at]:
            text = text[:at] + text[end + 1 :]
        else:
            at += 1
    return text


def _closing(text: str, at: int) -> int:
    """Where the bracket closes that opens at a place; the end, if it does not."""
    depth = 0
    for end in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return end
    return len(text)


_INSIDE = {", ": "\0c", " or ": "\0o", "; ": "\0s"}


def _shielded(text: str) -> str:
    """A text whose brackets and commands hold no sign at which alternatives part."""

    def hide(found: re.Match[str]) -> str:
        part = found[0]
        for sign, mark in _INSIDE.items():
            part = part.replace(sign, mark)
        return part

    return re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)|`[^`]*`", hide, text)


def _unshielded(text: str) -> str:
    for sign, mark in _INSIDE.items():
        text = text.replace(mark, sign)
    return text
