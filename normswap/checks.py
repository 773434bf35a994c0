"""Checks of single values that come from a user or a file. Free of torch."""

from __future__ import annotations

import math
import sys
from typing import Any


def whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether ``value`` is an integer within two bounds; True and False are none.

    Example:
        >>> whole(3, 1), whole(0, 1), whole(3.0, 1), whole(True, 1)
        (True, False, False, False)
    """
    plain = isinstance(value, int) and not isinstance(value, bool)
    return plain and least <= value <= most


def number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether ``value`` is a finite number within two bounds; True and False are none.

    Example:
        >>> number(0.5, 0, 1), number(2, 0, 1), number(float("nan")), number(True)
        (True, False, False, False)
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    finite = plain and abs(value) <= sys.float_info.max  # a whole number may be beyond any float
    return finite and least <= value <= most


def above(value: Any, bound: float) -> bool:
    """Whether ``value`` is a finite number greater than ``bound``."""
    return number(value, bound) and value > bound
