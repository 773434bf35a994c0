"""Detectors as ONNX files: traced, proven on detections as sets, and refused where they differ."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx_support import edit_tensor
from torch import nn
from torchvision.models.detection import FCOS, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD, DefaultBoxGenerator, SSDHead
from torchvision.ops import MultiScaleRoIAlign

import normswap
from normswap.errors import ExportError, ParityError
from normswap.onnx import export_onnx, verify_onnx
from normswap.onnx.file.detections import Cut, match
from normswap.onnx.file.metadata import read_metadata, sign
from normswap.onnx.file.parsing import messages, read_onnx
from normswap.onnx.file.selftest import pictured
from normswap.onnx.proving import proof
from normswap.onnx.writing import traced

SIZE = 64


class Backbone(nn.Sequential):
    """Three convolutions with BatchNorm, a sixteenth of the image."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        for width_in, width_out, stride in ((3, 8, 4), (8, 16, 2), (16, 32, 2)):
            conv = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
            self.extend([conv, nn.BatchNorm2d(width_out), nn.ReLU()])


def detector(kind=FasterRCNN, seed=0, classes=4):
    """A detector of a few thousand weights whose scores differ, as after training."""
    torch.manual_seed(seed)
    sizes = {"min_size": SIZE, "max_size": 2 * SIZE}
    if kind is SSD:
        boxes = DefaultBoxGenerator([[2]], scales=[0.2, 0.5])
        head = SSDHead([32], boxes.num_anchors_per_location(), classes)
        model = SSD(Backbone(), boxes, (SIZE, SIZE), classes, head=head)
    elif kind in (RetinaNet, FCOS):
        anchors = AnchorGenerator(((16,),) if kind is FCOS else ((16, 32),), ((1.0,),))
        model = kind(Backbone(), classes, anchor_generator=anchors, **sizes)
    else:
        anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0),))
        heads = {
            "box_roi_pool": pool(4),
            "box_head": TwoMLPHead(32 * 16, 32),
            "box_predictor": FastRCNNPredictor(32, classes),
            "box_detections_per_img": 30,
        }
        if kind is MaskRCNN:
            heads |= {"mask_roi_pool": pool(6), "mask_head": MaskRCNNHeads(32, (8,), 1)}
            heads["mask_predictor"] = MaskRCNNPredictor(8, 8, classes)
        if kind is KeypointRCNN:
            heads |= {"keypoint_roi_pool": pool(6), "keypoint_head": KeypointRCNNHeads(32, (8,))}
            heads["keypoint_predictor"] = KeypointRCNNPredictor(8, 3)
        model = kind(Backbone(), rpn_anchor_generator=anchors, **heads, **sizes)
    return lively(model).eval()


