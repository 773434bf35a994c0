"""Export: the gate, what it writes, and what it leaves alone."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_support import Net, edit_tensor, live
from torch import nn

from normswap.errors import ExportError, ParityError
from normswap.layers import (
    BatchRenorm2d,
    CrossIterationBatchNorm2d,
    FilterResponseNorm2d,
    FrozenBatchNorm2d,
)
from normswap.onnx import export_onnx, verify_onnx
from normswap.onnx.file.parity import deviation, relative_error, tolerance_for
from normswap.onnx.file.parsing import save
from normswap.onnx.proving import proof
from normswap.onnx.proving.expectation import GroundTruth
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import subject_of
from normswap.onnx.writing import program
from normswap.onnx.writing.program import write_program
from normswap.provenance import remember

RANDOMISED = proof._randomised_cases


class Tiny(nn.Module):
    def __init__(self, norm=None, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = norm if norm is not None else nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, 5, 1)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


class Segmenter(Tiny):
    def forward(self, x):
        y = super().forward(x)
        return OrderedDict(out=y, aux=y.mean((2, 3)))


class Pyramid(Tiny):
    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return [y, self.head(y)]


class TwoInputs(Tiny):
    def forward(self, image, *, mask, flag=True):
        return super().forward(image) * mask if flag else image


class Branching(Tiny):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.fixture(autouse=True)
def one_export(monkeypatch):
    """The proof without its second export, which most tests are not about."""
    monkeypatch.setattr(proof, "_randomised_cases", lambda *_: [])


def inputs(rows=2, size=8):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def ops(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = live(Net())
    remember(
        model,
        source={"spec": "python:here:Net"},
        preprocessing={"mean": [0.5, 0.5, 0.5]},
        class_names=tuple("abcdefghij"),
        plans=({"target": "gn"},),
    )
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return model, path, export_onnx(model, path, example_inputs=inputs(1, 16))


def test_the_proof_covers_batches_levels_stages_and_a_randomised_copy(exported):
    parity = exported[2]
    assert parity.passed
    assert parity.failure is None
    assert parity.top1_agreement == 1.0
    assert 0 < parity.max_relative_error < 1e-5
    assert {case.batch for case in parity.cases} == {1, 2, 5}
    assert {case.stage for case in parity.cases} == {
        "exported program",
        "onnxruntime off",
        "onnxruntime basic",
        "onnxruntime all",
        "row independence",
    }
    assert any(case.randomised for case in parity.cases)
    assert all(case.cosine > 0.999999 for case in parity.cases)


def test_the_file_has_a_named_batch_axis_and_runs_at_any_batch(exported):
    session = onnxruntime.InferenceSession(str(exported[1]))
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    assert [value.name for value in session.get_inputs()] == ["image"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    x = inputs(7, 16)
    with torch.no_grad():
        right = copy.deepcopy(exported[0]).eval()(x).numpy()
    assert relative_error(session.run(None, {"image": x.numpy()})[0], right) < 1e-5


def names_of(path):
    session = onnxruntime.InferenceSession(str(path))
    return tuple(
        [v.name for v in values] for values in (session.get_inputs(), session.get_outputs())
    )


@pytest.mark.parametrize(
    ("build", "given", "found"),
    [
        (Tiny, {}, (["image"], ["output"])),  # one row per image alone is logits
        (Segmenter, {}, (["image"], ["out", "aux"])),
        (Tiny, {"input_names": ["photo"], "output_names": "scores"}, (["photo"], ["scores"])),
        (Segmenter, {"output_names": ["mask", "side"]}, (["image"], ["mask", "side"])),
    ],
)
def test_inputs_and_outputs_have_names(build, given, found, tmp_path):
    model, path = build(), tmp_path / "m.onnx"
    assert export_onnx(model, path, example_inputs=inputs(), **given).passed
    assert names_of(path) == found
    assert verify_onnx(path, model, timeout=None).passed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_names": ["a", "b"]}, "output names: got 2 for 1"),
        ({"input_names": ["an image"]}, "input names: got 'an image'"),
        ({"input_names": ["y"], "output_names": ["y"]}, "got 'y' for an input and an output"),
    ],
)
def test_names_that_are_none_are_refused(given, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs(), **given)


def test_metadata_say_where_it_came_from_and_hold_no_path_of_this_machine(exported):
    props = {entry.key: entry.value for entry in onnx.load(exported[1]).metadata_props}
    assert '"python:here:Net"' in props["normswap.source"]
    assert '"gn"' in props["normswap.plans"]
    assert props["normswap.class_names"].startswith('["a","b"')
    assert len(props["normswap.graph_sha256"]) == 64
    assert '"passed":true' in props["normswap.proof"]
    assert '"onnxruntime"' in props["normswap.versions"]
    data = exported[1].read_bytes()
    assert b"site-packages" not in data
    assert b"/tests/" not in data


def test_the_model_is_left_as_it_was(tmp_path, capfd):
    model = Tiny().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    assert export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs()).passed
    assert model.training
    assert not model.norm.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert capfd.readouterr().out == ""
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


def spoil(monkeypatch, weight="head.weight"):
    """An exporter that gets one weight wrong."""

    def wrong(subject, path, options):
        draft = write_program(subject, path, options)
        edit_tensor(draft.file.proto, weight, lambda w: w * np.float32(1.01))
        save(draft.file)
        return draft

    monkeypatch.setattr(proof, "write_program", wrong)


def test_a_failed_proof_writes_nothing(tmp_path, monkeypatch):
    spoil(monkeypatch)
    (tmp_path / "m.onnx").write_text("the file of last week")
    with pytest.raises(ParityError, match="first divergent module: head") as caught:
        export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs())
    parity = caught.value.parity
    assert not parity.passed
    assert parity.divergence.module == "head"
    assert parity.stage == "onnxruntime off"
    assert (tmp_path / "m.onnx").read_text() == "the file of last week"
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


def test_allow_mismatch_writes_and_marks_the_file(tmp_path, monkeypatch):
    spoil(monkeypatch)
    path = tmp_path / "m.onnx"
    parity = export_onnx(Tiny(), path, example_inputs=inputs(), allow_mismatch=True)
    assert not parity.passed
    props = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert '"passed":false' in props["normswap.proof"]
    again = verify_onnx(path)
    assert not again.passed
    assert again.identity is True
    assert "although its proof failed" in again.notes[0]


def test_a_tolerance_of_ones_own(tmp_path, monkeypatch):
    spoil(monkeypatch)
    parity = export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs(), tolerance=0.05)
    assert parity.passed
    assert parity.max_relative_error > 1e-3


def test_folding_errors_show_on_the_randomised_copy_alone(tmp_path, monkeypatch):
    """An exporter that forgets running means gets fresh statistics right."""

    def forgetful(subject, path, options):
        other = copy.deepcopy(subject)
        other.model.norm.running_mean.zero_()
        return write_program(other, path, options)

    monkeypatch.setattr(proof, "write_program", forgetful)
    monkeypatch.setattr(proof, "_randomised_cases", RANDOMISED)
    with pytest.raises(ParityError) as caught:
        export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs())
    bad = [case for case in caught.value.parity.cases if not case.passed]
    assert bad
    assert all(case.randomised for case in bad)


def test_dict_outputs_keep_their_names(tmp_path):
    path = tmp_path / "m.onnx"
    assert export_onnx(Segmenter(), path, example_inputs=inputs()).passed
    assert [value.name for value in onnx.load(path).graph.output] == ["out", "aux"]
    assert verify_onnx(path).passed


def test_several_outputs_are_numbered(tmp_path):
    path = tmp_path / "m.onnx"
    assert export_onnx(Pyramid(), path, example_inputs=inputs()).passed
    assert [value.name for value in onnx.load(path).graph.output] == ["output_0", "output_1"]


def test_keyword_inputs_and_plain_arguments(tmp_path):
    path = tmp_path / "m.onnx"
    example = {"image": inputs(), "mask": torch.rand(2, 1, 8, 8), "flag": True}
    model = TwoInputs()
    assert export_onnx(model, path, example_inputs=example).passed
    assert [value.name for value in onnx.load(path).graph.input][:2] == ["image", "mask"]
    assert verify_onnx(path, model, example_inputs=example).passed


def test_dynamic_size_is_proven_at_a_second_resolution(tmp_path):
    path = tmp_path / "m.onnx"
    parity = export_onnx(Tiny(nn.GroupNorm(2, 4)), path, example_inputs=inputs(), dynamic_size=True)
    assert any("16×16" in case.name for case in parity.cases)
    axes = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param for axis in axes] == ["batch", "", "height", "width"]


def test_static_batch(tmp_path):
    path = tmp_path / "m.onnx"
    model = Tiny()
    parity = export_onnx(model, path, example_inputs=inputs(3), static_batch=True)
    assert {case.batch for case in parity.cases} == {3}
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert verify_onnx(path, model, example_inputs=inputs(3)).passed


def test_images_join_the_proof(tmp_path):
    parity = export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs(), images=inputs(3) * 2)
    assert any(case.name == "3 images" for case in parity.cases)


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"images: got a stack of shape \[3, 3, 9, 9\]"):
        export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs(), images=inputs(3, size=9))


def test_a_batch_statistic_left_in_is_caught(tmp_path):
    model = Tiny(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ParityError, match="row independence") as caught:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs())
    assert "model itself" in caught.value.parity.notes[0]


def test_what_torch_cannot_export_is_said_in_torchs_words(tmp_path):
    with pytest.raises(ExportError, match=r"from torch's own exporter: .*data-dependent"):
        export_onnx(Branching(), tmp_path / "m.onnx", example_inputs=inputs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"opset": 17}, "opset: got 17; need 18 to 23"),
        ({"example_inputs": "image"}, "example_inputs: got str"),
        ({"example_inputs": torch.zeros(1, 7)}, "from its own forward"),
    ],
)
def test_bad_requests(kwargs, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(Tiny(), tmp_path / "m.onnx", **{"example_inputs": inputs(), **kwargs})


def test_a_directory_is_no_destination(tmp_path):
    with pytest.raises(ExportError, match="a directory"):
        export_onnx(Tiny(), tmp_path, example_inputs=inputs())


def test_weights_above_the_limit_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "ONE_FILE_BYTES", 0)
    path, model = tmp_path / "m.onnx", Tiny()
    assert export_onnx(model, path, example_inputs=inputs()).passed
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert verify_onnx(path).passed
    assert verify_onnx(path, model, example_inputs=inputs()).passed
    data = path.with_name("m.onnx.data")
    raw = bytearray(data.read_bytes())
    raw[2] ^= 0xFF
    data.write_bytes(bytes(raw))
    parity = verify_onnx(path)
    assert parity.identity is False
    assert not parity.passed


def test_half_keeps_the_norms_wide_and_warns_of_large_squares(tmp_path):
    model = Tiny(nn.GroupNorm(2, 4))
    with torch.no_grad():
        model.conv.weight.mul_(1000)
    path = tmp_path / "m.onnx"
    parity = export_onnx(model, path, example_inputs=inputs(), half=True)
    assert parity.passed
    assert 1e-6 < parity.max_relative_error < 1e-2
    assert parity.notes[0].startswith("norm: inputs up to")
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert all(
        kinds[node.input[1]] == onnx.TensorProto.FLOAT16
        for node in graph.node
        if node.op_type == "Conv" and node.input[0].endswith("fp16")
    )
    assert any(node.op_type == "InstanceNormalization" for node in graph.node)
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert verify_onnx(path, model, example_inputs=inputs()).passed


def test_half_keeps_a_norm_of_many_nodes_wide_from_its_first_to_its_last(tmp_path):
    """Squares of a thousand, which float16 cannot hold, even between two nodes."""
    model = Tiny(FilterResponseNorm2d(4))
    with torch.no_grad():
        model.conv.weight.mul_(3000)
    parity = export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs(), half=True)
    assert parity.max_relative_error < 1e-2


@pytest.mark.parametrize(
    "norm", [BatchRenorm2d(4), CrossIterationBatchNorm2d(4), FrozenBatchNorm2d(4)]
)
def test_norms_with_running_statistics_vanish_into_the_convolution(norm, tmp_path):
    path = tmp_path / "m.onnx"
    assert export_onnx(Tiny(norm), path, example_inputs=inputs()).passed
    assert ops(path) == ["Conv", "Relu", "Conv"]


def test_frn_squares_by_a_product(tmp_path):
    path = tmp_path / "m.onnx"
    model = Tiny(FilterResponseNorm2d(4))
    assert export_onnx(model, path, example_inputs=inputs()).passed
    assert "Pow" not in ops(path)


GROUP_NORM = ["Reshape", "InstanceNormalization", "Shape", "Reshape"]
RESPONSE = ["Mul", "GlobalAveragePool", "Add", "Sqrt", "Reciprocal", "Mul"]


@pytest.mark.parametrize(
    ("norm", "middle"),
    [
        (nn.GroupNorm(4, 16), [*GROUP_NORM, "Conv", "Relu"]),
        (FilterResponseNorm2d(16, tlu=False), [*RESPONSE, "Conv", "Relu"]),
        (FilterResponseNorm2d(16), [*RESPONSE, "Mul", "Add", "Max", "Relu"]),
        (nn.GroupNorm(4, 20), [*GROUP_NORM, "Mul", "Add", "Relu"]),
    ],
    ids=["gn", "frn", "frn-tlu", "gn-odd"],
)
def test_norms_take_the_form_that_runs_fastest(norm, middle, tmp_path, monkeypatch):
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.copy_(torch.linspace(0.1 if name == "tau" else 0.5, 1.5, len(parameter)))
    path = tmp_path / "m.onnx"
    model = Tiny(norm, channels=len(norm.weight))
    parity = export_onnx(model, path, example_inputs=inputs())
    assert parity.max_relative_error < 1e-5
    assert ops(path) == ["Conv", *middle, "Conv"]
    spoil(monkeypatch)
    with pytest.raises(ParityError, match="first divergent module: head"):
        export_onnx(model, path, example_inputs=inputs())
    if middle[-2] == "Conv":
        affine = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"][1]
        spoil(monkeypatch, affine.input[1])
        with pytest.raises(ParityError, match="first divergent module: norm"):
            export_onnx(model, path, example_inputs=inputs())


def test_thresholds_of_zero_are_a_relu(tmp_path):
    path = tmp_path / "m.onnx"
    assert export_onnx(
        Tiny(FilterResponseNorm2d(16), channels=16), path, example_inputs=inputs()
    ).passed
    assert ops(path) == ["Conv", *RESPONSE, "Conv", "Relu", "Relu", "Conv"]


class Padded(nn.Module):
    """Zeros around a pool whose inputs are negative, as HGNet's stem may have them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x):
        x = -self.norm(self.conv(x)).exp()
        x = nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1)), 2, 1)
        return nn.functional.max_pool2d(nn.functional.pad(x, (1, 1), value=-torch.inf), 3)


