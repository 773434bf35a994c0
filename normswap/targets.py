"""The names of the targets, with one line each, and how settings are written behind a name.

``gn(groups=16)`` is a target with a setting, ``gn`` one with its defaults; a plan prints what it
decided in the same words. Free of torch, so that help texts cost nothing.
"""

from __future__ import annotations

import ast
import re
from typing import Any

TARGETS: dict[str, str] = {
    "gn": "Group Normalization; no batch dependence, the default choice for batch 1-8",
    "gn-ws": "gn behind convolutions whose weight is standardised; to be trained",
    "ln": "Layer Normalization in the GN paper's sense: one group over C, H and W",
    "in": "Instance Normalization; erases channel means, so it cannot keep a function",
    "frn": "Filter Response Normalization, with a TLU wherever a ReLU followed the BN",
    "evonorm": "EvoNorm-S0; per sample, in the place of a BN and the SiLU or ReLU behind it",
    "brn": "Batch Renormalization; exactly BN in eval mode, for batch 4-16",
    "cbn": "Cross-Iteration BN; exactly BN in eval mode, for batch 2-8",
    "naive-cbn": "Cross-Iteration BN without its Taylor compensation, for comparison",
    "gbn": "Ghost BN; BN over parts of a batch that is too large, exactly BN in eval mode",
    "syncbn": "BN over all processes; trains on GPUs only",
    "frozen": "BN in eval form for good; exact and independent of the batch",
    "bn": "back to plain BN from brn, cbn, frozen or syncbn, exactly",
}

FALLBACKS: tuple[str, ...] = ("frozen", "keep", "brn", "gn", "error")
"""What may happen at a site that the target cannot take."""

INITS: tuple[str, ...] = ("match", "copy", "reset")
"""How a per-sample target gets its affine parameters from the BN it replaces."""

STARTS: tuple[str, ...] = ("match", "steady", "copy", "reset")
"""The same as it may be asked for: ``steady`` is a match, once the producers are scaled."""

DEAD = "channels are dead: variance 0"
"""How the remark on a layer ends whose channels never varied."""

_MOST = 1000
"""Characters of a target; nobody needs as many."""
_TARGET = re.compile(r"\s*([^\s(),=]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def read_target(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of a target as it is written.

    Raises:
        ValueError: it is not written like ``gn(groups=16)``.

    Example:
        >>> read_target("cbn(window=4, variance_rule=drop)")
        ('cbn', {'window': 4, 'variance_rule': 'drop'})
    """
    if len(text) > _MOST:
        raise ValueError(f"{text[:20]!r} and {len(text) - 20} characters more are no target")
    found = _TARGET.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not written like gn(groups=16)")
    settings: dict[str, Any] = {}
    for setting in split_targets(found[2] or ""):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not (name.isidentifier() and equals and value) or name in settings:
            raise ValueError(f"{setting!r} in {text!r} is not one setting, like groups=16")
        settings[name] = _value(value)
    return found[1], settings


def split_targets(text: str) -> list[str]:
    """The parts of ``gn,cbn(window=4, burn_in=9)``, which no comma in brackets divides.

    Example:
        >>> split_targets("gn, cbn(window=4, burn_in=9)")
        ['gn', 'cbn(window=4, burn_in=9)']
    """
    parts, end, inside = [], len(text), False
    for at in reversed(range(len(text))):  # once: a pattern that looks ahead takes a day for 100 kB
        if text[at] in "()":
            inside = text[at] == ")"
        elif text[at] == "," and not inside:
            parts.append(text[at + 1 : end])
            end = at
    parts.append(text[:end])
    return [part.strip() for part in reversed(parts) if part.strip()]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text  # a word, as auto is
