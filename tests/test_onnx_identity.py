"""Identity: whatever a runtime reads of a file is in its hash; what a file may claim is bounded.

The files are made by hand, a few hundred bytes each, and signed as a forger would sign them.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from onnx import helper, numpy_helper

from normswap.errors import ExportError
from normswap.onnx import verify_onnx
from normswap.onnx.file.identity import graph_hash, metadata_hash
from normswap.onnx.file.identity_v1 import graph_hash_v1
from normswap.onnx.file.metadata import PREFIX, read_metadata, write_metadata
from normswap.onnx.file.parsing import OnnxFile, read_onnx
from normswap.onnx.file.selftest import Expected, SelfTest, TestInput

INPUT = TestInput((2, 3), "float32", 1000)
X = INPUT.make()


def doubling(proto):
    """A function of its own: twice its input."""
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(
        helper.make_function("own", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 20)])
    )
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.graph.node[0].CopyFrom(helper.make_node("Twice", ["x"], ["d"], domain="own"))


def sparse(proto):
    """A constant of sparse values that lie beside the file."""
    node = proto.graph.node[1]
    node.CopyFrom(helper.make_node("Constant", [], ["s"]))
    value = onnx.SparseTensorProto(dims=[3])
    value.values.CopyFrom(helper.make_tensor("v", onnx.TensorProto.FLOAT, [2], [2.0, 3.0]))
    value.indices.CopyFrom(numpy_helper.from_array(np.array([0, 2], np.int64), "i"))
    node.attribute.append(helper.make_attribute("sparse_value", value))


def outside(tensor, folder, name="data"):
    """Move a tensor's bytes into a file beside the model."""
    (folder / name).write_bytes(numpy_helper.to_array(tensor).tobytes())
    for field in ("raw_data", "float_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", name


def sparse_tensor(proto):
    return proto.graph.node[1].attribute[0].sparse_tensor.values


def plain():
    """y = 2·x + s, three nodes."""
    value = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w")
    nodes = [
        helper.make_node("Add", ["x", "x"], ["d"]),
        helper.make_node("Identity", ["w"], ["s"]),
        helper.make_node("Add", ["d", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def signed(proto, path, right, **claims):
    """Write the file with hashes and a self-test that fit it, the claims changed after that."""
    test = SelfTest((INPUT,), (Expected.of("y", right, 1e-4, 0.0),)).to_json()
    test["outputs"][0] |= claims
    file = OnnxFile(path, proto)
    write_metadata(file, {"self_test": test, "export": {"opset": 20}})
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def resave(path, change):
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def test_sparse_values_outside_the_file_are_part_of_it(path, tmp_path):
    proto = plain()
    sparse(proto)
    outside(sparse_tensor(proto), tmp_path)
    before = graph_hash(OnnxFile(path, proto))
    data = bytearray((tmp_path / "data").read_bytes())
    data[3] ^= 0x40
    (tmp_path / "data").write_bytes(bytes(data))
    assert graph_hash(OnnxFile(path, proto)) != before


def test_where_the_bytes_lie_is_no_part_of_it(path, tmp_path):
    proto = plain()
    before = graph_hash(OnnxFile(path, proto))
    outside(proto.graph.initializer[0], tmp_path)
    assert graph_hash(OnnxFile(path, proto)) == before


def test_the_operator_versions_of_a_function_are_part_of_it(path):
    proto = plain()
    doubling(proto)
    signed(proto, path, X + X + np.float32([1, 2, 3]))
    assert verify_onnx(path).passed
    resave(path, lambda p: setattr(p.functions[0].opset_import[0], "version", 13))
    parity = verify_onnx(path)
    assert parity.identity is False
    assert parity.cases == ()


LEFT_OUT = {
    ("NodeProto", "name"),
    ("ModelProto", "metadata_props"),
    ("TensorProto", "data_location"),
    ("TensorProto", "external_data"),
}
VALUES = {
    FieldDescriptor.TYPE_STRING: "x",
    FieldDescriptor.TYPE_BYTES: b"x",
    FieldDescriptor.TYPE_FLOAT: 1.5,
    FieldDescriptor.TYPE_DOUBLE: 1.5,
    FieldDescriptor.TYPE_ENUM: 1,
}


def every_field():
    """One path through the schema to each field of each kind of message."""
    found, known = [], set()

    def visit(descriptor, trail):
        if descriptor.full_name in known:
            return
        known.add(descriptor.full_name)
        for field in descriptor.fields:
            if field.name == "doc_string" or (descriptor.name, field.name) in LEFT_OUT:
                continue
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                visit(field.message_type, (*trail, field))
            else:
                found.append((*trail, field))

    visit(onnx.ModelProto.DESCRIPTOR, ())
    return found


def set_along(proto, trail):
    """Make the messages on the way, and set the field at its end."""
    *way, last = trail
    message = proto
    for field in way:
        inner = getattr(message, field.name)
        message = inner.add() if hasattr(inner, "add") else inner
        if not hasattr(inner, "add"):
            message.SetInParent()
    before = proto.SerializeToString(deterministic=True)
    value = VALUES.get(last.type, 1)
    if hasattr(getattr(message, last.name), "append"):
        getattr(message, last.name).append(value)
    else:
        setattr(message, last.name, value)
    after = onnx.ModelProto.FromString(proto.SerializeToString())
    return onnx.ModelProto.FromString(before), after


def test_every_field_of_the_schema_is_part_of_it(path):
    fields = every_field()
    assert len(fields) > 60
    for trail in fields:
        before, after = set_along(plain(), trail)
        name = ".".join(field.name for field in trail)
        assert graph_hash(OnnxFile(path, before)) != graph_hash(OnnxFile(path, after)), name


def test_names_of_nodes_and_documentation_are_no_part_of_it(path):
    proto = plain()
    before = graph_hash(OnnxFile(path, proto))
    proto.doc_string = proto.graph.doc_string = proto.graph.node[0].doc_string = "text"
    proto.graph.node[0].name = "n"
    assert graph_hash(OnnxFile(path, proto)) == before


def test_fields_that_this_release_does_not_know_are_part_of_it(path):
    data = plain().SerializeToString()
    first, second, third = (
        onnx.ModelProto.FromString(data + more)
        for more in (b"", bytes([0xF8, 0x07, 5]), bytes([0xF8, 0x07, 6]))
    )
    hashes = {graph_hash(OnnxFile(path, proto)) for proto in (first, second, third)}
    assert len(hashes) == 3


def test_neighbours_do_not_read_the_same(path):
    """What is moved from one field or item to the next is another file."""
    hashes = set()
    for inputs, outputs in ((["ab"], ["c"]), (["a", "b"], ["c"]), (["a"], ["b", "c"]), ([], [])):
        proto = plain()
        proto.graph.node[0].CopyFrom(helper.make_node("Add", inputs, outputs))
        hashes.add(graph_hash(OnnxFile(path, proto)))
    assert len(hashes) == 4


def good(path):
    return signed(plain(), path, X + X + np.float32([1, 2, 3]))


def add_metadata(key, value):
    def change(proto):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value

    return change


@pytest.mark.parametrize("key", ["normswap.self_test", "normswap.graph_sha256", "somebodys"])
def test_a_metadata_key_that_stands_twice_is_refused(key, path):
    good(path)
    for _ in range(2):
        resave(path, add_metadata(key, "0"))
    parity = verify_onnx(path)
    assert parity.identity is False
    assert "stands twice" in parity.failure


def test_metadata_of_others_count_too(path):
    """onnxruntime may read its session's settings from there."""
    good(path)
    resave(path, add_metadata("ort_config", '{"session_options":{}}'))
    assert "metadata" in verify_onnx(path).failure


def test_external_data_with_two_places_are_refused(path, tmp_path):
    proto = plain()
    outside(proto.graph.initializer[0], tmp_path)
    entry = proto.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "other"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="same key twice"):
        read_onnx(path)


def test_a_tensor_with_data_in_two_places_is_refused(path, tmp_path):
    proto = plain()
    outside(proto.graph.initializer[0], tmp_path)
    proto.graph.initializer[0].raw_data = bytes(12)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="beside data of its own"):
        read_onnx(path)


def as_version_01(proto, path):
    """Signed as version 0.1 did it."""
    file = read_onnx(signed(proto, path, X + X + np.float32([2, 0, 3])))
    entries = {entry.key: entry.value for entry in file.proto.metadata_props}
    entries[PREFIX + "format_version"] = "1"
    entries[PREFIX + "graph_sha256"] = graph_hash_v1(file)
    entries.pop(PREFIX + "metadata_sha256")
    entries[PREFIX + "metadata_sha256"] = metadata_hash(entries.items())
    helper.set_model_props(file.proto, entries)
    path.write_bytes(file.proto.SerializeToString())
    return path


@pytest.mark.parametrize("gap", ["sparse", "opset", "type"])
def test_an_old_hash_is_not_believed_where_it_has_gaps(gap, path, tmp_path):
    proto = plain()
    sparse(proto)
    if gap == "sparse":
        outside(sparse_tensor(proto), tmp_path)
    elif gap == "opset":
        doubling(proto)
        proto.functions[0].opset_import[0].version = 13
    else:
        attribute = proto.graph.node[0].attribute.add(name="t", type=13)
        attribute.tp.tensor_type.elem_type = 1
    parity = verify_onnx(as_version_01(proto, path))
    assert parity.identity is False
    assert "of version 0.1, does not cover" in parity.failure


def test_an_old_hash_is_believed_where_it_has_none(path):
    proto = plain()
    sparse(proto)
    assert verify_onnx(as_version_01(proto, path)).passed
    assert read_metadata(read_onnx(path)).fields["format_version"] == 1


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"tolerance": 0.999}, "a tolerance of 0.999 for output 'y'; need one up to 0.05"),
        ({"tolerance": "nan"}, "a tolerance of nan"),
        ({"scale": 1e30}, "a scale that is not"),
        ({"scale": 1e-30}, "a scale that is not"),
        ({"scale": "inf"}, "a scale that is not"),
        ({"float32": ""}, "do not fill"),
        ({"shape": [0, 3], "float32": "", "scale": 0}, "no output to compare"),
        ({"shape": [1e999, 3]}, "expected output"),
        ({"shape": [-2, -3]}, "do not fill"),
    ],
)
def test_a_self_test_may_not_claim_what_proves_nothing(claims, message, path):
    parity = verify_onnx(signed(plain(), path, X + X + np.float32([1, 2, 3]), **claims))
    assert not parity.passed
    assert message in parity.failure
    assert parity.cases == ()


