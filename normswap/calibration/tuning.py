"""The settings of the distillation, as the research left them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """What the research settled; see examples/benchmarks/NOTES.md.

    Attributes:
        rate: learning rate of all sites together, in spreads of their outputs; one site gets its
            share, because what the sites do adds up along the network.
        most: largest rate of one site.
        site_weight: weight of the sites' mean error beside the outputs'.
        sites: share of the sites that a step looks at; looking at all costs half as much again.
        mix: share of the images that are mixed with another one.
        jitter: spread of a random gain and offset per image and input channel.
        warp: largest zoom and shift, as a share of the image.
    """

    rate: float = 0.5
    most: float = 0.03
    site_weight: float = 3.0
    sites: float = 0.3
    mix: float = 0.5
    jitter: float = 0.1
    warp: float = 0.15