def lively(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if "classification_head" in name and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if name.endswith(("cls_score", "cls_logits", "classification_head.module_list.0")):
            module.weight.data.normal_(0, 0.3)
    return model


def pool(size):
    return MultiScaleRoIAlign(["0"], output_size=size, sampling_ratio=2)


def image(seed=100, size=(SIZE, SIZE)):
    return torch.from_numpy(pictured(seed, (3, *size)))


@pytest.fixture
def one_export(monkeypatch):
    """The proof without its second export."""
    monkeypatch.setattr(proof, "_randomised_cases", lambda *_: [])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = detector()
    model = normswap.convert(model, "gn", example_inputs=[image()]).model.eval()
    path = tmp_path_factory.mktemp("detector") / "model.onnx"
    return model, path, export_onnx(model, path, example_inputs=[image(), image(101)])


def session(path):
    return onnxruntime.InferenceSession(str(path))


def found(path, picture):
    run = session(path)
    names = [value.name for value in run.get_outputs()]
    return dict(zip(names, run.run(None, {"image": picture.numpy()}), strict=True))


def with_torch(model, picture):
    with torch.no_grad():
        return {name: value.numpy() for name, value in model([picture])[0].items()}


@pytest.mark.parametrize("kind", [RetinaNet, FCOS, SSD, MaskRCNN, KeypointRCNN])
def test_every_kind_of_detector_is_exported_proven_and_verified(kind, tmp_path, one_export):
    model, path = detector(kind), tmp_path / "model.onnx"
    parity = export_onnx(model, path, example_inputs=[image()])
    assert parity.passed, str(parity)
    assert max(case.decided for case in parity.cases if case.output == "detections") >= 5
    assert {value.name for value in session(path).get_outputs()} == set(model([image()])[0])
    alone = verify_onnx(path, timeout=None)
    assert alone.passed, str(alone)
    outputs = {case.output for case in alone.cases}
    assert {"boxes", "scores", "labels"} <= outputs
    assert any("cls_logits" in name or "module_list" in name for name in outputs)


def test_the_proof_of_a_detector_covers_sets_layers_levels_and_a_copy(exported):
    parity = exported[2]
    assert parity.passed
    assert {c.stage for c in parity.cases} == {f"onnxruntime {x}" for x in ("off", "basic", "all")}
    outputs = {case.output for case in parity.cases}
    assert {"detections", "boxes", "scores"} <= outputs
    assert "roi_heads.box_predictor.bbox_pred, before any decision" in outputs
    assert "rpn.head.cls_logits, before any decision" in outputs
    assert any(case.randomised for case in parity.cases)
    assert len({case.name.partition(",")[0] for case in parity.cases}) >= 3
    assert any("compared as sets on 3 images" in note for note in parity.notes)
    none = [c for c in parity.cases if c.output == "detections" and c.decided == 0]
    assert none  # an image on which nothing is found runs as well
    full = [c for c in parity.cases if c.output == "detections" and c.decided + c.ties >= 30]
    assert full


def test_a_detectors_file_has_its_names_and_its_norms_in_the_fast_form(exported):
    run = session(exported[1])
    assert [value.name for value in run.get_inputs()] == ["image"]
    assert run.get_inputs()[0].shape == [3, SIZE, SIZE]
    assert [value.name for value in run.get_outputs()] == ["boxes", "labels", "scores"]
    nodes = onnx.load(exported[1]).graph.node
    grouped = [n for n in nodes if n.op_type == "Conv" and n.output[0].endswith("Add_output_0")]
    assert (
        len(grouped) == 2
    )  # of 16 and 32 channels: γ and β of GroupNorm as a depthwise convolution
    assert not any(n.op_type == "Constant" for n in nodes)
    props = {entry.key: entry.value for entry in onnx.load(exported[1]).metadata_props}
    assert '"gn"' in props["normswap.plans"]
    assert b"site-packages" not in exported[1].read_bytes()


def test_a_detectors_file_passes_with_its_model(exported):
    model, path, _ = exported
    parity = verify_onnx(path, model, timeout=None)
    assert parity.passed, str(parity)
    assert parity.identity is True
    assert verify_onnx(path, model, example_inputs=[image(3)], timeout=None).passed


def test_a_detectors_file_is_verified_without_torch(exported):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "from normswap.onnx import verify_onnx\n"
        "parity = verify_onnx(sys.argv[1]); print(parity); sys.exit(not parity.passed)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(exported[1])], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def signed_anew(path, change, target):
    """A damaged file that says it is whole: what is left to see is what it computes."""
    file = read_onnx(path)
    fields = dict(read_metadata(file).fields)
    change(file.proto)
    target.write_bytes(file.proto.SerializeToString())
    sign(read_onnx(target), {k: v for k, v in fields.items() if k != "format_version"})
    return target


def weight_changed(proto):
    name = next(n.input[1] for n in proto.graph.node if n.op_type == "Conv")
    edit_tensor(proto, name, lambda w: w + np.linspace(0, 0.1, w.size, dtype="f4").reshape(w.shape))


def boxes_of_one_class_shifted(proto):
    def shift(bias):
        bias = bias.copy()
        bias[4:8] += np.float32(0.05)  # the first class that is not background
        return bias

    edit_tensor(proto, "roi_heads.box_predictor.bbox_pred.bias", shift)


def classes_exchanged(proto):
    def exchange(weight):
        return weight[[0, 2, 1, *range(3, len(weight))]]

    for kind in ("weight", "bias"):
        edit_tensor(proto, f"roi_heads.box_predictor.cls_score.{kind}", exchange)


def constants_of(proto, op, position):
    """What nodes read there, also in the graphs inside them."""
    nodes = [m for m in messages(proto) if isinstance(m, onnx.NodeProto)]
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    known |= {n.output[0]: n.attribute[0].t for n in nodes if n.op_type == "Constant"}
    readers = [n for n in nodes if n.op_type == op and len(n.input) > position]
    return [known[n.input[position]] for n in readers if n.input[position] in known]


def filled(tensor, value):
    shape = numpy_helper.to_array(tensor).shape
    tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value, np.float32), tensor.name))