def test_a_large_output_is_held_to_its_own_scale(path):
    """Only a sample is kept of it, which alone does not tell the scale."""
    proto = plain()
    ones = numpy_helper.from_array(np.ones((9000, 1), np.float32), "w")
    proto.graph.initializer[0].CopyFrom(ones)
    proto.graph.node[0].CopyFrom(helper.make_node("ReduceSum", ["x"], ["d"], keepdims=0))
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    right = np.full((9000, 1), X.sum() + 1, np.float32)
    assert verify_onnx(signed(proto, path, right)).passed
    wrong = right.copy()
    wrong[0] = 0
    assert "error 1.00e+00" in verify_onnx(signed(proto, path, wrong)).failure
    parity = verify_onnx(signed(proto, path, wrong, scale=1e6))
    assert "where 1e+06 is recorded" in parity.failure


def test_a_tolerance_beyond_the_rule_is_said(path):
    signed(plain(), path, X + X + np.float32([1, 2, 3]), tolerance=0.02)
    parity = verify_onnx(path)
    assert parity.passed
    assert parity.notes == (
        "the file asks for a tolerance of 0.02, more than the rule's 0.001 for float32",
    )
    assert json.loads(json.dumps(parity.to_json()))["notes"]


def test_a_graph_compiled_for_one_machine_is_refused(path):
    proto = plain()
    proto.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["e"])
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="EPContext"):
        read_onnx(path)
