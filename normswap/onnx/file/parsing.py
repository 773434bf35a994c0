"""Read an ONNX file that nobody vouches for, without opening a session. Free of torch.

Everything here works on the parsed protobuf in Python. External data must lie in the file's own
folder, in a plain file, within its bounds; sizes that tensors claim must match what they carry.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from normswap.errors import ExportError, in_short
from normswap.regular import check_regular, open_regular

_MOST_BYTES = 1 << 31
"""Protobuf's own bound; larger weights lie beside the file."""
_CHUNK = 1 << 20
_MAX_DEPTH = 128
"""Messages in messages; a subgraph takes three."""

MAX_NODES = 1_000_000
"""A hundred times those of the largest networks that people export."""

_DATA = {"raw_data", "float_data", "int32_data", "string_data"} | {
    *("int64_data", "double_data", "uint64_data")
}

_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT16: 16,
    onnx.TensorProto.INT16: 16,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.UINT32: 32,
    onnx.TensorProto.UINT64: 64,
    onnx.TensorProto.BFLOAT16: 16,
}


@dataclass(frozen=True)
class OnnxFile:
    """A parsed file whose references to other files have been checked.

    Attributes:
        path: where it lies.
        proto: the model; external tensors are not loaded.
    """

    path: Path
    proto: onnx.ModelProto

    @property
    def folder(self) -> Path:
        """Where external data may lie."""
        return self.path.resolve().parent

    @property
    def reaches_out(self) -> bool:
        """Whether some of its data lie outside."""
        return any(map(is_external, tensors(self.proto)))


