"""Mutated files under ``normswap verify``: no crash, no hang, no look outside the file's folder.

``NORMSWAP_FUZZ=long pytest -o timeout=3600 tests/test_onnx_fuzz.py`` makes 1,000 of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fuzz_length
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx_support import Net, live

from normswap import children
from normswap.cli.app import app
from normswap.onnx import export_onnx
from normswap.onnx.file.metadata import read_metadata, write_metadata
from normswap.onnx.file.parsing import OnnxFile, messages, read_onnx

COUNT = fuzz_length.count(1000, 240)
OPENED: list[str] = []
PLACES = ["/etc/passwd", "../x", "model.onnx", "", "a" * 2000, "\0", "..\\..\\x", "/dev/zero"]


def _audit(event, arguments):
    if event == "open" and WATCHING:
        OPENED.append(str(arguments[0]))


WATCHING: list[bool] = []
sys.addaudithook(_audit)


def flipped(data, rng):
    for position in rng.integers(0, len(data), rng.integers(1, 9)):
        data[position] ^= int(rng.integers(1, 256))
    return data


def truncated(data, rng):
    return data[: int(rng.integers(0, len(data)))]


def doubled(data, rng):
    start = int(rng.integers(0, len(data)))
    return data[:start] + data[start : start + 200] + data[start:]


def with_metadata(data, rng):
    proto = onnx.ModelProto.FromString(bytes(data))
    entry = proto.metadata_props[int(rng.integers(0, len(proto.metadata_props)))]
    choice = int(rng.integers(0, 4))
    if choice == 0:
        entry.value = entry.value[: int(rng.integers(0, len(entry.value)))]
    elif choice == 1:
        entry.key = entry.key + "x"
    elif choice == 2:
        entry.value = "[" * 100_000
    else:
        proto.metadata_props.add().CopyFrom(entry)
        entry.value = '{"inputs":[{"shape":[-1,9999999999]}]}'
    return proto.SerializeToString()


def with_paths(data, rng):
    proto = onnx.ModelProto.FromString(bytes(data))
    tensor = proto.graph.initializer[int(rng.integers(0, len(proto.graph.initializer)))]
    tensor.data_location = int(rng.integers(0, 2))
    for key in ("location", "offset", "length"):
        entry = tensor.external_data.add()
        entry.key = key
        places = PLACES if key == "location" else ["0", "-1", "9" * 30, "x", ""]
        entry.value = places[int(rng.integers(0, len(places)))]
    return proto.SerializeToString()


def with_shapes(data, rng):
    proto = onnx.ModelProto.FromString(bytes(data))
    tensor = proto.graph.initializer[int(rng.integers(0, len(proto.graph.initializer)))]
    tensor.dims.append(int(rng.choice([-1, 0, 2, 2**40])))
    return proto.SerializeToString()


def with_labels(data, rng):
    """What no hash covers: these files stay the proven ones and run."""
    proto = onnx.ModelProto.FromString(bytes(data))
    node = proto.graph.node[int(rng.integers(0, len(proto.graph.node)))]
    node.name = "".join(map(chr, rng.integers(32, 1000, 30)))
    node.doc_string = "x" * 1000
    return proto.SerializeToString()


def with_fields(data, rng):
    """A field that torch's exporter leaves empty, somewhere in the schema."""
    proto = onnx.ModelProto.FromString(bytes(data))
    node = proto.graph.node[int(rng.integers(0, len(proto.graph.node)))]
    tensor = proto.graph.initializer[int(rng.integers(0, len(proto.graph.initializer)))]
    choice = int(rng.integers(0, 8))
    if choice == 0:
        node.attribute.add(name="s", type=11).sparse_tensor.values.external_data.add(key="location")
    elif choice == 1:
        node.overload = node.domain = "x"
    elif choice == 2:
        proto.functions.add(name=node.op_type, domain=node.domain).opset_import.add(version=1)
    elif choice == 3:
        proto.training_info.add().algorithm.node.add(op_type="Loop")
    elif choice == 4:
        node.metadata_props.add(key="k", value="v")
    elif choice == 5:
        tensor.segment.begin = 1
    elif choice == 6:
        tensor.float_data.append(1.0)
    else:
        proto.ir_version = int(rng.integers(0, 1 << 40))
        return proto.SerializeToString() + bytes([0xF8, 0x07, int(rng.integers(0, 128))])
    return proto.SerializeToString()


ODD = [None, True, -1, 0, 1.5, 1 << 10, 1 << 40, 1 << 70, 1e300, "x", "nan", [], {}, [[[]]]]


def forged(data, rng):
    """Another record, with hashes that fit it: somebody's own file."""
    proto = onnx.ModelProto.FromString(bytes(data))
    file = OnnxFile(Path("m.onnx"), proto)
    fields = dict(read_metadata(file).fields)
    del fields["format_version"]
    spot, key = fields, str(rng.choice(["self_test", *fields]))
    while isinstance(spot[key], dict | list) and spot[key] and rng.integers(0, 5):
        spot = spot[key]
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = keys[int(rng.integers(0, len(keys)))]
    spot[key] = ODD[int(rng.integers(0, len(ODD)))]
    write_metadata(file, fields)
    return proto.SerializeToString()


KINDS = [flipped, truncated, doubled, with_metadata, with_paths, with_shapes, with_fields]
KINDS += [with_labels, forged]


def how_many(kind):
    """Of the forged ones few by default: each is run, in a process of its own."""
    return 8 if kind is forged and COUNT < 1000 else -(-COUNT // len(KINDS))


def meaning(data):
    """All of a file but its names of nodes and its documentation."""
    proto = onnx.ModelProto.FromString(data)
    for message in messages(proto):
        if "doc_string" in message.DESCRIPTOR.fields_by_name:
            message.ClearField("doc_string")
        if isinstance(message, onnx.NodeProto):
            message.ClearField("name")
    return proto.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.onnx"
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert export_onnx(live(Net()), path, example_inputs=x).passed
    # what a verdict imports is opened now, and not while a mutated file is looked at
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 0
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_mutated_files_end_in_a_verdict_or_one_clear_line(kind, data, tmp_path, monkeypatch):
    rng = np.random.default_rng(KINDS.index(kind))
    opened = []
    original = children.Child.ask

    def watched(child, request, *arguments, **options):
        opened.append(request["path"])
        return original(child, request, *arguments, **options)

    monkeypatch.setattr(children.Child, "ask", watched)
    codes = set()
    path = tmp_path / "mutated.onnx"
    here = ["--timeout", "0"] if kind is with_labels else []  # the proven network, all of them
    for _ in range(how_many(kind)):
        path.write_bytes(bytes(kind(bytearray(data), rng)))
        del OPENED[:], opened[:]
        WATCHING.append(True)
        try:
            result = CliRunner().invoke(app, ["verify", str(path), *here])
        finally:
            WATCHING.clear()
        codes.add(result.exit_code)
        assert "Unexpected" not in result.stderr
        if result.exit_code == 0 and kind is not forged:  # whose content is the proven one
            assert meaning(path.read_bytes()) == meaning(data)
        if result.exit_code == 1:  # one line about the file, and no accident of ours
            assert str(path) in result.stderr
            assert result.stderr.count("\n") == 1
            assert "Unexpected" not in result.stderr
        assert {Path(name) for name in OPENED if name.startswith("/")} <= {path}
        if opened:  # only a file whose hash is right is ever run
            assert read_metadata(read_onnx(path)).intact
    assert codes <= {0, 1, 3}
    if kind is with_labels:
        assert codes == {0}
    if kind in (truncated, with_paths, with_fields):
        assert 0 not in codes
