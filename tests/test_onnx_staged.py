"""Means in stages: the same function, more exact where groups are large, used only where needed."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from normswap.errors import ParityError
from normswap.layers import FilterResponseNorm2d
from normswap.onnx import export_onnx, verify_onnx
from normswap.onnx.proving import proof
from normswap.onnx.subject import subject_of
from normswap.onnx.writing.program import Options, write_program


@pytest.fixture(autouse=True)
def one_export(monkeypatch):
    monkeypatch.setattr(proof, "_randomised_cases", lambda *_: [])


class Net(nn.Module):
    """A norm behind a ReLU, whose values have one sign: the worst case for a running sum."""

    def __init__(self, norm, conv=nn.Conv2d, channels=32):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv(3, channels, 1)
        self.norm = norm
        self.head = conv(channels, 2, 1)
        with torch.no_grad():
            for name, parameter in norm.named_parameters():
                parameter.uniform_(0.5, 1.5) if name != "tau" else parameter.zero_()

    def forward(self, x):
        return self.head(self.norm(self.conv(x).relu()))


def inputs(*size, rows=2):
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(1))


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(1, 32), nn.InstanceNorm2d(32, affine=True)],
    ids=["gn-1", "in"],
)
def test_large_groups_pass_where_one_running_sum_does_not(norm, tmp_path):
    model, x = Net(norm), inputs(128, 128, rows=1)
    path = tmp_path / "m.onnx"
    plain = export_onnx(model, path, example_inputs=x, tolerance=0.5, static_batch=True)
    assert "InstanceNormalization" in operators(path)
    limit = plain.max_relative_error / 4
    parity = export_onnx(model, path, example_inputs=x, tolerance=limit, static_batch=True)
    assert parity.passed
    assert parity.max_relative_error < min(limit, 3e-6)
    assert any("in stages" in note for note in parity.notes)
    assert "InstanceNormalization" not in operators(path)
    assert "ReduceMean" in operators(path)
    assert verify_onnx(path, model=model, example_inputs=x).passed


def test_norms_that_are_exact_enough_keep_the_fastest_form(tmp_path):
    path = tmp_path / "m.onnx"
    parity = export_onnx(Net(nn.GroupNorm(4, 32)), path, example_inputs=inputs(8, 8))
    assert not parity.notes
    assert "InstanceNormalization" in operators(path)


def test_a_file_without_norms_is_not_tried_twice(tmp_path, monkeypatch):
    tries = []
    real = proof.prove_draft
    monkeypatch.setattr(proof, "prove_draft", lambda *a: (tries.append(1), real(*a))[1])
    with pytest.raises(ParityError, match="tolerance"):
        export_onnx(
            Net(nn.Identity()), tmp_path / "m.onnx", example_inputs=inputs(8, 8), tolerance=1e-12
        )
    assert tries == [1]


CASES = {
    "gn": (nn.GroupNorm(4, 32), nn.Conv2d, (12, 10)),
    "gn-1d": (nn.GroupNorm(4, 32), nn.Conv1d, (30,)),
    "gn-3d": (nn.GroupNorm(2, 32), nn.Conv3d, (4, 6, 5)),
    "gn-no-affine": (nn.GroupNorm(8, 32, affine=False), nn.Conv2d, (9, 9)),
    "gn-eps": (nn.GroupNorm(8, 32, eps=0.5), nn.Conv2d, (9, 9)),
    "in": (nn.InstanceNorm2d(32), nn.Conv2d, (7, 11)),
    "in-affine-3d": (nn.InstanceNorm3d(32, affine=True), nn.Conv3d, (3, 4, 5)),
    "frn": (FilterResponseNorm2d(32), nn.Conv2d, (7, 11)),
    "frn-no-tlu": (FilterResponseNorm2d(32, tlu=False), nn.Conv2d, (7, 11)),
}


WAYS = {
    "fixed": (CASES, Options(staged=True)),
    "dynamic": (("gn", "gn-3d", "in", "frn"), Options(staged=True, dynamic_size=True)),
    "half": (("gn", "in-affine-3d", "frn"), Options(staged=True, half=True)),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{way}")
        for way, (names, options) in WAYS.items()
        for name in names
    ],
)
def test_stages_leave_the_function_as_it_was(name, options, tmp_path):
    norm, conv, size = CASES[name]
    model, x = Net(norm, conv), inputs(*size)
    subject = subject_of(model, x)
    draft = write_program(subject, tmp_path / "m.onnx", options)
    assert draft.staged == 1
    onnx.checker.check_model(draft.file.proto, full_check=True)
    unused = {t.name for t in draft.file.proto.graph.initializer}
    for node in draft.file.proto.graph.node:
        unused -= set(node.input)
        assert all(entry.key for entry in node.metadata_props)
    assert not unused
    limit = 5e-2 if options.half else 2e-6
    parity = proof.prove_draft(draft, proof.asked_of(subject, options, tolerance=limit))
    assert parity.passed, str(parity.failure)


def test_a_length_without_divisors_stays(tmp_path):
    model = Net(nn.GroupNorm(8, 8), nn.Conv1d, channels=8)
    draft = write_program(subject_of(model, inputs(31)), tmp_path / "m.onnx", Options(staged=True))
    assert draft.staged == 0
    assert "InstanceNormalization" in operators(tmp_path / "m.onnx")
