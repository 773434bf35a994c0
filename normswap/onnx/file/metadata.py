"""The record inside the file: its origin, its proof, how to check it. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from normswap.onnx.file.identity import graph_hash, metadata_hash
from normswap.onnx.file.parsing import OnnxFile
from normswap.onnx.file.selftest import SelfTest
from normswap.plain import plain

FORMAT = 1
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
        return SelfTest.from_json(self.fields.get("self_test"))


def write_metadata(file: OnnxFile, fields: Mapping[str, Any]) -> None:
    """Put fields and hashes into ``file.proto``, in place of what it carried before."""
    entries = {
        PREFIX + key: json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
        for key, value in {"format_version": FORMAT, **fields}.items()
    }
    entries[PREFIX + "graph_sha256"] = graph_hash(file)
    entries[PREFIX + "metadata_sha256"] = metadata_hash(entries)
    onnx.helper.set_model_props(file.proto, entries)


def read_metadata(file: OnnxFile) -> Metadata | None:
    """The record of a file; None if normswap did not make it."""
    entries = {entry.key: entry.value for entry in file.proto.metadata_props}
    ours = {key: value for key, value in entries.items() if key.startswith(PREFIX)}
    if not ours:
        return None
    return Metadata(*_decode(file, ours))


def _decode(file: OnnxFile, entries: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    fields: dict[str, Any] = {}
    problem = _broken_hash(file, entries)
    for key in _JSON_KEYS:
        try:
            fields[key] = json.loads(entries.get(PREFIX + key, "null"))
        except (ValueError, RecursionError):
            problem = problem or f"identity: its metadata field {key!r} is no JSON"
    if problem is None and fields["format_version"] != FORMAT:
        problem = f"identity: its metadata have format {fields['format_version']}, not {FORMAT}"
    return fields, problem


def _broken_hash(file: OnnxFile, entries: dict[str, str]) -> str | None:
    recorded = entries.get(PREFIX + "graph_sha256", "missing")
    found = graph_hash(file)
    if found != recorded:
        return (
            f"identity: SHA-256 of nodes, attributes and initializers is {found[:12]}…, the "
            f"recorded one is {recorded[:12]}…: the file was edited after its proof"
        )
    rest = {key: value for key, value in entries.items() if key != PREFIX + "metadata_sha256"}
    if metadata_hash(rest) != entries.get(PREFIX + "metadata_sha256"):
        return "identity: the SHA-256 of its metadata is not the recorded one: they were edited"
    return None
