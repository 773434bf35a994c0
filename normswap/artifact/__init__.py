"""The artefact: a directory that holds a model, and ``load_model`` for any spec.

    model.safetensors   the weights
    normswap.json       how to build the BN original, what was swapped, preprocessing, history
    README.md           a model card

This room refuses to unpickle, to trust (the JSON is checked field by field, the weights by their
SHA-256) and to leave half an artefact: everything is written to a sibling directory and renamed.
"""

from normswap.artifact.hub import Push, push_to_hub
from normswap.artifact.loading import load, load_model
from normswap.artifact.writing import check_target, save

__all__ = ["Push", "check_target", "load", "load_model", "push_to_hub", "save"]
