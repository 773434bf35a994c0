"""ONNX files that version 0.1 wrote, as it wrote them: they still verify, and edits still show.

``tests/fixtures/onnx-0.1`` was made with the code of 0.1: a BatchNorm; GroupNorm in float16; a
fixed batch with a tolerance of its own; weights beside the file; a file written although its proof
failed (allow_mismatch); a hand-made graph with a function, a branch and a sparse constant.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from onnx_support import edit_tensor

from normswap.errors import ParityError
from normswap.onnx import load_onnx, verify_onnx

FOLDER = Path(__file__).parent / "fixtures" / "onnx-0.1"
PROVEN = ["bn.onnx", "gn-half.onnx", "gn-loose.onnx", "external.onnx", "odd.onnx"]


@pytest.mark.parametrize("name", PROVEN)
def test_a_file_of_version_01_still_verifies(name):
    parity = verify_onnx(FOLDER / name)
    assert parity.passed, parity.failure
    assert parity.identity is True
    assert len(parity.cases) == 3


def test_a_file_that_failed_its_proof_still_says_so():
    parity = verify_onnx(FOLDER / "mismatch.onnx")
    assert not parity.passed
    assert parity.identity is True
    assert "although its proof failed" in parity.notes[0]


def test_its_record_is_still_read():
    model = load_onnx(FOLDER / "bn.onnx")
    assert model.class_names == ("a", "b", "c")
    assert model.preprocessing == {"mean": [0.5, 0.5, 0.5], "input_size": [3, 6, 6]}


@pytest.mark.parametrize("name", ["bn.onnx", "gn-half.onnx", "gn-loose.onnx"])
def test_an_edit_of_an_old_file_is_still_seen(name, tmp_path):
    proto = onnx.load(FOLDER / name)
    name_of_bias = next(t.name for t in proto.graph.initializer if t.name.startswith("head.bias"))
    edit_tensor(proto, name_of_bias, lambda bias: bias + bias.dtype.type(1e-3))
    path = tmp_path / name
    onnx.save(proto, path)
    assert verify_onnx(path).identity is False
    with pytest.raises(ParityError, match="identity"):
        load_onnx(path)


def test_an_edit_of_the_weights_beside_an_old_file_is_still_seen(tmp_path):
    for name in ("external.onnx", "external.onnx.data"):
        shutil.copy(FOLDER / name, tmp_path / name)
    data = tmp_path / "external.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    assert verify_onnx(tmp_path / "external.onnx").identity is False
