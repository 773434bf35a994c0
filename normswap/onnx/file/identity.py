"""What makes an ONNX file this one: a hash over all that a runtime reads, and one of its metadata.

The graph's hash walks the protobuf schema: every field that is set counts, whatever it is called
and whichever release of ONNX adds it; so do fields that this release does not know, and the bytes
of external data. Three things are left out because they change no output: the documentation, the
names of nodes, and the metadata, which have a hash of their own. A hash finds edits; it is no
signature, since whoever edits a file can also write a new hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from normswap.onnx.file.parsing import OnnxFile, external, is_external, values_of

_LEFT_OUT = {
    (onnx.NodeProto, "name"),
    (onnx.ModelProto, "metadata_props"),
    # where the bytes of a tensor lie; the bytes themselves count, wherever that is
    (onnx.TensorProto, "data_location"),
    (onnx.TensorProto, "external_data"),
}

_DTYPES = {
    FieldDescriptor.TYPE_FLOAT: "<f4",
    FieldDescriptor.TYPE_DOUBLE: "<f8",
    FieldDescriptor.TYPE_UINT64: "<u8",
}
"""Numbers are hashed as these; all other kinds, whole ones, as 64 bits with a sign."""


class _Digest:
    """A SHA-256 over tagged, length-prefixed fields, so that no two structures read the same."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.sha = hashlib.sha256()

    def number(self, value: int) -> None:
        self.sha.update(value.to_bytes(8, "little", signed=True))

    def bytes(self, data: bytes) -> None:
        self.number(len(data))
        self.sha.update(data)

    def message(self, message: Message) -> None:
        """Every field that is set, in the order of their numbers, then an end mark."""
        for field, value in message.ListFields():
            if field.name != "doc_string" and (type(message), field.name) not in _LEFT_OUT:
                self.number(field.number)
                self.values(field, values_of(value))
        if isinstance(message, onnx.TensorProto) and is_external(message):
            self.number(onnx.TensorProto.RAW_DATA_FIELD_NUMBER)
            self.number(1)  # one value, as if it lay in the file
            place = external(self.file, message)
            self.number(place.length)
            for piece in place.pieces():
                self.sha.update(piece)
        self.unknown(UnknownFieldSet(message))
        self.number(0)

    def values(self, field: FieldDescriptor, values: Any) -> None:
        self.number(len(values))
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in values:
                self.message(item)
        elif field.type == FieldDescriptor.TYPE_BYTES:
            for item in values:
                self.bytes(item)
        elif field.type == FieldDescriptor.TYPE_STRING:
            for item in values:
                self.bytes(item.encode())
        else:
            self.sha.update(np.array(values, _DTYPES.get(field.type, "<i8")).tobytes())

    def unknown(self, fields: UnknownFieldSet) -> None:
        """Fields that this release of ONNX has no name for; the runtime may know them."""
        for field in fields:
            self.number(-field.field_number)
            self.number(field.wire_type)
            if isinstance(field.data, bytes):
                self.bytes(field.data)
            elif isinstance(field.data, int):
                self.bytes(str(field.data).encode())
            else:
                self.unknown(field.data)
                self.number(0)


def graph_hash(file: OnnxFile) -> str:
    """SHA-256 over everything in a file that a runtime reads, in hex."""
    digest = _Digest(file)
    digest.message(file.proto)
    return digest.sha.hexdigest()


def metadata_hash(entries: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over metadata, sorted by key, in hex."""
    sha = hashlib.sha256()
    for pair in sorted(entries):
        for text in pair:
            data = text.encode()
            sha.update(len(data).to_bytes(8, "little"))
            sha.update(data)
    return sha.hexdigest()
