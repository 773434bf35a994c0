"""Run a model once and say what feeds each BatchNorm and what uses it. Changes no model."""

from __future__ import annotations

from normswap.graph.foreign import register_batchnorm
from normswap.graph.movable import Movable, movable_producers, scalable
from normswap.graph.sites import Activation, CallSite, Graph, Other, Producer, Removal, Site
from normswap.graph.walker import batchnorms, matches, qualified_names, walk
from normswap.running import call

__all__ = [
    "Activation",
    "CallSite",
    "Graph",
    "Movable",
    "Other",
    "Producer",
    "Removal",
    "Site",
    "batchnorms",
    "call",
    "matches",
    "movable_producers",
    "qualified_names",
    "register_batchnorm",
    "scalable",
    "walk",
]
