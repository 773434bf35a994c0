"""Weight files: read them without running what they hold.

Safetensors, or what ``torch.save`` wrote, read with ``weights_only=True`` and never without.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from normswap.errors import CheckpointError, some
from normswap.fitting import fit_checkpoint
from normswap.pickles import unfolds
from normswap.reading import reading
from normswap.regular import check_regular

logger = logging.getLogger("normswap")

# in the order of preference: averaged weights are the ones their makers report
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "module",
    "weights",
)
_NO_WEIGHTS = frozenset({"optimizer", "optimizers", "optimizer_states", "lr_schedulers", "scaler"})
_SHOWN = 3
_MOST_WRAPPERS = 16
"""Mappings in mappings, down to the one that holds the weights."""


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a weight file into a flat state dict on the CPU.

    The usual wrappers (``state_dict``, ``model``, ``state_dict_ema`` …) and prefixes (``module.``,
    ``_orig_mod.``) are taken off; averaged weights are preferred where a file holds both.

    Args:
        path: ``.safetensors``, or a file of ``torch.save``. Of the classes a pickle may name, only
            tensors and ``argparse.Namespace`` (timm's ``args``) are let in.

    Raises:
        CheckpointError: no such file, a truncated one, a pickle with code or foreign classes in it
            (nothing of which runs), or no weights inside.
    """
    path = Path(path)
    try:
        check_regular(path)
    except OSError as error:
        raise CheckpointError(
            str(path),
            got="a folder" if path.is_dir() else str(error.strerror).lower(),
            need="a .safetensors, .pth, .pt or .bin file",
            hint="another path",
        ) from error
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    state = _unwrap(content) or _joined(content)
    if not state:
        raise CheckpointError(
            str(path),
            got=f"no weights ({_describe(content)})",
            need="a state dict, bare or under " + ", ".join(_WRAPPERS[:5]),
            hint="saving model.state_dict()",
        )
    return _without_prefixes(state)


def save_checkpoint(content: Any, path: Path) -> None:
    """``torch.save`` by way of Python's own file, whose errors say what is wrong with a disk."""
    with path.open("wb") as file:
        torch.save(content, file)


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:  # some files are named .bin or .pth and are safetensors inside
        return file.read(10)[8:] in (b'{"', b"{ ", b"{}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        return load_file(path)


def check_archive(path: Path) -> None:
    """Make sure that a file of ``torch.save`` unpacks to no more than it is.

    Raises:
        OSError: it is no regular file, an archive that grows when it is unpacked, or a pickle
            whose objects hold one another over and over, or more than the file can.
        zipfile.BadZipFile: it is an archive that can be read in two ways.
    """
    size = check_regular(path)
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:
            got = f"an archive of {size} bytes that unpacks to {unpacked}"
            raise OSError(errno.EFBIG, got, str(path))
    if unfolds(path):
        raise OSError(errno.EFBIG, "a pickle that unfolds to far more than it is", str(path))


def _read_pickle(path: Path) -> Any:
    with _reading(path):
        check_archive(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore")  # remarks on TorchScript archives: an error follows
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                _refuse_foreign(path, error)
                raise


def _refuse_foreign(path: Path, error: Exception) -> None:
    foreign = _foreign_names(path, error)
    if foreign is not None:
        raise CheckpointError(
            str(path),
            got=f"a pickle that holds more than tensors: {foreign}; nothing of it was run",
            need="a state dict of tensors",
            hint="torch.save(model.state_dict(), …) or safetensors, where the file was made",
        ) from error


def _foreign_names(path: Path, error: Exception) -> str | None:
    """The classes or functions a pickle asks for, or None if it is merely broken."""
    blocked = re.search(r"(?:GLOBAL|instruction|class|import)\s+`?([\w.]+\.[\w.]+)`?", str(error))
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  (legacy or broken files: the message has to do)
        names = []
    names = [n for n in names or _pickled_names(path) if n != "argparse.Namespace"]
    if names:
        return ", ".join(sorted(names)[:_SHOWN])
    return blocked.group(1) if blocked else None


def _pickled_names(path: Path) -> list[str]:
    """What a bare pickle (``pickle.dump``, not ``torch.save``) would import; it is not run."""
    with path.open("rb") as file:
        if file.read(1) != pickle.PROTO:
            return []
        file.seek(0)
        names, strings = [], ["", ""]
        try:
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except Exception:  # noqa: BLE001 - a broken pickle names what it got to
            return names
    return names


def _reading(path: Path) -> contextlib.AbstractContextManager[None]:
    return reading(
        path,
        CheckpointError,
        what=f"an unreadable file of {path.stat().st_size} bytes",
        need="a complete .safetensors, .pth, .pt or .bin file",
        hint="downloading or copying it again",
    )


def _unwrap(
    content: Any, depth: int = 0, known: dict[int, dict[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """The first mapping under the usual names that is no mere part: no half of the fullest one.

    Every mapping is looked into once, however often it stands in the others, itself included.
    """
    known = {} if known is None else known
    if not isinstance(content, Mapping) or depth > _MOST_WRAPPERS:
        return {}
    if id(content) not in known:
        known[id(content)] = {}  # found again in itself
        known[id(content)] = _weights_in(content, depth, known)
    return known[id(content)]


def _weights_in(
    content: Mapping[Any, Any], depth: int, known: dict[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    wrapped = {name: _unwrap(content.get(name), depth + 1, known) for name in _WRAPPERS}
    most = max(map(len, wrapped.values()))
    for name, found in wrapped.items():
        if found and 2 * len(found) > most:
            logger.info("weights taken from the checkpoint's entry %s", name)
            return found
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors and len(tensors) < len(content):
        logger.info("ignored %d checkpoint entries: no tensors", len(content) - len(tensors))
    return tensors


def _joined(content: Any, path: str = "", depth: int = 3) -> dict[str, Tensor]:
    """Weights under names that nobody agreed on (DINO's student and teacher), as dotted names."""
    if not isinstance(content, Mapping) or not depth:
        return {}
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or name in _NO_WEIGHTS:
            continue
        if isinstance(value, Tensor) and path:
            found[path + name] = value
        else:
            found |= _joined(value, f"{path}{name}.", depth - 1)
    return found


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    state.pop("n_averaged", None)  # torch's AveragedModel counts here
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        state.pop("n_averaged", None)
    return state


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "keys: " + (some([str(key) for key in content]) or "none")
    return f"a {type(content).__name__}"


__all__ = ["check_archive", "fit_checkpoint", "load_checkpoint", "save_checkpoint"]
