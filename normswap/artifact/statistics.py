"""What a passage needs of the BatchNorms that are gone, in the header of the weights file.

There it is covered by the file's SHA-256, and whoever reads the weights with another library never
sees it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from normswap.errors import ArtifactError
from normswap.passage import FIELDS

_KEY = "batchnorms"

Sites = dict[str, dict[str, Tensor]]
"""What a passage needs of each BatchNorm, by its name."""


def packed(statistics: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Metadata for ``save_file``; empty where nothing is known."""
    if not statistics:
        return {}
    tensors = {
        f"{name}/{field}": value.detach().cpu().contiguous()
        for name, site in statistics.items()
        for field, value in site.items()
    }
    return {_KEY: base64.b64encode(save(tensors)).decode()}


def unpacked(path: Any) -> Sites:
    """What ``packed`` gave, from a weights file.

    Raises:
        ValueError: it is there, but is not what ``packed`` writes.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    if text is None:
        return {}
    try:
        tensors = load(base64.b64decode(text, validate=True))
    except (binascii.Error, SafetensorError, KeyError) as error:
        raise ValueError(f"statistics that cannot be read ({error})") from error
    found: Sites = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        found.setdefault(name, {})[field] = value
    if any(not _is_whole(site) for site in found.values()):
        raise ValueError("statistics that are not whole")
    return found


def _is_whole(site: Mapping[str, Tensor]) -> bool:
    shapes = {site[name].shape for name in site if name != "eps"}
    floats = all(value.is_floating_point() for value in site.values())
    return set(site) == set(FIELDS) and floats and len(shapes) == 1 and site["eps"].ndim == 0


def check_channels(where: str, model: nn.Module, statistics: Sites) -> None:
    """Make sure that the statistics are those of layers of this model.

    Raises:
        ArtifactError: they are not.
    """
    modules = dict(model.named_modules())
    for name, site in statistics.items():
        layer = modules.get(name)
        if layer is None or any(len(site["mean"]) != len(p) for p in layer.parameters(False)):
            raise ArtifactError(
                where,
                got=f"statistics that do not fit {name}",
                need="those of the BatchNorm that stood there",
                hint="copying the artefact again: the file has been edited or damaged",
            )
