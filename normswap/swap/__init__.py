"""Apply a plan. The only room that mutates a model; all or nothing."""

from __future__ import annotations

from normswap.swap.apply import Conversion, apply_plan, convert

__all__ = ["Conversion", "apply_plan", "convert"]
