"""Verification: identity, function, files from strangers, and machines without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_support import Net, edit_tensor, live
from torch import nn

from normswap.cli.verify import print_parity
from normswap.errors import ExportError, ParityError
from normswap.onnx import export_onnx, load_onnx, verify_onnx
from normswap.onnx.file.metadata import read_metadata, write_metadata
from normswap.onnx.file.parity import Case, summarise
from normswap.onnx.file.parsing import read_onnx
from normswap.onnx.file.selftest import Expected, SelfTest, TestInput, splitmix64, uniform
from normswap.onnx.file.session import Apart, Failed, Here
from normswap.onnx.proving import proof

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = live(Net())
    path = tmp_path_factory.mktemp("verify") / "model.onnx"
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert export_onnx(model, path, example_inputs=x).passed
    return model, x, path


@pytest.fixture
def edited(good, tmp_path):
    """A function that saves the good file after a change."""

    def save(change):
        proto = onnx.load(good[2])
        change(proto)
        path = tmp_path / "edited.onnx"
        onnx.save(proto, path)
        return path

    return save


def props(proto):
    return {entry.key: entry for entry in proto.metadata_props}


def test_a_good_file_passes_alone_and_with_its_model(good):
    model, x, path = good
    alone = verify_onnx(path)
    assert alone.passed
    assert alone.identity is True
    assert {case.stage for case in alone.cases} == {
        f"self-test, onnxruntime {level}" for level in ("off", "basic", "all")
    }
    assert 0 < alone.max_relative_error < 1e-5
    with_model = verify_onnx(path, model, example_inputs=x)
    assert with_model.passed
    assert any(case.randomised for case in with_model.cases)
    assert verify_onnx(path, model).passed  # the recorded inputs serve as examples


def test_a_file_stays_proven_where_its_model_cannot_be_exported_again(good, monkeypatch):
    def refuse(*_):
        raise ExportError("Net", got="a refusal", need="an exporter", hint="another torch")

    monkeypatch.setattr(proof, "write_program", refuse)
    parity = verify_onnx(good[2], good[0])
    assert parity.passed
    assert any("randomised copy was not tried" in note for note in parity.notes)


def test_another_model_fails_and_the_file_is_not_to_blame(good):
    parity = verify_onnx(good[2], live(Net(), seed=5), example_inputs=good[1])
    assert not parity.passed
    assert parity.identity is True
    assert parity.divergence is not None


def test_no_torch_is_needed(good):
    code = f"""
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm", "onnxscript", "safetensors"):
            raise ImportError(name + " is forbidden here")
sys.meta_path.insert(0, Forbid())
import json
import normswap
parity = normswap.verify_onnx({str(good[2])!r})
assert not any(m in sys.modules for m in ("torch", "timm", "torchvision"))
print(json.dumps(parity.to_json()))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


def unseen_scale(proto):
    """A factor that the division by the norm takes out again: no output changes."""
    edit_tensor(proto, "stem.weight", lambda w: w * np.float32(2))
    edit_tensor(proto, "stem.bias", lambda b: b * np.float32(2))


def unused_weight(proto):
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "idle"))


