"""Run a model once and say what feeds each BatchNorm and what uses it. Changes no model."""

from __future__ import annotations

from normswap.graph.sites import Activation, CallSite, Graph, Producer, Removal, Site
from normswap.graph.walker import batchnorms, call, matches, qualified_names, walk

__all__ = [
    "Activation",
    "CallSite",
    "Graph",
    "Producer",
    "Removal",
    "Site",
    "batchnorms",
    "call",
    "matches",
    "qualified_names",
    "walk",
]
