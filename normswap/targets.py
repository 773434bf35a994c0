"""The names of the targets, with one line each. Free of torch, so that help texts cost nothing."""

from __future__ import annotations

TARGETS: dict[str, str] = {
    "gn": "Group Normalization; no batch dependence, the default choice for batch 1-8",
    "ln": "Layer Normalization in the GN paper's sense: one group over C, H and W",
    "in": "Instance Normalization; erases channel means, so it cannot keep a function",
    "frn": "Filter Response Normalization, with a TLU wherever a ReLU followed the BN",
    "evonorm": "EvoNorm-S0; per sample, in the place of a BN and the SiLU or ReLU behind it",
    "brn": "Batch Renormalization; exactly BN in eval mode, for batch 4-16",
    "cbn": "Cross-Iteration BN; exactly BN in eval mode, for batch 2-8",
    "naive-cbn": "Cross-Iteration BN without its Taylor compensation, for comparison",
    "syncbn": "BN over all processes; trains on GPUs only",
    "frozen": "BN in eval form for good; exact and independent of the batch",
    "bn": "back to plain BN from brn, cbn, frozen or syncbn, exactly",
}

FALLBACKS: tuple[str, ...] = ("frozen", "keep", "brn", "gn", "error")
"""What may happen at a site that the target cannot take."""

INITS: tuple[str, ...] = ("match", "copy", "reset")
"""How a per-sample target gets its affine parameters from the BN it replaces."""
