"""The detection task: torchvision's losses, COCO's mAP, and a run from start to end."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from dense_runs import SIZE, Squares, detector, two_stage_detector
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors

import normswap
from normswap.data import detection_dataset
from normswap.errors import DataError, TrainingError
from normswap.factories.heads import detector_classes, graft_head
from normswap.training import FineTune, evaluate, finetune
from normswap.training.tasks import Detection

pytest.importorskip("torchmetrics")

OPTIONS = FineTune(batch_size=2, epochs=1, learning_rate=1e-2)


def test_a_run_learns_and_is_judged_by_map(tmp_path):
    model = two_stage_detector()
    normswap.convert(model, "gn", example_inputs=[torch.rand(3, SIZE, SIZE)])
    squares = Squares(12, seed=1, first=1)
    held_out = [squares[i] for i in range(12)]
    options = FineTune(batch_size=2, epochs=4, learning_rate=1e-2)
    history = finetune(
        model, Squares(48, first=1), held_out, options, task="detection", out=tmp_path
    )
    assert history.best.val_metric > 0.3 > history.start.metric
    assert history.original is not None
    assert history.best.val_loss is None
    judge = Detection()
    found = evaluate(model, held_out, task=judge, batch_size=5)
    assert found.metric == pytest.approx(history.best.val_metric, abs=1e-6)
    assert judge.summary["mAP"] == found.metric
    assert set(judge.by_class) == {1, 2, 3}
    assert "metric" in str(found)
    assert "nan" not in str(found)
    assert (tmp_path / "learning_curve.png").exists()


def test_an_update_minimises_the_sum_of_torchvisions_losses():
    images, targets = zip(*(Squares(2, first=1)[i] for i in range(2)), strict=True)
    data = list(zip(images, targets, strict=True))
    mine = two_stage_detector("gn")
    reference = copy.deepcopy(mine)
    plain = FineTune(
        batch_size=2, epochs=1, learning_rate=0.1, optimizer="sgd", weight_decay=0.0, momentum=0.0,
        warmup_epochs=0, seed=3,
    )  # fmt: skip
    finetune(mine, data, None, plain, task="detection")
    torch.manual_seed(3)  # the samplers of anchors and proposals draw
    order = torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for pair in (order, order[::-1]):
        twin = copy.deepcopy(reference).train()
        torch.manual_seed(3)
        loss = sum(twin([images[i] for i in pair], [targets[i] for i in pair]).values())
        loss.backward()
        losses.append([p - 0.1 * p.grad for p in twin.parameters()])
    assert any(
        all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(mine.parameters(), expected, strict=True)
        )
        for expected in losses
    )


# ------------------------------------------------------------------------------- mAP, by COCO


class Guesser(nn.Module):
    """Says what it was told to say, image by image."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.at = answers, 0
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        found = self.answers[self.at : self.at + len(images)]
        self.at += len(images)
        return found


def coco_folder(root, generator, images=8):
    """Images of 64 px with boxes of three categories, some of them crowds, some images empty."""
    (root / "images").mkdir()
    annotations, listed = [], []
    for image in range(images):
        listed.append({"id": image, "file_name": f"{image:02}.png", "width": 64, "height": 64})
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / f"images/{image:02}.png")
        for _ in range(0 if image == 3 else int(generator.integers(1, 6))):
            x, y = generator.uniform(0, 40, 2).round(2)
            w, h = generator.uniform(3, 24, 2).round(2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(generator.choice([2, 5, 9])),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h),
                    "iscrowd": int(generator.random() < 0.15),
                }
            )
    data = {
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": key, "name": f"c{key}"} for key in (2, 5, 9)],
    }
    (root / "annotations.json").write_text(json.dumps(data))
    return data


def guesses(data, generator):
    """The truth shaken, with false ones among it, in the order of the images."""
    answers = []
    for image in range(len(data["images"])):
        boxes, labels = [], []
        for item in data["annotations"]:
            if item["image_id"] == image:
                x, y, w, h = item["bbox"]
                shaken = np.array([x, y, x + w, y + h]) + generator.normal(0, 1.5, 4)
                boxes.append(shaken)
                labels.append({2: 1, 5: 2, 9: 3}[item["category_id"]])
        for _ in range(3):
            x, y, w, h = generator.uniform(1, 30, 4)
            boxes.append(np.array([x, y, x + w, y + h]))
            labels.append(int(generator.integers(1, 4)))
        answers.append(
            {
                "boxes": torch.tensor(np.array(boxes), dtype=torch.float32),
                "labels": torch.tensor(labels),
                "scores": torch.tensor(generator.random(len(boxes)), dtype=torch.float32),
            }
        )
    return answers


@pytest.mark.parametrize("seed", [0, 1])
def test_map_is_that_of_pycocotools(seed, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    generator = np.random.default_rng(seed)
    data = coco_folder(tmp_path, generator)
    answers = guesses(data, generator)
    truth = coco.COCO(str(tmp_path / "annotations.json"))
    said = [
        {
            "image_id": image,
            "category_id": {1: 2, 2: 5, 3: 9}[int(label)],
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": float(score),
        }
        for image, answer in enumerate(answers)
        for box, label, score in zip(
            answer["boxes"], answer["labels"], answer["scores"], strict=True
        )
    ]
    expected = cocoeval.COCOeval(truth, truth.loadRes(said), "bbox")
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    judge = Detection()
    dataset = detection_dataset(tmp_path, "all")
    found = evaluate(Guesser(answers), dataset, task=judge, batch_size=3)
    assert found.images == 8
    assert found.metric == pytest.approx(expected.stats[0], abs=1e-6)
    assert judge.summary["mAP 0.5"] == pytest.approx(expected.stats[1], abs=1e-6)
    assert judge.summary["mAP 0.75"] == pytest.approx(expected.stats[2], abs=1e-6)
    assert judge.summary["recall"] == pytest.approx(expected.stats[8], abs=1e-6)
    assert 0.05 < found.metric < 0.95


def test_without_a_box_there_is_no_map():
    answers = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long),
                "scores": torch.zeros(0)}] * 2  # fmt: skip
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    data = [(torch.rand(3, 8, 8), empty)] * 2
    assert math.isnan(evaluate(Guesser(answers), data, task="detection").metric)


