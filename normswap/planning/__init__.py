"""Decide, per site, what becomes what and why not."""

from normswap.planning.document import KEEP, Plan, PlanEntry
from normswap.planning.planner import Patterns, Target, inputs_for, plan

__all__ = ["KEEP", "Patterns", "Plan", "PlanEntry", "Target", "inputs_for", "plan"]