def test_zeros_before_a_max_pool_stay_zeros(tmp_path):
    """Onnxruntime's own fusion takes them for -inf."""
    assert export_onnx(Padded(), tmp_path / "m.onnx", example_inputs=inputs()).passed


def test_the_rule():
    assert tolerance_for(1e-7) == 1e-4
    assert tolerance_for(2e-4) == pytest.approx(6e-4)
    assert tolerance_for(0.5) == 1e-3
    assert tolerance_for(float("nan")) == 1e-4


def test_the_comparison():
    right = np.array([[1.0, 3.0, 2.0], [5.0, 5.0 + 1e-6, 0.0]])
    same = deviation(right + 1e-7, right, tie=1e-4)
    assert (same.decided, same.agreed, same.ties) == (1, 1, 1)
    flipped = deviation(right[:, ::-1], right, tie=1e-4)
    assert flipped.agreed == 1  # the middle wins the first row either way
    assert deviation(right[:1], right, tie=1e-4).problem.startswith("shape")
    assert deviation(right * np.nan, right, tie=1e-4).problem == "NaN or Inf"
    assert relative_error(np.array([2.0, 1.0]), np.array([2.0, -2.0])) == 1.5
    assert relative_error(np.zeros(3), np.zeros(3)) == 0.0
    assert relative_error(np.array([-np.inf, 1.5]), np.array([-np.inf, 2.0])) == 0.25
    assert relative_error(np.array([np.inf, 2.0]), np.array([-np.inf, 2.0])) == np.inf
    assert relative_error(np.array([np.nan]), np.array([np.nan])) == np.inf