# ------------------------------------------------------------------------- forms, and refusals


def collated(samples):
    return tuple(zip(*samples, strict=True))


@pytest.mark.parametrize("form", ["dataset", "list", "loader", "tv_tensors", "two sizes"])
def test_every_form_of_data(form):
    squares = Squares(4)
    pairs = [squares[i] for i in range(4)]
    data = {
        "dataset": squares,
        "list": pairs,
        "loader": DataLoader(squares, batch_size=2, collate_fn=collated),
        "tv_tensors": [(tv_tensors.Image(image), target) for image, target in pairs],
        "two sizes": [(image[:, : 32 - 4 * (i % 2)], target)
                      for i, (image, target) in enumerate(pairs)],
    }[form]  # fmt: skip
    history = finetune(detector("gn"), data, data, OPTIONS, task="detection")
    assert history.steps == 2
    assert math.isfinite(history.epochs[0].train_loss)
    assert history.epochs[0].val_metric is not None


def test_images_without_boxes_are_trained_on():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    data = [(torch.rand(3, SIZE, SIZE), empty)] * 3
    for model in (detector("gn"), two_stage_detector("gn")):
        history = finetune(model, data, None, OPTIONS, task="detection")
        assert math.isfinite(history.epochs[0].train_loss)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": torch.tensor([[4.0, 4, 4, 9]])}, r"sample 3: got the box \[4.0, 4.0, 4.0"),
        ({"boxes": torch.tensor([[4.0, 4, math.nan, 9]])}, "sample 3: got the box"),
        ({"labels": torch.tensor([3])}, "sample 3: got class 3; need 0 to 2, the classes of"),
        ({"labels": torch.tensor([-1])}, "sample 3: got class -1"),
        ({"labels": torch.tensor([1, 2])}, r"sample 3: got a target with \{'boxes': \(1, 4\)"),
        ({"labels": torch.tensor([1.0])}, "need a dict with 'boxes'"),
    ],
)  # fmt: skip
def test_bad_targets_are_one_line_that_names_the_sample(change, words):
    squares = Squares(4)
    data = [squares[i] for i in range(4)]
    data[3] = (data[3][0], data[3][1] | change)
    with pytest.raises(DataError, match=words):
        finetune(detector("gn"), data, None, OPTIONS, task="detection")
    with pytest.raises(DataError, match=words):
        evaluate(detector("gn"), data, task="detection")


def test_the_background_is_no_class_of_a_box():
    with pytest.raises(DataError, match=r"got class 0; need 1 to 3, .* behind its background"):
        finetune(two_stage_detector("gn"), Squares(4), None, OPTIONS, task="detection")


def test_what_cannot_be_used_is_refused():
    squares = Squares(4)
    for option in ({"mixup": 0.2}, {"cutmix": 0.2}, {"label_smoothing": 0.1}):
        with pytest.raises(TrainingError, match=r"for detection; need 0: "):
            finetune(detector(), squares, None, FineTune(**option), task="detection")
    with pytest.raises(TrainingError, match=r"FineTune\.teacher: got one for detection"):
        finetune(detector(), squares, None, FineTune(teacher=detector()), task="detection")
    with pytest.raises(TrainingError, match="need a list of dicts with boxes, labels and scores"):
        finetune(NoDetector(), squares, None, OPTIONS, task="detection")
    with pytest.raises(DataError, match="targets: got labels of type Tensor"):
        finetune(detector(), (torch.rand(4, 3, 9, 9), torch.zeros(4).long()), None, OPTIONS,
                 task="detection")  # fmt: skip


class NoDetector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images, targets=None):
        return [self.conv(image) for image in images]


def test_a_loss_that_is_not_finite_names_step_and_layer():
    class Bad(type(detector())):
        pass

    model = detector("gn")
    with torch.no_grad():
        model.backbone.parts[0].weight[0] = float("nan")
    model.__class__ = Bad
    with pytest.raises(TrainingError, match=r"step 1: got .*the parameter backbone\.parts\.0"):
        finetune(model, Squares(4), None, OPTIONS, task="detection")


def test_a_frozen_backbone_stands_still():
    model = two_stage_detector()
    before = copy.deepcopy(model.state_dict())
    options = FineTune(batch_size=2, epochs=1, learning_rate=1e-2, freeze_backbone=True)
    finetune(model, Squares(4, first=1), None, options, task="detection")
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("rpn.") for name in moved)


def test_the_head_of_a_detector_takes_another_number_of_classes():
    for make in (detector, two_stage_detector):
        model = make("gn")
        assert len(detector_classes(model)) == 3
        graft_head(model, make("gn", kinds=5))
        assert len(detector_classes(model)) == 5
        first = detector_classes(model).start
        history = finetune(model, Squares(4, first=first + 2), None, OPTIONS, task="detection")
        assert math.isfinite(history.epochs[0].train_loss)