def read_onnx(path: str | Path) -> OnnxFile:
    """Parse a file and check everything that can be checked without running it.

    Raises:
        ExportError: no such file, no ONNX model, truncated, or with external data outside of the
            file's folder.
    """
    where = Path(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(_bytes_in(where))
    except OSError as error:
        got = f"{error.strerror or error}".lower()
        raise ExportError(str(where), got=got, need="an ONNX file", hint="another path") from error
    except (DecodeError, ValueError, RecursionError, MemoryError) as error:
        raise _not_onnx(where, f"bytes that are no ONNX protobuf ({in_short(error)})") from error
    if not all(map(_is_text, messages(proto))):
        raise _not_onnx(where, "an ONNX protobuf whose names are no text")
    file = OnnxFile(where, proto)
    if not proto.graph.node or not proto.opset_import or not proto.graph.output:
        raise _not_onnx(where, "a protobuf without an ONNX graph in it")
    for tensor in tensors(proto):
        _check_tensor(file, tensor)
    if any(isinstance(m, onnx.NodeProto) and m.op_type == "EPContext" for m in messages(proto)):
        raise _not_onnx(where, "a graph compiled for one machine (EPContext)")
    if unfolded(proto) > MAX_NODES:
        raise _not_onnx(where, f"functions that unfold to more than {MAX_NODES:,} nodes")
    return file


def _bytes_in(path: Path) -> bytes:
    if check_regular(path) > _MOST_BYTES:
        raise _not_onnx(path, f"more than {_MOST_BYTES} bytes, which no ONNX file can have")
    with open_regular(path) as stream:
        return stream.read()


def save(file: OnnxFile) -> None:
    """Write the protobuf back; external data stay as they lie."""
    file.path.write_bytes(file.proto.SerializeToString())


def unfolded(proto: onnx.ModelProto) -> float:
    """How many nodes a graph has once its functions are put in; infinite where they never end."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[tuple[str, str, str], float] = {}

    def size_of(message: Message, depth: int) -> float:
        total = 0.0
        for node in messages(message):
            if isinstance(node, onnx.NodeProto):
                total += 1 + called((node.domain, node.op_type, node.overload), depth)
        return total

    def called(key: tuple[str, str, str], depth: int) -> float:
        if key not in functions:
            return 0.0
        if depth > _MAX_DEPTH:
            return math.inf
        if key not in sizes:
            sizes[key] = size_of(functions[key], depth + 1)
        return sizes[key]

    return size_of(proto.graph, 0)


def values_of(value: Any) -> Sequence[Any]:
    """The values of a protobuf field, whether it holds one or many."""
    return (value,) if isinstance(value, str | bytes | int | float | Message) else value


def messages(message: Message, depth: int = 0) -> Iterator[Message]:
    """A message and every one inside it, whatever field it lies in.

    Raises:
        ExportError: nested deeper than any exporter makes.
    """
    if depth > _MAX_DEPTH:
        raise ExportError(
            "ONNX graph",
            got=f"messages nested deeper than {_MAX_DEPTH}",
            need="a model made by an exporter",
            hint="exporting it again",
        )
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in values_of(value):
                yield from messages(item, depth + 1)


def reads(node: onnx.NodeProto) -> list[str]:
    """What a node reads: its inputs, and what the graphs in it read, from wherever it comes."""
    inner = [m for m in messages(node) if isinstance(m, onnx.NodeProto | onnx.GraphProto)]
    nodes = (name for m in inner if isinstance(m, onnx.NodeProto) for name in m.input)
    outputs = (v.name for m in inner if isinstance(m, onnx.GraphProto) for v in m.output)
    return [*nodes, *outputs]


def _is_text(message: Message) -> bool:
    """Whether every string is one: protobuf hands out bytes where it is not valid UTF-8."""
    return all(
        isinstance(text, str)
        for field, value in message.ListFields()
        if field.type == FieldDescriptor.TYPE_STRING
        for text in values_of(value)
    )


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds: initializers, attributes, subgraphs, functions."""
    return (message for message in messages(proto) if isinstance(message, onnx.TensorProto))


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor names another file; judged by what is there, not by the flag alone."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0


@dataclass(frozen=True)
class External:
    """A checked reference to external data."""

    path: Path
    offset: int
    length: int

    def pieces(self) -> Iterator[bytes]:
        """The bytes, some at a time; fewer than there should be if the file ends."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            left = self.length
            while left and (piece := stream.read(min(left, _CHUNK))):
                left -= len(piece)
                yield piece


def external(file: OnnxFile, tensor: onnx.TensorProto) -> External:
    """Where a tensor's bytes lie, once that is known to be safe.

    Raises:
        ExportError: an absolute path, one that climbs out, a link, a missing or short file.
    """
    facts = {entry.key: entry.value for entry in tensor.external_data}
    if len(facts) < len(tensor.external_data):
        raise _unsafe(file, tensor.name, "external data with the same key twice")
    path = _inside(file, tensor.name, facts.get("location", ""))
    need = _bytes_of(file, tensor)
    offset, length = (_number(file, tensor, facts.get(k)) for k in ("offset", "length"))
    offset = offset or 0
    length = need if length is None else length
    size = path.stat().st_size
    if offset < 0 or length != need or offset + length > size:
        raise _unsafe(
            file,
            tensor.name,
            f"bytes {offset} to {offset + length} of {path.name!r}, which has {size}, for a "
            f"tensor of {need}",
        )
    return External(path, offset, length)


def _inside(file: OnnxFile, name: str, location: str) -> Path:
    pure = PurePosixPath(location)
    bad = (
        not location
        or "\0" in location
        or "\\" in location
        or pure.is_absolute()
        or PureWindowsPath(location).drive != ""
        or ".." in pure.parts
        or len(location) > 1024
    )
    if bad:
        raise _unsafe(file, name, f"external data at {location[:80]!r}")
    path = file.folder.joinpath(*pure.parts)
    walked = file.folder
    for part in pure.parts:
        walked = walked / part
        if walked.is_symlink():
            raise _unsafe(file, name, f"external data through the link {location!r}")
    if not path.is_file():
        got = f"external data at {location!r}, where there is no file"
        raise _unsafe(file, name, got, hint="copying that file along, or exporting again")
    if path.stat().st_nlink > 1:
        raise _unsafe(file, name, f"external data at {location!r}, a hard link")
    return path


def _number(file: OnnxFile, tensor: onnx.TensorProto, text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise _unsafe(file, tensor.name, f"external data with an offset or length of {text[:40]!r}")
    return int(text)


def _bytes_of(file: OnnxFile, tensor: onnx.TensorProto) -> int:
    bits = _BITS.get(tensor.data_type)
    if bits is None or any(size < 0 for size in tensor.dims):
        raise _unsafe(file, tensor.name, f"data type {tensor.data_type}, dims {list(tensor.dims)}")
    return int(math.prod(tensor.dims)) * bits // 8


def _check_tensor(file: OnnxFile, tensor: onnx.TensorProto) -> None:
    if is_external(tensor):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            raise _unsafe(file, tensor.name, "external data that is not flagged as such")
        if any(field.name in _DATA for field, _ in tensor.ListFields()):
            raise _unsafe(file, tensor.name, "external data beside data of its own")
        external(file, tensor)
        return
    if not tensor.HasField("raw_data"):
        return
    need = _bytes_of(file, tensor) if tensor.data_type in _BITS else len(tensor.raw_data)
    if len(tensor.raw_data) != need:
        raise _not_onnx(
            file.path,
            f"tensor {tensor.name!r} of {len(tensor.raw_data)} bytes where its shape needs {need}",
        )


def external_bytes(file: OnnxFile, tensor: onnx.TensorProto) -> bytes:
    """The bytes of an external tensor."""
    return b"".join(external(file, tensor).pieces())


def data_of(path: Path) -> set[str]:
    """The names of the files that belong to an ONNX file and to no other."""
    if not path.is_file():
        return set()
    try:
        file = read_onnx(path)
    except ExportError:  # whatever it is, nothing beside it is known to be its own
        return set()
    places = {external(file, tensor).path for tensor in tensors(file.proto) if is_external(tensor)}
    own = f"{path.name}."
    return {p.name for p in places if p.parent == file.folder and p.name.startswith(own)}


def avoid_data_of(target: Path, file: OnnxFile) -> None:
    """Data beside ``file`` get a name that is free, so that an old ``target`` keeps its own."""
    old = file.path.with_name(f"{target.name}.data")
    if not old.exists() or not (target.parent / old.name).exists():
        return
    new = old.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
    old.rename(new)
    for tensor in tensors(file.proto):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == old.name:
                entry.value = new.name


def _not_onnx(path: Path, got: str) -> ExportError:
    return ExportError(
        str(path), got=got, need="a complete ONNX model", hint="exporting or copying it again"
    )


def _unsafe(
    file: OnnxFile,
    name: str,
    got: str,
    hint: str = "exporting the model again, or a copy from its author",
) -> ExportError:
    return ExportError(
        f"{file.path}, tensor {name[:80]!r}",
        got=got,
        need="external data in a plain file inside the model's own folder, within its bounds",
        hint=hint,
    )