def other_axis_name(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"


def dead_node(proto):
    name = proto.graph.input[0].name
    proto.graph.node.append(helper.make_node("Relu", [name], ["nobody_reads_this"]))


@pytest.mark.parametrize("edit", [unseen_scale, unused_weight, other_axis_name, dead_node])
def test_edits_without_effect_are_caught_by_identity(edit, good, edited):
    path = edited(edit)
    alone = verify_onnx(path)
    assert alone.identity is False
    assert alone.failure.startswith("identity: SHA-256 of nodes")
    assert alone.cases == ()  # no session for a file that is not the proven one
    full = verify_onnx(path, good[0], example_inputs=good[1])
    assert all(case.passed for case in full.cases)
    assert not full.passed
    assert full.stage == "identity"


@pytest.mark.parametrize("key", ["class_names", "self_test", "proof", "graph_sha256", "versions"])
def test_edited_metadata_are_caught(key, edited):
    def edit(proto):
        props(proto)[f"normswap.{key}"].value = '{"passed":true}'

    parity = verify_onnx(edited(edit))
    assert not parity.passed
    assert parity.identity is False


def test_a_file_that_computes_something_else_fails_its_self_test(edited):
    """With hashes put right again, as a forger would."""

    def forge(proto):
        edit_tensor(proto, "fc.weight", lambda w: w * np.float32(1.001))

    path = edited(forge)
    file = read_onnx(path)
    fields = {
        key.removeprefix("normswap."): json.loads(entry.value)
        for key, entry in props(file.proto).items()
        if not key.endswith("sha256")
    }
    write_metadata(file, fields)
    path.write_bytes(file.proto.SerializeToString())
    parity = verify_onnx(path)
    assert parity.identity is True
    assert not parity.passed
    assert parity.failure.startswith("function: self-test, onnxruntime off")


@pytest.mark.parametrize("self_test", [None, {}, {"inputs": [], "outputs": []}, {"inputs": 3}])
def test_a_broken_self_test_ends_in_a_verdict(self_test, edited):
    path = edited(lambda _: None)
    file = read_onnx(path)
    write_metadata(file, {"self_test": self_test})
    path.write_bytes(file.proto.SerializeToString())
    assert not verify_onnx(path).passed


def test_a_self_test_may_not_ask_for_the_whole_memory():
    huge = TestInput((1 << 20, 1 << 20), "float32", 1)
    data = SelfTest((huge,), ()).to_json()
    with pytest.raises(ValueError, match="too large"):
        SelfTest.from_json(data)


def test_a_strangers_file_needs_the_model(good, edited):
    path = edited(lambda proto: proto.ClearField("metadata_props"))
    with pytest.raises(ExportError, match="without normswap's metadata"):
        verify_onnx(path)
    parity = verify_onnx(path, good[0], example_inputs=good[1])
    assert parity.passed
    assert parity.identity is None
    with pytest.raises(ExportError, match="a model without example_inputs"):
        verify_onnx(path, good[0])


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x08\x07" * 50, bytes(1000)])
def test_no_onnx(content, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="need a complete ONNX model"):
        verify_onnx(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        verify_onnx(tmp_path / "m.onnx")


def test_an_unknown_provider_names_those_there_are(good):
    with pytest.raises(ExportError, match=r"need one of .*CPUExecutionProvider"):
        verify_onnx(good[2], provider="abacus")
    assert verify_onnx(good[2], provider="cpu").passed


def external(proto, location, **more):
    tensor = next(t for t in proto.graph.initializer if t.name == "fc.weight")
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(size), **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret", "a/../../secret", "..\\secret", "C:\\secret", "", ".", "no", "\0"],
)
def test_external_data_elsewhere_are_refused(location, tmp_path, good):
    (tmp_path / "secret").write_bytes(bytes(4096))
    folder = tmp_path / "models"
    folder.mkdir()
    proto = onnx.load(good[2])
    external(proto, location)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="need external data in a plain file"):
        verify_onnx(folder / "m.onnx")
    with pytest.raises(ExportError, match="need external data in a plain file"):
        verify_onnx(folder / "m.onnx", good[0], example_inputs=good[1])


@pytest.mark.parametrize("link", ["file", "folder", "hard"])
def test_external_data_behind_a_link_are_refused(link, tmp_path, good):
    (tmp_path / "away").mkdir()
    secret = tmp_path / "away" / "data"
    secret.write_bytes(bytes(4096))
    folder = tmp_path / "models"
    folder.mkdir()
    if link == "folder":
        (folder / "sub").symlink_to(tmp_path / "away")
    elif link == "file":
        (folder / "data").symlink_to(secret)
    else:
        (folder / "data").hardlink_to(secret)
    proto = onnx.load(good[2])
    external(proto, "sub/data" if link == "folder" else "data")
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="link"):
        verify_onnx(folder / "m.onnx")


@pytest.mark.parametrize(
    "bounds", [{"offset": "4000"}, {"length": "99999999"}, {"offset": "-1"}, {"length": "1e3"}]
)
def test_external_data_out_of_bounds_are_refused(bounds, tmp_path, good):
    (tmp_path / "data").write_bytes(bytes(4096))
    proto = onnx.load(good[2])
    external(proto, "data", **bounds)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="need external data in a plain file"):
        verify_onnx(tmp_path / "m.onnx")


