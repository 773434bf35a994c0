"""How many files the fuzz tests make: ``NORMSWAP_FUZZ=long`` means the same in all of them."""

import os

_ASKED = os.environ.get("NORMSWAP_FUZZ", "short")
if _ASKED not in ("short", "long"):
    raise ValueError(f"NORMSWAP_FUZZ: got {_ASKED!r}; need short or long. Try NORMSWAP_FUZZ=long.")


def count(long: int, short: int) -> int:
    """So many files."""
    return long if _ASKED == "long" else short