def test_rounding_is_the_models_and_not_one_batchs(monkeypatch):
    """Torch's own error differs several times over between batches; the tolerance does not."""
    truth = GroundTruth.of(subject_of(Tiny().eval(), inputs()))
    errors = {1: 1e-6, 2: 2e-4, 5: 3e-5}

    def run(_self, trial):
        right = np.ones((trial.batch, 3))
        return [(right, right + errors[trial.batch])]

    monkeypatch.setattr(GroundTruth, "_run", run)
    trials = [Trial(str(n), [], n) for n in errors]
    found = truth.references(trials)
    assert [r.tolerances for r in found] == [[pytest.approx(6e-4)]] * 3
    assert [r.torch_errors[0] for r in found] == pytest.approx(list(errors.values()))


@pytest.mark.parametrize("tolerance", [0, -1e-3, 1.0, float("inf"), float("nan")])
def test_a_tolerance_that_proves_nothing_is_refused(tolerance, exported, tmp_path):
    with pytest.raises(ExportError, match="above 0 and below 1"):
        export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs(), tolerance=tolerance)
    with pytest.raises(ExportError, match="above 0 and below 1"):
        verify_onnx(exported[1], model=exported[0], tolerance=tolerance)


def test_verify_refuses_what_only_a_model_could_use(exported):
    for options in ({"tolerance": 1e-3}, {"images": inputs()}, {"example_inputs": inputs()}):
        with pytest.raises(ExportError, match="without a model"):
            verify_onnx(exported[1], **options)


def test_a_destination_that_cannot_be_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="a place where a file can be written"):
        export_onnx(Tiny(), tmp_path / "file" / "m.onnx", example_inputs=inputs())


def test_a_program_that_cannot_be_looked_into_is_a_failed_proof_all_the_same(tmp_path, monkeypatch):
    """Torch's exporter may fix the batch size of a program that it let through as dynamic."""

    def refuses(*_):
        raise AssertionError("Guard failed: x.size()[0] == 2")

    spoil(monkeypatch)
    monkeypatch.setattr(proof.blame, "program_values", refuses)
    with pytest.raises(ParityError, match="function:"):
        export_onnx(Tiny(), tmp_path / "m.onnx", example_inputs=inputs())


class Either(nn.Module):
    """Branches that the graph keeps, each with weights of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
        self.small, self.large = nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        return torch.cond(x.sum() > 0, self.small, self.large, (y,))


def test_weights_that_only_a_branch_reads_stay_in_the_file(tmp_path):
    path = tmp_path / "m.onnx"
    assert export_onnx(Either(), path, example_inputs=inputs(), static_batch=True).passed
    assert "If" in ops(path)
    assert verify_onnx(path).passed
