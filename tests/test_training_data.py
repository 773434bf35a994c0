"""What ``finetune`` and ``evaluate`` make of data and options that are unusual or wrong."""

import itertools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from normswap import FineTune, evaluate, finetune
from normswap.errors import DataError, TrainingError
from normswap.training import TrainingInterrupted

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


class Samples(Dataset):
    """Remembers which samples were read."""

    def __init__(self, count: int, label=int):
        self.count, self.label, self.seen = count, label, set()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.seen.add(index)
        return IMAGES[index % 12], self.label(LABELS[index % 12])


def run(data, val_data=None, out=None, resume=False, model=None, **options):
    recipe = FineTune(**{"epochs": 1} | options)
    return finetune(model or net(), data, val_data, recipe, out=out, resume=resume)


@pytest.mark.parametrize(("drawn", "steps"), [(12, 3), (9, 2)])
def test_a_sampler_decides_how_many_samples_an_epoch_has(drawn, steps):
    samples = Samples(13)
    loader = DataLoader(samples, batch_size=4, sampler=list(range(drawn)))
    assert run(loader).steps == steps
    assert samples.seen >= set(range(4 * steps))


@pytest.mark.parametrize("batches", [BatchSampler(RandomSampler(IMAGES), 6, False), [[0, 1, 2]]])
def test_the_learning_rate_counts_the_samples_of_a_batch_sampler(batches):
    size = batches.batch_size if isinstance(batches, BatchSampler) else 3
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_sampler=batches)
    history = run(loader, optimizer="sgd")
    assert history.learning_rate == pytest.approx(0.1 * size / 256)


def test_a_samplers_own_generator_is_found_again(tmp_path):
    def loader():
        data = TensorDataset(IMAGES, LABELS)
        draw = torch.Generator().manual_seed(3)
        return DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=draw))

    straight, broken_off, resumed = net(), net(), net()
    run(loader(), model=straight, epochs=3)

    def stop(progress):
        if progress.step == 4:
            raise TrainingInterrupted("test", got="a stop", need="more steps", hint="resume")

    recipe = FineTune(epochs=3, checkpoint_every=0.0)
    with pytest.raises(TrainingInterrupted):
        finetune(broken_off, loader(), None, recipe, out=tmp_path, progress=stop)
    finetune(resumed, loader(), None, recipe, out=tmp_path, resume=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_subclass_of_tensor_dataset_keeps_its_augmentation():
    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    run(Counted(IMAGES, LABELS))
    evaluate(net(), Counted(IMAGES, LABELS))
    assert Counted.reads == 24


def test_a_tuple_of_samples_is_a_data_set():
    pairs = tuple((image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True))
    assert run(pairs).steps == 6


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, LABELS, LABELS),
        TensorDataset(IMAGES),
        (IMAGES.numpy(), LABELS.numpy()),
        "a/folder",
        Samples(12, str),
        Samples(12, lambda label: None),
    ],
)
def test_data_that_are_no_labelled_images_are_refused(data):
    with pytest.raises(DataError):
        run(data)
    with pytest.raises(DataError):
        evaluate(net(), data)


@pytest.mark.parametrize(
    "val_data",
    [
        "a/folder",
        (IMAGES[:0], LABELS[:0]),
        (IMAGES, LABELS.float()),
        ((image, 0) for image in IMAGES),
    ],
)
def test_validation_data_are_looked_at_before_the_training(val_data):
    model = net()
    with pytest.raises(DataError):
        run((IMAGES, LABELS), val_data, model=model)
    assert torch.equal(model[0].weight, net()[0].weight)


def test_an_epoch_survives_a_failed_validation(tmp_path):
    labels = LABELS.clone()

    def spoil(now):  # before training it was sound
        labels.copy_(LABELS + 3)

    with pytest.raises(DataError, match="class 5"):
        finetune(
            net(),
            (IMAGES, LABELS),
            (IMAGES, labels),
            FineTune(epochs=1),
            out=tmp_path,
            progress=spoil,
        )
    history = run((IMAGES, LABELS), (IMAGES, LABELS), out=tmp_path, resume=True)
    assert (history.resumed_from, history.steps) == (6, 6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    labels = LABELS.to(dtype)
    history = run((IMAGES, labels), (IMAGES, labels))
    assert history.epochs[-1].val_loss == pytest.approx(
        run((IMAGES, LABELS), (IMAGES, LABELS)).epochs[-1].val_loss
    )


class SteepAtZero(nn.Module):
    """Finite logits with gradients that are not."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        logits = self.net(x)
        return logits + ((logits - logits.detach()) ** 2).sum().sqrt()


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    options = {"model": SteepAtZero(), "batch_size": 12, "checkpoint_every": 0.0}
    with pytest.raises(TrainingError, match="not finite any more"):
        run((IMAGES, LABELS), (IMAGES, LABELS), out=tmp_path, **options)
    assert not (tmp_path / "last.pt").exists()
    assert not (tmp_path / "best.pt").exists()


def test_logits_that_are_not_finite_are_no_hits():
    model = net()
    model[-1].weight.data.fill_(float("nan"))
    assert evaluate(model, (IMAGES, LABELS)).top1 == 0


def test_numpy_numbers_leave_a_checkpoint_that_can_be_read(tmp_path):
    options = {"learning_rate": np.float64(0.01), "weight_decay": np.float32(0.01)}
    straight = run((IMAGES, LABELS), out=tmp_path, **options)
    again = run((IMAGES, LABELS), out=tmp_path, resume=True, **options)
    assert again.epochs == straight.epochs


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": "0.1"},
        {"weight_decay": None},
        {"momentum": float("nan")},
        {"scheduler": "none", "warmup_epochs": 0.5},
    ],
)
def test_options_that_cannot_be_meant(options):
    with pytest.raises(TrainingError):
        FineTune(**options)


@pytest.mark.parametrize(
    ("scheduler", "falls"), [("step", 2), ("multistep", 2), ("constant", 0), ("none", 0)]
)
def test_every_schedule_happens_within_the_run(scheduler, falls):
    history = run((IMAGES, LABELS), epochs=9, warmup_epochs=0.0, scheduler=scheduler, momentum=0.0)
    rates = [round(epoch.learning_rate, 9) for epoch in history.epochs[:-1]]
    assert sum(a > b for a, b in itertools.pairwise(rates)) == falls


def test_a_teacher_must_be_another_model():
    model = net()
    with pytest.raises(TrainingError, match="itself"):
        run((IMAGES, LABELS), model=model, teacher=model)


def test_images_that_the_model_refuses_give_one_line():
    with pytest.raises(TrainingError, match="refuses"):
        run((IMAGES, LABELS), model=net().bfloat16())


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(TrainingError, match="a file"):
        run((IMAGES, LABELS), out=tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"on_broken": "Skip"}])
def test_an_evaluation_checks_its_options(wrong):
    with pytest.raises(DataError):
        evaluate(net(), (IMAGES, LABELS), **wrong)


def test_a_second_fine_tune_leaves_a_finished_schedule_alone(caplog):
    from normswap import convert

    model = convert(net(), "brn", example_inputs=IMAGES).model
    model[1].set_schedule(warmup=2, r_ramp=4, d_ramp=4)
    model[1].iteration = 6
    caplog.set_level(logging.INFO, "normswap")
    run((IMAGES, LABELS), model=model)
    assert (model[1].warmup, model[1].r_ramp) == (2, 4)