def overlap_threshold_changed(proto):
    found = constants_of(proto, "NonMaxSuppression", 3)
    half = [t for t in found if abs(float(numpy_helper.to_array(t).reshape(-1)[0]) - 0.5) < 1e-6]
    filled(half[0], 0.8)


def score_threshold_changed(proto):
    for tensor in constants_of(proto, "Greater", 1):
        filled(tensor, 0.2)


def boxes_shifted_at_the_end(proto):
    node = next(n for n in proto.graph.node if "boxes" in n.output)
    node.output[list(node.output).index("boxes")] = "straight"
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half_a_pixel"))
    proto.graph.node.append(onnx.helper.make_node("Add", ["straight", "half_a_pixel"], ["boxes"]))


DAMAGES = [
    weight_changed,
    boxes_of_one_class_shifted,
    classes_exchanged,
    overlap_threshold_changed,
    score_threshold_changed,
    boxes_shifted_at_the_end,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_detector_fails_alone_and_with_its_model(damage, exported, tmp_path, one_export):
    model, path, _ = exported
    bad = signed_anew(path, damage, tmp_path / "bad.onnx")
    against = verify_onnx(bad, model, timeout=None)
    assert not against.passed
    assert against.identity is True
    assert against.cause == "file"
    assert against.failure.startswith("function: ")
    alone = verify_onnx(bad, timeout=None)
    assert not alone.passed


def test_a_damaged_detector_that_is_not_signed_anew_fails_by_its_identity(exported, tmp_path):
    proto = onnx.load(exported[1])
    overlap_threshold_changed(proto)
    onnx.save(proto, tmp_path / "bad.onnx")
    assert verify_onnx(tmp_path / "bad.onnx").stage == "identity"


def test_a_weight_that_no_detection_shows_fails_too(exported, tmp_path, one_export):
    """The boxes of a class that is never found."""
    model = exported[0]
    silent = {name: value.clone() for name, value in model.state_dict().items()}
    silent["roi_heads.box_predictor.cls_score.bias"][3] = -50.0
    other = detector()
    other = normswap.convert(other, "gn", example_inputs=[image()]).model.eval()
    other.load_state_dict(silent)
    good = tmp_path / "good.onnx"
    assert export_onnx(other, good, example_inputs=[image()]).passed

    def last_class(proto):
        def shift(bias):
            bias = bias.copy()
            bias[12:] += np.float32(0.5)
            return bias

        edit_tensor(proto, "roi_heads.box_predictor.bbox_pred.bias", shift)

    bad = signed_anew(good, last_class, tmp_path / "bad.onnx")
    parity = verify_onnx(bad, other, timeout=None)
    assert not parity.passed
    assert "bbox_pred, before any decision" in parity.failure


def test_an_exporter_that_errs_writes_nothing(tmp_path, monkeypatch, one_export):
    real = proof.write_program

    def wrong(subject, path, options):
        draft = real(subject, path, options)
        overlap_threshold_changed(draft.file.proto)
        path.write_bytes(draft.file.proto.SerializeToString())
        return draft

    monkeypatch.setattr(proof, "write_program", wrong)
    with pytest.raises(ParityError, match="detections"):
        export_onnx(detector(), tmp_path / "m.onnx", example_inputs=[image()])
    assert list(tmp_path.iterdir()) == []


def test_detections_whose_scores_are_all_at_the_threshold_prove_nothing(tmp_path):
    model = detector(RetinaNet)
    nn.init.normal_(model.head.classification_head.cls_logits.weight, 0, 1e-5)
    with pytest.raises(ParityError, match="rounding does not change on 0 of"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=[image()])


def test_detections_that_hang_by_a_hair_prove_nothing(tmp_path):
    """Every box has the same score: which of them are kept is rounding alone."""
    model = detector()
    for layer in (model.roi_heads.box_predictor.cls_score, model.rpn.head.cls_logits):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, 0, 1e-9)
    with pytest.raises(ParityError, match="detections that rounding does not change on 0 of") as e:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=[image()])
    assert e.value.parity.cause == "network"
    assert list(tmp_path.iterdir()) == []


