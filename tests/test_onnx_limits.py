"""Small ONNX files that never end, or want all the memory: a verdict, in time."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper, numpy_helper
from test_onnx_identity import X, outside, plain, signed

from normswap import children
from normswap.cli.app import app
from normswap.errors import ExportError
from normswap.onnx import load_onnx, verify_onnx
from normswap.onnx.file.metadata import read_metadata, write_metadata
from normswap.onnx.file.parsing import read_onnx
from normswap.onnx.file.session import CPU, Apart, Failed, open_apart

RIGHT = X + X + np.float32([1, 2, 3])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def endless(proto):
    """A Loop of 2⁶² turns."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["v", "one"], ["w2"]),
        ],
        "body",
        [
            value("i", onnx.TensorProto.INT64, []),
            value("go", onnx.TensorProto.BOOL, []),
            value("v", onnx.TensorProto.FLOAT, [3]),
        ],
        [value("on", onnx.TensorProto.BOOL, []), value("w2", onnx.TensorProto.FLOAT, [3])],
    )
    for name, array in (
        ("turns", np.array(1 << 62, np.int64)),
        ("always", np.array(True)),
        ("one", np.ones(3, np.float32)),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.node[1].CopyFrom(
        helper.make_node("Loop", ["turns", "always", "w"], ["s"], body=body)
    )


def unfolding(proto, levels=30):
    """Functions, each of which calls the next one twice."""
    for level in range(levels):
        inner = ("Double" + str(level + 1), "own") if level + 1 < levels else ("Neg", "")
        body = [
            helper.make_node(inner[0], ["a"], ["t"], domain=inner[1]),
            helper.make_node(inner[0], ["t"], ["b"], domain=inner[1]),
        ]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        proto.functions.append(
            helper.make_function("own", f"Double{level}", ["a"], ["b"], body, opsets)
        )
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.graph.node[0].CopyFrom(helper.make_node("Double0", ["x"], ["d"], domain="own"))


def hungry(proto, size=1 << 40):
    """A terabyte of zeros, added up."""
    shape = numpy_helper.from_array(np.array([size, 3], np.int64), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node[1].CopyFrom(helper.make_node("ConstantOfShape", ["shape"], ["z"]))
    proto.graph.node.insert(2, helper.make_node("ReduceSum", ["z"], ["s"]))


def test_a_loop_that_never_ends_is_a_verdict_in_time(path):
    proto = plain()
    endless(proto)
    signed(proto, path, RIGHT)
    assert path.stat().st_size < 2500
    start = time.monotonic()
    parity = verify_onnx(path, timeout=2)
    assert time.monotonic() - start < 20
    assert not parity.passed
    assert parity.failure.endswith("onnxruntime did not finish within its timeout of 2 s")
    result = CliRunner().invoke(app, ["verify", str(path), "--timeout", "2"])
    assert result.exit_code == 3
    assert "did not finish within its timeout of 2 s" in result.stdout


def test_a_loop_that_never_ends_is_an_error_where_the_file_is_run_as_a_model(path):
    proto = plain()
    endless(proto)
    signed(proto, path, RIGHT)
    model = load_onnx(path, timeout=2)
    for _ in range(2):  # and stays one
        with pytest.raises(ExportError, match="did not finish within its timeout of 2 s"):
            model(torch.from_numpy(X))


@pytest.mark.parametrize("levels", [30, 120])
def test_functions_that_unfold_without_end_are_refused_at_once(levels, path):
    proto = plain()
    unfolding(proto, levels)
    signed(proto, path, RIGHT)
    start = time.monotonic()
    with pytest.raises(ExportError, match="unfold to more than 1,000,000 nodes"):
        verify_onnx(path)
    assert time.monotonic() - start < 5


def test_functions_that_call_themselves_are_refused_at_once(path):
    proto = plain()
    unfolding(proto, 3)
    proto.functions[2].node[0].op_type = proto.functions[2].node[1].op_type = "Double0"
    proto.functions[2].node[0].domain = proto.functions[2].node[1].domain = "own"
    signed(proto, path, RIGHT)
    with pytest.raises(ExportError, match="unfold to more than"):
        read_onnx(path)


def test_functions_within_reason_run(path):
    proto = plain()
    unfolding(proto, 4)
    assert verify_onnx(signed(proto, path, X + np.float32([1, 2, 3]))).passed


def test_a_graph_that_wants_all_the_memory_is_a_verdict(path):
    proto = plain()
    hungry(proto)
    parity = verify_onnx(signed(proto, path, RIGHT))
    assert not parity.passed
    assert parity.failure.startswith("function: self-test")


def test_memory_is_limited(path, monkeypatch):
    """16 GB of zeros would fit into this machine, and not into what a file may take."""
    monkeypatch.setattr(children, "MEMORY", 1 << 30)
    proto = plain()
    hungry(proto, size=1 << 28)
    signed(proto, path, RIGHT)
    found = Apart(CPU, 60).run(path, ["off"], [[X]])
    assert isinstance(found[0][0], Failed)


def test_a_large_self_test_is_made_in_the_child(path, monkeypatch):
    """2²⁸ numbers: more than a child of 512 MB can hold."""
    monkeypatch.setattr(children, "MEMORY", 512 << 20)
    proto = plain()
    file = signed(proto, path, RIGHT)
    test = {
        "inputs": [{"shape": [1 << 26, 3], "dtype": "float32", "seed": 1, "low": 0, "high": 0}],
        "outputs": [],
    }
    fields = dict(read_metadata(read_onnx(file)).fields)
    test["outputs"] = fields["self_test"]["outputs"]
    record = read_onnx(file)
    write_metadata(record, {**fields, "self_test": test})
    path.write_bytes(record.proto.SerializeToString())
    parity = verify_onnx(path)
    assert not parity.passed
    assert parity.identity is True


def test_each_batch_of_a_model_has_its_own_time(path):
    signed(plain(), path, RIGHT)
    model = load_onnx(path, timeout=3)
    for rows in (1, 4, 2):
        x = torch.ones(rows, 3)
        assert torch.equal(model(x), x + x + torch.tensor([1.0, 2, 3]))
        time.sleep(1.1)


def test_a_file_that_cannot_be_opened_says_so_from_its_own_process(path):
    proto = plain()
    proto.graph.node[1].op_type = "NoSuchOperator"
    signed(proto, path, RIGHT)
    with pytest.raises(ExportError, match=r"NoSuchOperator.*need a model that onnxruntime can run"):
        load_onnx(path)
    assert isinstance(open_apart(path, "all", CPU, 60), Failed)


def test_an_output_of_words_is_a_verdict(path):
    proto = plain()
    words = helper.make_tensor("words", onnx.TensorProto.STRING, [3], [b"a", b"b", b"c"])
    proto.graph.initializer.append(words)
    proto.graph.node[2].CopyFrom(helper.make_node("Identity", ["words"], ["y"]))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    del proto.graph.output[0].type.tensor_type.shape.dim[1]
    parity = verify_onnx(signed(proto, path, np.zeros(3, np.float32)))
    assert "no tensor of numbers" in parity.failure


@pytest.mark.parametrize("value", ["-1", "1e9", "nan", "x"])
def test_a_timeout_that_is_none_is_wrong_usage(value, path):
    signed(plain(), path, RIGHT)
    result = CliRunner().invoke(app, ["verify", str(path), "--timeout", value])
    assert result.exit_code in (1, 2)
    assert "timeout" in result.stderr


def test_without_a_limit_the_file_runs_here(path, monkeypatch):
    monkeypatch.setattr(children, "Child", None)
    signed(plain(), path, RIGHT)
    assert verify_onnx(path, timeout=None).passed
    assert CliRunner().invoke(app, ["verify", str(path), "--timeout", "0"]).exit_code == 0
    assert torch.equal(
        load_onnx(path, timeout=None)(torch.zeros(1, 3)), torch.tensor([[1.0, 2, 3]])
    )


def test_a_child_of_ours_that_babbles_is_gone():
    child = children.Child("normswap.targets")  # says nothing and ends
    with pytest.raises(children.ChildError, match="crashed"):
        child.ask({}, clock=children.Clock(60))
    assert child.gone


def test_weights_beside_the_file_are_found_from_the_child(path, tmp_path):
    proto = plain()
    outside(proto.graph.initializer[0], tmp_path)
    assert verify_onnx(signed(proto, path, RIGHT)).passed