def test_a_crash_of_the_runtime_is_a_verdict(good, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = Apart().run(good[2], ["all"], [[good[1].numpy()]])
    assert isinstance(found[0][0], Failed)
    assert "crashed" in found[0][0].message


def test_a_hanging_runtime_is_a_verdict(good):
    found = Apart(seconds=0.01).run(good[2], ["all"], [[good[1].numpy()]])
    assert "did not finish" in found[0][0].message


def test_apart_and_here_agree(good):
    inputs = [[good[1].numpy()], [good[1].numpy()[:, :2]]]
    here, apart = (runner.run(good[2], ["off", "all"], inputs) for runner in (Here(), Apart()))
    for mine, other in zip(here, apart, strict=True):
        np.testing.assert_array_equal(mine[0][0], other[0][0])
        assert isinstance(mine[1], Failed)
        assert mine[1] == other[1]


def test_the_file_as_a_torch_module(good, edited):
    model, x, path = good
    runtime = load_onnx(path)
    with torch.no_grad():
        assert torch.allclose(runtime(x), model.eval()(x), atol=1e-5)
    assert runtime.class_names is None
    with pytest.raises(ExportError, match="need inputs that the file takes"):
        runtime(x[:, :2])
    with pytest.raises(ParityError, match="identity"):
        load_onnx(edited(dead_node))


def test_the_generator_is_splitmix64():
    """The published sequence of seed 1234567."""
    assert [int(z) for z in splitmix64(1234567, 5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    values = uniform(1, (50, 200))
    assert values.min() >= -2
    assert values.max() < 2
    assert abs(values.mean()) < 0.05
    np.testing.assert_array_equal(values, values.astype(np.float32))


def test_recorded_outputs_survive_json():
    array = np.linspace(-1, 1, 10_000, dtype=np.float64).reshape(2, 5000)
    expected = Expected.of("y", array, 1e-4, 1e-7)
    again = Expected.from_json(json.loads(json.dumps(expected.to_json())))
    assert again.shape == (2, 5000)
    assert again.values.size == 4096
    np.testing.assert_array_equal(again.values, expected.values)


def test_a_parity_is_plain_json(good):
    parity = verify_onnx(good[2], live(Net(), seed=5), example_inputs=good[1])
    again = json.loads(json.dumps(parity.to_json(), allow_nan=False))
    assert again["passed"] is False
    assert again["divergence"]["module"] == parity.divergence.module
    assert "FAILED" in str(parity)


class Noisy(nn.Module):
    """One input has no rows, and only positive numbers make sense in it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, sigma):
        return self.norm(self.conv(x)) * torch.log(sigma)


def test_an_input_without_rows_keeps_its_values(tmp_path):
    model, path = Noisy().eval(), tmp_path / "m.onnx"
    example = (torch.randn(2, 3, 8, 8), torch.tensor([3.0]))
    assert export_onnx(model, path, example_inputs=example).passed
    assert read_metadata(read_onnx(path)).self_test().inputs[1].values == (3.0,)
    assert verify_onnx(path).passed
    assert verify_onnx(path, model).passed


def test_the_self_test_is_judged_as_the_proof_was(good, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(good[0], path, example_inputs=good[1], tolerance=0.02)
    outputs = read_metadata(read_onnx(path)).self_test().outputs
    assert {output.tolerance for output in outputs} == {0.02}


def test_a_model_that_is_not_finite_is_one_clear_error(tmp_path):
    class Logarithm(Noisy):
        def forward(self, x):
            return torch.log(self.norm(self.conv(x)))

    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="NaN or Inf from the model itself"):
        export_onnx(
            Logarithm().eval(), path, example_inputs=torch.randn(2, 3, 8, 8), allow_mismatch=True
        )
    assert not path.exists()


def test_a_run_without_an_output_can_be_reported(capsys):
    case = Case("x", "onnxruntime all", "y", 1, float("inf"), 0.0, 0.0, passed=False, problem="no")
    print_parity(summarise([case], failure="function: no"))
    assert "FAILED" in capsys.readouterr().out