def test_a_detector_that_finds_nothing_is_proven_where_it_finds_something(tmp_path, one_export):
    model, path = detector(RetinaNet), tmp_path / "m.onnx"
    model.score_thresh = 0.999
    assert len(with_torch(model, image())["scores"]) == 0
    parity = export_onnx(model, path, example_inputs=[image()])
    assert parity.passed
    assert any("no image gave a detection at the model's own" in note for note in parity.notes)
    assert max(case.decided for case in parity.cases if case.output == "detections") >= 5
    assert found(path, image(5))["boxes"].shape == (0, 4)
    assert verify_onnx(path, timeout=None).passed


class TwoLevels(Backbone):
    """The map, and one of half its size."""

    def forward(self, x):
        found = super().forward(x)
        return {"0": found, "1": nn.functional.max_pool2d(found, 2)}


@pytest.mark.parametrize("levels", [1, 2])
def test_a_norm_behind_the_boxes_runs_where_there_is_none(levels, tmp_path, one_export):
    """Of one level the size of the map is known beforehand, of two it is not."""
    model, path = detector(MaskRCNN), tmp_path / "m.onnx"
    model.roi_heads.mask_head = MaskRCNNHeads(32, (8,), 1, norm_layer=nn.BatchNorm2d)
    if levels == 2:
        torch.manual_seed(0)
        model.backbone = TwoLevels()
        model.rpn.anchor_generator = AnchorGenerator(((16,), (32,)), ((0.5, 2.0),) * 2)
        for name, size in (("box_roi_pool", 4), ("mask_roi_pool", 6)):
            pooled = MultiScaleRoIAlign(["0", "1"], output_size=size, sampling_ratio=2)
            setattr(model.roi_heads, name, pooled)
    model = normswap.convert(lively(model), "gn", example_inputs=[image()]).model.eval()
    assert isinstance(model.roi_heads.mask_head[0][1], nn.GroupNorm)
    model.roi_heads.score_thresh = 0.999
    assert len(with_torch(model, image())["scores"]) == 0
    export_onnx(model, path, example_inputs=[image()])
    assert found(path, image())["masks"].shape == (0, 1, SIZE, SIZE)


def test_dynamic_size_is_proven_at_a_second_size(tmp_path, one_export):
    model, path = detector(), tmp_path / "m.onnx"
    parity = export_onnx(model, path, example_inputs=[image()], dynamic_size=True)
    assert parity.passed
    assert any(f"of {SIZE + 32}×{SIZE + 64}" in case.name for case in parity.cases)
    assert session(path).get_inputs()[0].shape == [3, "height", "width"]
    for size in ((80, 112), (128, 64)):
        picture = image(7, size)
        right, mine = with_torch(model, picture), found(path, picture)
        limits = {"boxes": 1e-4, "scores": 1e-4}
        assert match(mine, right, limits, Cut(0.05, 30)).whole
        assert len(right["scores"]) > 0


def test_a_torch_without_the_older_exporter_says_so_in_one_line(tmp_path, monkeypatch):
    def newer(model, args=(), f=None, *, opset_version=None):
        raise AssertionError("it must not be called")

    monkeypatch.setattr(traced.torch.onnx, "export", newer)
    with pytest.raises(ExportError, match="no TorchScript-based ONNX exporter any more") as caught:
        export_onnx(detector(), tmp_path / "m.onnx", example_inputs=[image()])
    assert "\n" not in str(caught.value)


