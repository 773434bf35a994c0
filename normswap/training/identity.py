"""What a run depends on besides its options: its data, and what decides the last bits.

Kept in every checkpoint as short hashes, so that a resumed run can tell what has changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from normswap.files import content_digest, file_digest
from normswap.provenance import versions
from normswap.training.batches import in_memory
from normswap.training.samples import SeededReader

_WORDS = {
    "samples": "another number of samples",
    "names": "other file names, or in other classes",
    "sizes": "files of other sizes",
    "labels": "other labels",
    "contents": "other contents",
}
DATA = ("training data", "validation data")
_log = logging.getLogger("normswap")
_PACKAGES = ("torchvision", "timm", "numpy", "pillow", "accelerate")


def data_identity(data: Any, *, contents: bool = False) -> dict[str, Any] | None:
    """What can be told of a data set without running it; None where there is none.

    Args:
        data: anything that ``finetune`` takes.
        contents: read all of it, too. Tensors in memory are always read.

    Returns:
        Number of samples and hashes of names (below the folder that all files share), sizes,
        labels and contents; None for what cannot be told.
    """
    if data is None:
        return None
    data = data.dataset if isinstance(data, DataLoader) else data
    pair = in_memory(data)
    if pair is not None:
        return _described(len(pair[0]), labels=pair[1], contents=pair)
    files = _files(data)
    count = len(data) if hasattr(data, "__len__") else None
    if files is None:
        tensors = getattr(data, "tensors", None)
        read = _read(data, count) if contents and tensors is None and count else tensors
        return _described(count, labels=_labels(data), contents=read)
    paths = [os.path.abspath(p) for places, _ in files for p in places]  # noqa: PTH100  (links stay)
    root = os.path.commonpath([os.path.split(path)[0] for path in paths]) if paths else ""
    return _described(
        count,
        names=[os.path.relpath(path, root) for path in paths],
        sizes=[_size(path) for path in paths],
        labels=[label for _, label in files],
        contents=_hashes(paths) if contents else None,
    )


def _described(samples: int | None, **values: Any) -> dict[str, Any]:
    known = {name: value for name, value in values.items() if value is not None}
    return {"samples": samples, **{name: _short(value) for name, value in known.items()}}


def _short(value: Any) -> str:
    return content_digest(value)[:16]


def _files(data: Any) -> list[tuple[tuple[str, ...], Any]] | None:
    """The paths and the label of every sample, where the data are files."""
    if isinstance(data, Subset):
        inner = _files(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    if isinstance(data, ConcatDataset):
        parts = [_files(part) for part in data.datasets]
        known = [part for part in parts if part is not None]
        return [item for part in known for item in part] if len(known) == len(parts) else None
    if hasattr(data, "listed"):
        return [(tuple(map(str, places)), label) for places, label in data.listed()]
    reader = getattr(data, "reader", data)  # timm's data sets have one
    found = getattr(reader, "samples", None)
    if not isinstance(found, Sequence) or not all(map(_is_sample, found)):
        return None
    root = getattr(reader, "root", "")
    return [((os.path.join(root, path),), int(label)) for path, label in found]  # noqa: PTH118


def _is_sample(item: Any) -> bool:
    pair = isinstance(item, tuple) and len(item) == 2
    return pair and isinstance(item[0], str | os.PathLike) and isinstance(item[1], int)


def _labels(data: Any) -> Any:
    if isinstance(data, Subset):
        inner = _labels(data.dataset)
        return None if inner is None else [inner[index] for index in data.indices]
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if isinstance(found, Tensor) or hasattr(found, "tolist"):
            return torch.as_tensor(found).tolist()
        if isinstance(found, list) and all(isinstance(item, int | float | str) for item in found):
            return found  # of other things the text may name an address in memory
    return None


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # whoever reads it will say so
        return -1


def _hashes(paths: Iterable[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
        return list(pool.map(lambda path: file_digest(Path(path)), paths))


def _read(data: Any, count: int) -> str:
    """A hash over all samples, whatever they draw at random drawn from one seed."""
    digest = hashlib.sha256()
    reader = SeededReader(data, count, 0, 0, "skip")
    for index in range(count):
        digest.update(content_digest(reader[index]).encode())
    return digest.hexdigest()


def data_changes(what: str, now: Any, then: Any) -> list[str]:
    """What is not as it was, in words; what was not noted then cannot be compared."""
    if not isinstance(then, dict) or now is None:
        return []
    changed = [name for name in _WORDS if name in now and name in then and now[name] != then[name]]
    return [f"{what} with {' and '.join(_WORDS[name] for name in changed)}"] if changed else []


def say_what_is_not_known(identity: Mapping[str, Any]) -> None:
    """Of a data set of one's own only the length is known: reading its samples may have effects.

    Args:
        identity: what is kept, by kind of data.
    """
    counted = [kind for kind in DATA if identity[kind] is not None and len(identity[kind]) == 1]
    if counted:
        _log.info(
            "going on with %s of which only the number of samples was compared; --check-data "
            "(check_data=True) reads them all",
            " and ".join(counted),
        )


def machine_identity(device: torch.device | str | None) -> dict[str, Any]:
    """What decides the last bits of a result, as far as it can be known; None: what there is."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(device)
    where = platform.processor() or platform.machine()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "threads": torch.get_num_threads(),
        "device": f"{device.type} ({where})",
        **versions(*_PACKAGES),
        "torch": str(torch.__version__),
    }


def machine_changes(now: dict[str, Any], then: Any) -> list[str]:
    """What is not as it was."""
    if not isinstance(then, dict):
        return []
    return [f"{key}={now[key]} (was {then.get(key)})" for key in now if now[key] != then.get(key)]
