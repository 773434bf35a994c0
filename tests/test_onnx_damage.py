"""Damage to a good file: the gate must see every kind, and name the module that it is in."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_support import Net, attribute, edit_tensor, live, node_of, own_copy

from normswap.onnx import export_onnx, verify_onnx
from normswap.onnx.proving import proof
from normswap.onnx.subject import subject_of
from normswap.onnx.writing.program import Options, write_program


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    model, x = live(Net()), torch.randn(2, 3, 16, 16)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    parity = export_onnx(model, path, example_inputs=x)
    assert parity.passed
    return model, x, path


@pytest.fixture(scope="module")
def fresh(good):
    """The fresh export that damage is compared with, made once for all tests."""
    subject = subject_of(good[0], good[1])
    return write_program(subject, good[2].parent / "fresh.onnx", Options())


def scaled_channel(proto):
    edit_tensor(proto, "layer1.0.conv1.weight", lambda w: _at(w, 3, w[3] * 3))


def scaled_folded_channel(proto):
    edit_tensor(proto, "layer1.1.conv2.weight", lambda w: _at(w, 2, w[2] * 3))


def swapped_channels(proto):
    edit_tensor(proto, "stem.weight", lambda w: w[[1, 0, *range(2, 8)]])


def dropped_epsilon(proto):
    node = node_of(proto, "layer1.1.bn1", "InstanceNormalization")
    attribute(node, "epsilon").f = 0.3


def leaky_relu(proto):
    node = node_of(proto, "layer1.0.relu", "Relu")
    node.op_type = "LeakyRelu"
    node.attribute.append(helper.make_attribute("alpha", 0.1))


def zeroed_bias(proto):
    edit_tensor(proto, "fc.bias", np.zeros_like)


def zeroed_norm_bias(proto):
    node = node_of(proto, "layer1.1.bn1", "Add")
    edit_tensor(proto, own_copy(proto, node, 1), np.zeros_like)


def halved_groups(proto):
    norm = node_of(proto, "layer1.0.bn1", "InstanceNormalization")
    reshape = node_of(proto, "layer1.0.bn1", "Reshape")
    edit_tensor(proto, own_copy(proto, reshape, 1), lambda s: np.where(s == 4, 2, s))
    for position in (1, 2):
        edit_tensor(proto, own_copy(proto, norm, position), lambda v: v[:2])


def training_statistics(proto):
    """The mean over the batch too, as a batch statistic left in the graph."""
    node = node_of(proto, "frn", "GlobalAveragePool")
    node.op_type = "ReduceMean"
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "axes"))
    node.input.append("axes")


def training_batchnorm(proto):
    node = node_of(proto, "last", "BatchNormalization")
    node.attribute.append(helper.make_attribute("training_mode", 1))
    node.output.extend(["mean_out", "var_out"])


def frozen_batch_axis(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def frozen_batch_inside(proto):
    node = node_of(proto, "layer1.1.bn1", "Reshape")
    edit_tensor(proto, own_copy(proto, node, 1), lambda s: _at(s, 0, 1))


def identity_for_tlu(proto):
    node = node_of(proto, "tlu", "Max")
    node.op_type = "Identity"
    del node.input[1:]


def fresh_statistics(proto):
    node = node_of(proto, "last", "BatchNormalization")
    edit_tensor(proto, node.input[3], np.zeros_like)


def lost_residual(proto):
    node = node_of(proto, "layer1.0", "Add")
    node.op_type = "Identity"
    del node.input[1:]


def average_for_max(proto):
    node = node_of(proto, "pool", "MaxPool")
    node.op_type = "AveragePool"
    for name in ("storage_order", "dilations"):
        for found in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(found)


def transposed_kernel(proto):
    edit_tensor(proto, "layer1.1.conv1.weight", lambda w: w.transpose(0, 1, 3, 2))


def inserted_factor(proto):
    """A node that was not there: the convolution's output is doubled on its way."""
    node = node_of(proto, "layer1.0.conv2", "Conv")
    index = list(proto.graph.node).index(node)
    value, node.output[0] = node.output[0], "smuggled"
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1.02).reshape(()), "two"))
    proto.graph.node.insert(index + 1, helper.make_node("Mul", ["smuggled", "two"], [value]))


def inserted_behind(proto):
    """The same under a new name, with the consumer rewired."""
    node = node_of(proto, "layer1.0.conv1", "Conv")
    index = list(proto.graph.node).index(node)
    ramp = np.linspace(1, 2, 8, dtype=np.float32).reshape(1, 8, 1, 1)
    proto.graph.initializer.append(numpy_helper.from_array(ramp, "ramp"))
    mul = helper.make_node("Mul", [node.output[0], "ramp"], ["smuggled"])
    for other in proto.graph.node:
        for position, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[position] = "smuggled"
    proto.graph.node.insert(index + 1, mul)


def bfloat_weights(proto):
    edit_tensor(
        proto,
        "layer1.1.conv1.weight",
        lambda w: (w.view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32),
    )


def not_a_number(proto):
    edit_tensor(proto, "fc.weight", lambda w: _at(w, (0, 0), np.nan))


def renamed_everything(proto):
    """Names and labels of the nodes are gone; values keep theirs."""
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
        del node.metadata_props[:]
    edit_tensor(proto, "layer1.1.conv1.weight", lambda w: _at(w, 5, -w[5]))


def _at(array, index, value):
    array[index] = value
    return array


DAMAGE = {
    scaled_channel: "layer1.0.conv1",
    scaled_folded_channel: "layer1.1.conv2",
    swapped_channels: "stem",
    dropped_epsilon: "layer1.1.bn1",
    leaky_relu: "layer1.0.relu",
    zeroed_bias: "fc",
    zeroed_norm_bias: "layer1.1.bn1",
    halved_groups: "layer1.0.bn1",
    training_statistics: "frn",
    training_batchnorm: "last",
    frozen_batch_axis: "",
    frozen_batch_inside: "layer1.1.bn1",
    identity_for_tlu: "tlu",
    fresh_statistics: "last",
    lost_residual: "layer1.0",
    average_for_max: "pool",
    transposed_kernel: "layer1.1.conv1",
    inserted_factor: "layer1.0.conv2",
    inserted_behind: "layer1.0.conv1",
    bfloat_weights: "layer1.1.conv1",
    not_a_number: "fc",
    renamed_everything: "layer1.1.conv1",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_every_damage_is_caught_and_named(damage, good, fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "write_program", lambda *_: fresh)
    model, x, path = good
    proto = onnx.load(path)
    damage(proto)
    bad = tmp_path / "bad.onnx"
    onnx.save(proto, bad)
    parity = verify_onnx(bad, model, example_inputs=x)
    assert not parity.passed
    assert parity.identity is False
    assert any(not case.passed for case in parity.cases)  # by function alone
    assert parity.divergence is not None
    assert parity.divergence.module == DAMAGE[damage], parity.failure
    assert parity.divergence.describe() in parity.failure
