"""A loss, a metric or a task of the caller's own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from training_runs import CLASSES, Net, samples, weights

from normswap.errors import DataError, TrainingError
from normswap.losses import LOSSES, binary_cross_entropy
from normswap.training import FineTune, evaluate, finetune, loop
from normswap.training.examples import draw_examples
from normswap.training.tasks import Step, Task, task_for
from normswap.training.tasks.base import Metrics

OPTIONS = FineTune(batch_size=4, epochs=2, learning_rate=0.05)


def test_the_default_loss_written_by_hand_trains_the_same():
    first, second = Net("gn"), Net("gn")
    finetune(first, samples(), samples(8, seed=1), OPTIONS)
    history = finetune(second, samples(), samples(8, seed=1), OPTIONS, loss=F.cross_entropy)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    assert history.epochs[-1].val_top1 == evaluate(second, samples(8, seed=1)).top1


def test_a_loss_may_take_labels_that_are_no_classes(tmp_path):
    images, labels = samples()
    shares = F.one_hot(labels, CLASSES).float()
    net = Net("gn")
    history = finetune(
        net,
        (images, shares),
        (images, shares),
        FineTune(batch_size=4, epochs=4, learning_rate=0.1, keep="best"),
        out=tmp_path,
        loss=F.binary_cross_entropy_with_logits,
    )
    losses = [row.val_loss for row in history.epochs]
    assert losses[-1] < losses[0]
    assert history.best.val_loss == min(losses)
    assert history.best.val_top1 is None
    assert history.epochs[0].train_top1 is None
    with torch.no_grad():
        found = F.binary_cross_entropy_with_logits(net.eval()(images), shares).item()
    assert found == pytest.approx(min(losses), rel=1e-5)
    assert (tmp_path / "learning_curve.png").is_file()


def test_a_metric_chooses_the_best_epoch():
    images, labels = samples(10, seed=1)
    seen = iter([0.05, 0.2, 0.9, 0.5, 0.1])  # the first is the start's
    history = finetune(
        Net("gn"),
        samples(),
        (images, labels),
        FineTune(batch_size=4, epochs=4, learning_rate=0.05, keep="best", eval_batch_size=10),
        metric=lambda _output, _labels: next(seen),
    )
    assert [row.val_metric for row in history.epochs] == pytest.approx([0.2, 0.9, 0.5, 0.1])
    assert history.best.epoch == 2
    assert history.best.val_top1 is not None


def test_a_metric_is_the_mean_over_images_whatever_the_batches():
    images, labels = samples(10, seed=1)

    def right(output, labels):
        return (output.argmax(1) == labels).double().mean()

    history = finetune(
        Net("gn"),
        samples(),
        (images, labels),
        FineTune(batch_size=4, epochs=1, learning_rate=0.05, eval_batch_size=4),
        metric=right,
    )
    assert history.epochs[0].val_metric == pytest.approx(history.epochs[0].val_top1)


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"mixup": 0.2}, {"cutmix": 1.0}])
def test_options_that_a_loss_of_ones_own_would_silently_drop_are_refused(option):
    with pytest.raises(TrainingError, match=next(iter(option))):
        finetune(Net("gn"), samples(), options=FineTune(**option), loss=F.cross_entropy)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms_and_its_definition(smoothing):
    torch.manual_seed(0)
    scores, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    options = FineTune(label_smoothing=smoothing)
    ours = binary_cross_entropy(scores, labels, options)
    torch.testing.assert_close(ours, BinaryCrossEntropy(smoothing=smoothing)(scores, labels))
    total = 0.0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        for k, score in enumerate(row):
            wanted = (k == label) * (1 - smoothing) + smoothing / 4
            yes = 1 / (1 + math.exp(-score))
            total -= (wanted * math.log(yes) + (1 - wanted) * math.log(1 - yes)) / 20
    assert ours.item() == pytest.approx(total)
    mixed = torch.rand(5, 4)  # mixup's shares are smoothed already
    expected = F.binary_cross_entropy_with_logits(scores, mixed.double())
    assert torch.equal(binary_cross_entropy(scores, mixed, options), expected)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4, "label_smoothing": 0.1}])
def test_a_loss_is_one_entry_and_known_by_its_name(mixing, monkeypatch):
    def squared(scores, targets, options):
        assert (targets.ndim > 1) == bool(options.mixup)
        shares = targets if targets.ndim > 1 else F.one_hot(targets, CLASSES)
        return (scores.softmax(1) - shares).square().sum(1).mean()

    monkeypatch.setitem(LOSSES, "squared", squared)
    options = dataclasses.replace(OPTIONS, loss="squared", **mixing)
    net, usual = Net("gn"), Net("gn")
    history = finetune(net, samples(), samples(8, seed=1), options)
    finetune(usual, samples(), samples(8, seed=1), dataclasses.replace(OPTIONS, **mixing))
    assert not torch.equal(net.fc.weight, usual.fc.weight)
    assert history.epochs[-1].val_loss == pytest.approx(evaluate(net, samples(8, seed=1)).loss)
    if not mixing:
        twin = Net("gn")
        finetune(twin, samples(), options=OPTIONS, loss=lambda s, y: squared(s, y, OPTIONS))
        last = Net("gn")
        finetune(last, samples(), options=options)
        assert all(torch.equal(v, weights(twin)[k]) for k, v in weights(last).items())


def test_what_is_no_loss_is_refused_before_anything_runs():
    for loss in ("focal", F.cross_entropy, ["bce"], None):
        with pytest.raises(TrainingError, match=r"FineTune.loss: got .*; need one of 'cross-entro"):
            FineTune(loss=loss)
    with pytest.raises(TrainingError, match=r"loss: got 'bce'; need a function.*name in FineTune"):
        finetune(Net("gn"), samples(), options=OPTIONS, loss="bce")
    with pytest.raises(TrainingError, match=r"metric: got 'top1'; need a function"):
        finetune(Net("gn"), samples(), options=OPTIONS, metric="top1")


def test_a_loss_by_name_is_never_dropped_in_silence():
    named = dataclasses.replace(OPTIONS, loss="bce")
    with pytest.raises(TrainingError, match=r"FineTune.loss: got 'bce' together with a loss of"):
        finetune(Net("gn"), samples(), options=named, loss=F.cross_entropy)
    for task in ("segmentation", "detection"):
        with pytest.raises(TrainingError, match=f"FineTune.loss: got 'bce' for {task}"):
            task_for(named, task)
    assert task_for(named, metric=lambda _o, _y: 0.0).options.loss == "bce"


def test_a_loss_must_be_one_number():
    with pytest.raises(TrainingError, match="one number for the batch"):
        finetune(
            Net("gn"),
            samples(),
            options=OPTIONS,
            loss=lambda o, y: F.cross_entropy(o, y, reduction="none"),
        )


def test_a_metric_alone_still_checks_the_labels():
    images, labels = samples()
    with pytest.raises(DataError, match="integer class number"):
        finetune(Net("gn"), (images, labels.float()), options=OPTIONS, metric=lambda _o, _y: 0)


def test_the_teacher_keeps_its_share_of_a_loss_of_ones_own():
    images, labels = samples()
    student, taught = Net("gn"), Net("gn")
    options = FineTune(batch_size=4, epochs=1, learning_rate=0.05, teacher=Net("bn").eval())
    finetune(student, (images, labels), options=options, loss=F.cross_entropy)
    finetune(taught, (images, labels), options=options)
    for name, value in weights(student).items():
        assert torch.equal(value, weights(taught)[name]), name


def test_a_task_of_ones_own():
    class Autoencode(Task):
        name, sums = "mean", ("error",)

        def step(self, forward, images, labels):
            return Step((forward(images).mean() - 1).square(), None, images)

        def measure(self, output, labels):
            return (output.mean(1) - 1).square().sum().double()[None].cpu()

        def metrics(self, sums, images, broken):
            return Metrics(math.nan, math.nan, sums["error"] / images, images, broken)

    history = finetune(Net("gn"), samples(), samples(), OPTIONS, task=Autoencode(OPTIONS))
    assert history.epochs[-1].val_loss < history.epochs[0].val_loss + 1e-6
    assert history.best is not None


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(TrainingError, match="need one of classification"):
        task_for(OPTIONS, "poetry")


def test_a_task_and_a_loss_of_ones_own_exclude_each_other():
    with pytest.raises(TrainingError, match="one or the other"):
        finetune(Net(), samples(), options=OPTIONS, task="poetry", loss=F.cross_entropy)


# --- when it ends, and what it costs ------------------------------------------------------------


def test_it_stops_when_it_gets_no_better(tmp_path):
    seen = iter([0.1, 0.2, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    options = FineTune(batch_size=4, epochs=7, learning_rate=0.01, early_stop=2, eval_batch_size=10)
    net = Net("gn")
    history = finetune(
        net,
        samples(),
        samples(10, seed=1),
        options,
        out=tmp_path,
        metric=lambda _o, _y: next(seen),
    )
    assert [row.epoch for row in history.epochs] == [1, 2, 3, 4]
    assert history.best.epoch == 2
    again = finetune(
        Net("gn"),
        samples(),
        samples(10, seed=1),
        options,
        out=tmp_path,
        resume=True,
        metric=lambda _o, _y: pytest.fail("it had finished"),
    )
    assert again.epochs == history.epochs


@pytest.mark.parametrize(("losses", "kept"), [((1.0, 0.9, 0.8), 2), ((1.0, 1.1, 1.2), 0)])
def test_of_epochs_that_are_as_often_right_the_surer_one_is_kept(losses, kept, monkeypatch):
    scores = iter(losses)
    seen = [Metrics(top1=0.5, top5=0.5, loss=next(scores), images=10) for _ in losses]
    monkeypatch.setattr(loop.Run, "_validate", lambda *_: seen.pop(0))
    net = Net("gn")
    start = {name: value.clone() for name, value in net.state_dict().items()}
    options = FineTune(batch_size=4, epochs=2, learning_rate=0.01)
    history = finetune(net, samples(), samples(10, seed=1), options)
    assert history.best.epoch == kept
    same = all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    assert same == (kept == 0)


def test_to_stop_early_it_must_be_validated():
    with pytest.raises(TrainingError, match="early_stop"):
        finetune(Net("gn"), samples(), options=FineTune(early_stop=1))


def test_checkpointed_activations_change_nothing():
    timm = pytest.importorskip("timm")

    def trained(**options):
        torch.manual_seed(0)
        net = timm.create_model("resnet18", num_classes=3, in_chans=1).eval()
        data = torch.randn(4, 1, 32, 32), torch.arange(4) % 3
        finetune(net, data, options=FineTune(epochs=1, learning_rate=1e-3, **options))
        return net

    plain, spared = trained(), trained(grad_checkpointing=True)
    assert not spared.grad_checkpointing
    # BatchNorm counts a recomputed batch twice; the weights are the same
    for (name, mine), theirs in zip(plain.named_parameters(), spared.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), name


def test_a_model_without_checkpointing_says_so():
    with pytest.raises(TrainingError, match="no set_grad_checkpointing"):
        finetune(Net("gn"), samples(), options=FineTune(grad_checkpointing=True))


def test_channels_last_trains_the_same_and_gives_the_old_format_back():
    plain, last = Net("gn"), Net("gn")
    finetune(plain, samples(), options=OPTIONS)
    finetune(last, samples(), options=FineTune(**{**vars(OPTIONS), "channels_last": True}))
    for (name, mine), theirs in zip(plain.named_parameters(), last.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), name
        assert theirs.is_contiguous()


def test_no_image_is_read_for_a_picture_that_is_not_drawn(tmp_path):
    class Counted(torch.utils.data.TensorDataset):
        seen = 0

        def __getitem__(self, index):
            self.seen += 1
            return super().__getitem__(index)

    data = Counted(*samples(4))
    assert draw_examples(task_for(FineTune(), "classification"), Net("gn"), data, tmp_path) is None
    assert data.seen == 0