def test_a_torch_that_ignores_the_wish_for_the_older_exporter_says_so(tmp_path, monkeypatch):
    def newer(*_, dynamo=True, **__):
        raise ValueError("dynamo=False is no longer supported")

    monkeypatch.setattr(traced.torch.onnx, "export", newer)
    with pytest.raises(ExportError, match="no TorchScript-based ONNX exporter any more"):
        export_onnx(detector(), tmp_path / "m.onnx", example_inputs=[image()])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"half": True}, "float32: what float16"), ({"opset": 21}, "got 21; need at most 20")],
)
def test_what_a_detector_cannot_have_is_said(options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(detector(), tmp_path / "m.onnx", example_inputs=[image()], **options)


def test_images_of_ones_own_are_part_of_the_proof(tmp_path, one_export):
    images = [image(200), image(201)]
    path = tmp_path / "m.onnx"
    parity = export_onnx(detector(), path, example_inputs=[image()], images=images)
    assert {"image 1", "image 2"} <= {case.name for case in parity.cases}
    with pytest.raises(ExportError, match=r"need images of shape \[3, 64, 64\]"):
        export_onnx(detector(), path, example_inputs=[image()], images=[image(1, (32, 32))])


def test_a_stack_of_images_is_taken_as_the_model_takes_it(tmp_path, one_export):
    model, path = detector(SSD), tmp_path / "m.onnx"
    assert export_onnx(model, path, example_inputs=image()[None]).passed
    assert session(path).get_inputs()[0].shape == [1, 3, SIZE, SIZE]


def test_a_detectors_file_is_called_as_the_model_is(exported):
    model, path, _ = exported
    images = [image(3), image(4)]
    opened = normswap.load_onnx(path, timeout=None)
    assert opened.detector
    assert opened.batch_size is None
    for mine, picture in zip(opened(images), images, strict=True):
        right = with_torch(model, picture)
        plain = {name: value.numpy() for name, value in mine.items()}
        assert match(plain, right, LIMITS, Cut(0.05, 30)).whole
        assert len(right["scores"]) > 0


def sets(*rows):
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": np.array(labels, np.int64),
        "scores": np.array(scores, np.float32),
    }


A = ((0, 0, 10, 10), 1, 0.9)
B = ((50, 50, 100, 100), 2, 0.5)
LIMITS = {"boxes": 1e-3, "scores": 1e-3}


@pytest.mark.parametrize(
    ("mine", "right", "missing", "extra"),
    [
        ([B, A], [A, B], 0, 0),  # the order is free
        ([A], [A, B], 1, 0),
        ([A, B, B], [A, B], 0, 1),  # found twice
        ([A, ((50, 50, 100, 100), 3, 0.5)], [A, B], 1, 1),
        ([A, ((50, 50, 100, 100.2), 2, 0.5)], [A, B], 1, 1),
        ([A, ((50, 50, 100, 100.05), 2, 0.5)], [A, B], 0, 0),
        ([A, ((50, 50, 100, 100), 2, 0.51)], [A, B], 1, 1),
        ([], [], 0, 0),
        ([], [A], 1, 0),
        ([A], [], 0, 1),
    ],
)
def test_detections_are_matched_as_sets(mine, right, missing, extra):
    found = match(sets(*mine), sets(*right), LIMITS, Cut(0.05, 100))
    assert (len(found.missing), len(found.extra)) == (missing, extra)


def test_only_scores_at_the_threshold_or_at_the_limit_are_free():
    near = ((0, 0, 5, 5), 1, 0.0505)
    assert match(sets(A), sets(A, near), LIMITS, Cut(0.05)).free == 1
    assert match(sets(A), sets(A, near), LIMITS, Cut(0.04)).missing == (1,)
    last = ((0, 0, 5, 5), 1, 0.5004)
    assert match(sets(A, last), sets(A, B), LIMITS, Cut(0.05, 2)).whole
    assert not match(sets(A, last), sets(A, B), LIMITS, Cut(0.05, 3)).whole


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["shift"].update(own=[]),
        lambda t: t["shift"].update(other="x"),
        lambda t: t.update(outputs=t["outputs"][:1]),
        lambda t: t.update(outputs=[*t["outputs"], t["outputs"][0]]),
        lambda t: t["outputs"][0].update(shape=[1]),
        lambda t: t["inputs"][0].update(shape=[4]),
        lambda t: t.update(layers=7),
    ],
)
def test_a_detectors_self_test_that_is_none_is_refused(change, exported, tmp_path):
    file = read_onnx(exported[1])
    fields = json.loads(json.dumps(dict(read_metadata(file).fields)))
    change(fields["self_test"])
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(file.proto.SerializeToString())
    sign(read_onnx(bad), {k: v for k, v in fields.items() if k != "format_version"})
    parity = verify_onnx(bad)
    assert not parity.passed
    assert parity.failure.startswith("identity: ")


def test_the_self_test_holds_detections_and_layers(exported):
    test = read_metadata(read_onnx(exported[1])).self_test()
    assert test.detector
    assert test.shift is not None
    assert {"boxes", "labels", "scores"} == {output.name for output in test.outputs}
    assert any("bbox_pred/Gemm" in layer.name for layer in test.layers)
    assert dataclasses.replace(test, layers=()).detector
