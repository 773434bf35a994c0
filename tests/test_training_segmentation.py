"""The segmentation task: loss and mean IoU by their definitions, and a run from start to end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.errors import DataError, TrainingError
from normswap.training import FineTune, evaluate, finetune
from normswap.training.tasks import Segmentation
from normswap.training.tasks.segmentation import confusion, dice_loss


class Net(nn.Module):
    """A tiny fully convolutional network with a side head, of torchvision's contract."""

    def __init__(self, classes=3, small=True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2 if small else 1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.head, self.side = nn.Conv2d(8, classes, 1), nn.Conv2d(8, classes, 1)

    def forward(self, x):
        features = self.body(x)
        out = F.interpolate(self.head(features), size=x.shape[-2:], mode="bilinear")
        return {"out": out, "aux": self.side(features)} if self.training else {"out": out}


def squares(count=24, seed=0):
    """Dark images with a red or a green square; the masks say which."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 3, 16, 16, generator=generator)
    masks = torch.zeros(count, 16, 16, dtype=torch.long)
    for i in range(count):
        x, y = torch.randint(0, 8, (2,), generator=generator).tolist()
        images[i, i % 2, y : y + 8, x : x + 8] += 1
        masks[i, y : y + 8, x : x + 8] = 1 + i % 2
    masks[:, 0] = 255
    return images, masks


def net():
    torch.manual_seed(0)
    return Net()


OPTIONS = FineTune(batch_size=2, epochs=2, optimizer="adamw", learning_rate=1e-2)


def test_a_run_learns_and_is_judged_by_mean_iou(tmp_path, caplog):
    caplog.set_level("INFO", "normswap")
    model = net()
    normswap.convert(model, "gn", example_inputs=torch.zeros(1, 3, 16, 16))
    before = evaluate(model, squares(seed=1), task="segmentation")
    history = finetune(
        model, squares(), squares(seed=1), OPTIONS, task="segmentation", out=tmp_path
    )
    assert history.epochs[-1].val_metric > before.metric + 0.2
    after = evaluate(model, squares(seed=1), task="segmentation")
    kept = history.best if history.kept == "best" else history.epochs[-1]
    assert after.metric == pytest.approx(kept.val_metric, abs=1e-6)
    assert (tmp_path / "learning_curve.png").exists()
    (line,) = [text for text in caplog.messages if text.startswith("the start on")]
    assert "mean IoU 0." in line
    assert "top-1" not in line


def test_a_resumed_run_is_bit_equal(tmp_path):
    whole = net()
    finetune(whole, squares(8), None, OPTIONS, task="segmentation", out=tmp_path / "whole")
    broken = net()

    class KilledError(Exception):
        pass

    def stop(now):
        if now.step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(
            broken,
            squares(8),
            None,
            normswap.FineTune(**{**vars(OPTIONS), "checkpoint_every": 0}),
            task="segmentation",
            out=tmp_path / "broken",
            progress=stop,
        )
    resumed = net()
    options = normswap.FineTune(**{**vars(OPTIONS), "checkpoint_every": 0})
    finetune(
        resumed,
        squares(8),
        None,
        options,
        task="segmentation",
        out=tmp_path / "broken",
        resume=True,
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def iou_by_hand(guess, labels, classes):
    found = []
    for c in range(classes):
        mine = {tuple(p) for p in ((guess == c) & (labels != 255)).nonzero().tolist()}
        right = {tuple(p) for p in (labels == c).nonzero().tolist()}
        if mine | right:
            found.append(len(mine & right) / len(mine | right))
    return sum(found) / len(found)


def test_mean_iou_by_its_definition():
    torch.manual_seed(0)
    model, (images, masks) = net(), squares(6)
    guess = model.eval()(images)["out"].argmax(1)
    found = evaluate(model, (images, masks), task="segmentation", batch_size=4)
    assert found.metric == pytest.approx(iou_by_hand(guess, masks, 3), abs=1e-6)


def test_mean_iou_is_that_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    guess, labels = torch.randint(0, 4, (3, 9, 9)), torch.randint(0, 4, (3, 9, 9))
    table = confusion(guess, labels, 4)
    expected = metrics.JaccardIndex(task="multiclass", num_classes=4, average="macro")(
        guess, labels
    )
    task = Segmentation(FineTune())
    task.begin(torch.zeros(1, 4, 1, 1))
    sums = {str(i): float(v) for i, v in enumerate([*table.flatten().tolist(), 0.0])}
    assert task.metrics(sums, 3, 0).metric == pytest.approx(float(expected), abs=1e-6)


def test_mean_iou_is_that_of_torchvisions_reference_evaluation():
    """Counts of (true, said) over the whole set; |A ∩ B| / |A ∪ B| from them; the plain mean."""
    torch.manual_seed(1)
    model, (images, masks) = net(), squares(10, seed=2)
    said = model.eval()(images)["out"].argmax(1).numpy()
    true = masks.numpy()
    counts = np.histogram2d(
        true[true < 3], said[true < 3], bins=3, range=[[-0.5, 2.5], [-0.5, 2.5]]
    )[0]
    both = np.diag(counts)
    expected = (both / (counts.sum(1) + counts.sum(0) - both)).mean()
    judge = Segmentation(FineTune())
    found = evaluate(model, (images, masks), task=judge, batch_size=4)
    assert found.metric == pytest.approx(expected, abs=1e-6)
    assert sum(judge.by_class) / 3 == pytest.approx(expected, abs=1e-6)


def test_dice_by_its_definition():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    share, chances = [], scores.softmax(1)
    for c in range(3):
        both = p = q = 0.0
        for n, y, x in (labels != 255).nonzero().tolist():
            truth, guess = float(labels[n, y, x] == c), float(chances[n, c, y, x])
            both, p, q = both + truth * guess, p + truth, q + guess
        share.append(2 * both / (p + q))
    assert dice_loss(scores, labels).item() == pytest.approx(1 - sum(share) / 3)


def test_a_mask_of_nothing_but_ignored_pixels_gives_no_nan():
    images, masks = squares(4)
    history = finetune(
        net(), (images, torch.full_like(masks, 255)), None, OPTIONS, task="segmentation"
    )
    assert math.isfinite(history.epochs[-1].train_loss)


def test_outputs_at_a_smaller_size_are_brought_to_the_masks():
    class Coarse(Net):
        def forward(self, x):
            return self.head(self.body(x))

    torch.manual_seed(0)
    history = finetune(Coarse(), squares(8), squares(8), OPTIONS, task="segmentation")
    assert history.epochs[-1].val_metric is not None


def test_a_teacher_of_pixels():
    teacher = net()
    options = {**vars(OPTIONS), "teacher": teacher, "distillation_weight": 1.0, "epochs": 1}
    torch.manual_seed(1)
    student = Net()
    with torch.no_grad():
        student.head.weight.add_(0.3 * torch.randn_like(student.head.weight))
    images, masks = squares(16)

    def apart(model):
        with torch.no_grad():
            return float((model.eval()(images)["out"] - teacher.eval()(images)["out"]).abs().mean())

    before = apart(student)
    finetune(student, (images, masks), None, FineTune(**options), task="segmentation")
    assert apart(student) < before


def test_what_cannot_be_used_is_refused():
    images, masks = squares(4)
    with pytest.raises(DataError, match="got class 7; need 0 to 2, or 255"):
        finetune(net(), (images, masks.where(masks != 2, 7)), None, OPTIONS, task="segmentation")
    with pytest.raises(DataError, match=r"masks: got .*need one class number a pixel"):
        finetune(net(), (images, masks[:, 0, 0]), None, OPTIONS, task="segmentation")
    with pytest.raises(
        TrainingError, match=r"an output .*need logits of shape \(images, classes, h"
    ):
        finetune(
            nn.Sequential(nn.Flatten(), nn.Linear(768, 3)),
            (images, masks),
            None,
            OPTIONS,
            task="segmentation",
        )
    with pytest.raises(TrainingError, match="masks cannot be mixed"):
        finetune(net(), (images, masks), None, FineTune(mixup=0.2), task="segmentation")
