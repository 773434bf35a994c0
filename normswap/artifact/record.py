"""``normswap.json``: its version, its digest and its fields, of which nothing is believed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import normswap
from normswap.data import Preprocessing
from normswap.errors import ArtifactError, DataError
from normswap.files import current, json_digest
from normswap.provenance import Provenance
from normswap.reading import reading
from normswap.regular import read_text

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
RECORD = "normswap.json"
CARD = "README.md"
OWN_FILES = (WEIGHTS, CARD, RECORD)


@dataclass(frozen=True)
class Document:
    """``normswap.json``, of which nothing is believed."""

    folder: Path
    data: Mapping[str, Any]

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field of the given type."""
        value = self.data.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.malformed(name, value)
        return value

    def strings(self, name: str) -> list[str]:
        """A field that is a list of strings."""
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.malformed(name, values)
        return [str(value) for value in values]

    def aliases(self) -> dict[str, str]:
        """Further names of tensors that are stored once."""
        values = self.get("aliases", dict)
        if not all(isinstance(value, str) for value in values.values()):
            raise self.malformed("aliases", values)
        return dict(values)

    def malformed(self, name: str, value: Any) -> ArtifactError:
        """The error for a field of the wrong type."""
        return ArtifactError(
            str(self.folder / RECORD),
            got=f"{name}={str(value)[:60]!r}",
            need=f"a well-formed field {name}",
            hint="saving the model again; the file has been edited or damaged",
        )

    def provenance(self) -> Provenance:
        """Everything that travels with the model."""
        objects = {name: self.get(name, list) for name in ("plans", "history")}
        for name, entries in objects.items():
            if not all(isinstance(entry, dict) for entry in entries):
                raise self.malformed(name, entries)
        names = None if self.data.get("class_names") is None else self.strings("class_names")
        preprocessing = self.get("preprocessing", (dict, type(None)))
        try:
            Preprocessing.from_json(preprocessing or {})
        except DataError as error:
            raise self.malformed("preprocessing", error.got) from error
        return Provenance(
            source=self.get("source", (dict, type(None))),
            preprocessing=preprocessing,
            class_names=None if names is None else tuple(names),
            plans=tuple(objects["plans"]),
            history=tuple(objects["history"]),
        )


def read_record(folder: Path) -> Mapping[str, Any]:
    """Read ``normswap.json``; check its version, then its digest."""
    path = current(folder, RECORD)
    if not path.exists():
        raise ArtifactError(
            str(folder),
            got=f"no {RECORD}",
            need="a directory that normswap saved",
            hint="the folder that `normswap convert -o` named",
        )
    with reading(path, ArtifactError, need="JSON", hint="saving the model again"):
        data = json.loads(read_text(path))
        json.dumps(data, ensure_ascii=False).encode()  # half a sign could not be written again
        digest = record_digest(data) if isinstance(data, dict) else ""
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise ArtifactError(
            str(path),
            got=f"format_version {version!r}",
            need="a positive integer",
            hint="saving the model again",
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            str(path),
            got=f"format_version {version}, written by normswap {data.get('normswap', '?')}",
            need=f"at most {FORMAT_VERSION}, which normswap {normswap.__version__} reads",
            hint="`pip install --upgrade normswap`",
        )
    if data.get("record_sha256") != digest:
        raise ArtifactError(
            str(path),
            got="content that does not agree with its own SHA-256",
            need="the file as normswap wrote it",
            hint="copying the artefact again, or loading and saving it to change a field",
        )
    result: Mapping[str, Any] = data
    return result


def record_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a record's content."""
    return json_digest(document, seal="record_sha256")


def stamp(folder: Path) -> list[tuple[str, int, int, int]]:
    """Which files lie where now; nobody changes one in place, each writing makes new ones."""
    found: list[tuple[str, int, int, int]] = []
    for name in (RECORD, WEIGHTS):
        with contextlib.suppress(OSError):
            place = current(folder, name)
            facts = place.stat()
            found.append((str(place), facts.st_ino, facts.st_mtime_ns, facts.st_size))
    return found
