"""The record inside the file: its origin, its proof, how to check it. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from normswap.onnx.file.identity import graph_hash, metadata_hash
from normswap.onnx.file.identity_v1 import graph_hash_v1, uncovered
from normswap.onnx.file.parsing import OnnxFile, read_onnx, save
from normswap.onnx.file.selftest import MAX_TOLERANCE, SelfTest
from normswap.plain import plain

FORMAT = 2
"""Files of format 1 have the hash of version 0.1, and are still read."""
PREFIX = "normswap."

_JSON_KEYS = (
    "format_version",
    "source",
    "plans",
    "preprocessing",
    "class_names",
    "history",
    "versions",
    "export",
    "proof",
    "self_test",
)


@dataclass(frozen=True)
class Metadata:
    """What a file says about itself, once its hashes have been looked at.

    Attributes:
        fields: the decoded fields: ``source``, ``plans``, ``preprocessing``, ``class_names``,
            ``history``, ``versions``, ``export``, ``proof``, ``self_test``.
        problem: None, or why the file is not the one that these fields describe.
    """

    fields: Mapping[str, Any]
    problem: str | None = None

    @property
    def intact(self) -> bool:
        """Both hashes are the recorded ones."""
        return self.problem is None

    def self_test(self) -> SelfTest:
        """The self-test.

        Raises:
            ValueError: if it is not well-formed.
        """
        old = self.fields.get("format_version") == 1  # it could ask for more than now is granted
        return SelfTest.from_json(
            self.fields.get("self_test"), most=MAX_TOLERANCE if old else math.inf
        )


def write_metadata(file: OnnxFile, fields: Mapping[str, Any]) -> None:
    """Put fields and hashes into ``file.proto``, in place of what it carried before."""
    entries = {
        PREFIX + key: json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
        for key, value in {"format_version": FORMAT, **fields}.items()
    }
    entries[PREFIX + "graph_sha256"] = graph_hash(file)
    entries[PREFIX + "metadata_sha256"] = metadata_hash(entries.items())
    onnx.helper.set_model_props(file.proto, entries)


def sign(file: OnnxFile, fields: Mapping[str, Any]) -> None:
    """Save a file with its record and its hashes, and make sure that it can be read again.

    Raises:
        ExportError: what was written cannot be read.
    """
    write_metadata(file, fields)
    save(file)
    read_onnx(file.path)


def read_metadata(file: OnnxFile) -> Metadata | None:
    """The record of a file; None if normswap did not make it."""
    entries = [(entry.key, entry.value) for entry in file.proto.metadata_props]
    if not any(key.startswith(PREFIX) for key, _ in entries):
        return None
    fields, problem = _decode(dict(entries))
    return Metadata(fields, problem or _broken(file, entries, fields))


def _decode(entries: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    fields: dict[str, Any] = {}
    problem = None
    for key in _JSON_KEYS:
        try:
            fields[key] = json.loads(entries.get(PREFIX + key, "null"))
        except (ValueError, RecursionError):
            problem = problem or f"identity: its metadata field {key!r} is no JSON"
    return fields, problem


def _broken(
    file: OnnxFile, entries: list[tuple[str, str]], fields: Mapping[str, Any]
) -> str | None:
    """Why a file is not the one that its metadata describe; None if it is."""
    known = dict(entries)
    if len(known) < len(entries):
        return "identity: a key stands twice in its metadata"
    version = fields["format_version"]
    if version not in (1, FORMAT) or isinstance(version, bool):
        return f"identity: its metadata have format {version}, not {FORMAT}"
    if version == 1 and (gap := uncovered(file)) is not None:
        return f"identity: its hash, of version 0.1, does not cover {gap}: export the model again"
    recorded = known.get(PREFIX + "graph_sha256", "missing")
    found = graph_hash_v1(file) if version == 1 else graph_hash(file)
    if found != recorded:
        return (
            f"identity: SHA-256 of nodes, attributes and initializers is {found[:12]}…, the "
            f"recorded one is {recorded[:12]}…: the file was edited after its proof"
        )
    rest = [
        (key, value)
        for key, value in entries
        if key != PREFIX + "metadata_sha256" and (version != 1 or key.startswith(PREFIX))
    ]
    if metadata_hash(rest) != known.get(PREFIX + "metadata_sha256"):
        return "identity: the SHA-256 of its metadata is not the recorded one: they were edited"
    return None
