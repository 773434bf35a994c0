"""Small networks, data and runs for the training tests; importable by child processes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import Dataset

import normswap
from normswap import layers
from normswap.cli.app import app
from normswap.sweeps import sweep
from normswap.training import FineTune, finetune

HEAVY = [  # what a process that trains would otherwise load each time
    "accelerate",
    "timm.optim",
    "timm.scheduler",
    "timm.utils",
    "timm.data",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "normswap.swap",
    "normswap.artifact",
]
SIZE = 8
CLASSES = 3


def attached_cbn(conv, **options):
    norm = layers.CrossIterationBatchNorm2d(conv.out_channels, window=4, **options)
    norm.attach(conv)
    return norm


NORMS = {
    "bn": lambda conv: nn.BatchNorm2d(conv.out_channels),
    "gn": lambda conv: nn.GroupNorm(2, conv.out_channels),
    "frn": lambda conv: layers.FilterResponseNorm2d(conv.out_channels),
    "brn": lambda conv: layers.BatchRenorm2d(conv.out_channels, warmup=2, r_ramp=9, d_ramp=6),
    "cbn": lambda conv: attached_cbn(conv, burn_in=3),
}


class Net(nn.Module):
    def __init__(self, norm="bn", dropout=0.0, channels=6):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.norm1 = NORMS[norm](self.conv1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = NORMS[norm](self.conv2)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def samples(count=24, seed=0):
    """Images whose brightest third of rows is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 3] += 1.0
    return images, labels


class Augmented(Dataset):
    """Draws from every global generator while a sample is read."""

    def __init__(self, count=24, broken=()):
        self.images, self.labels = samples(count)
        self.broken = set(broken)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"image {index} is truncated")
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return self.images[index] + 0.1 * noise, int(self.labels[index])


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Stop(Exception):  # noqa: N818
    """Breaks a run off."""


def stop_at(step, error=Stop):
    """A ``progress`` that raises after that many updates."""

    def progress(now):
        if now.step == step:
            raise error

    return progress


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


HARD = FineTune(
    batch_size=2,
    epochs=3,
    learning_rate=0.05,
    optimizer="momentum",
    gradient_accumulation=2,
    clip_grad=1.0,
    label_smoothing=0.1,
    mixup=0.2,
    ema=0.9,
    checkpoint_every=0,
    log_every=1,
    tensorboard=False,
)


def crossing(target):
    """A BatchNorm network that knows its data, converted, for a passage."""
    images, _ = samples()
    net = Net("bn", dropout=0.2)
    with torch.no_grad():
        for _ in range(20):
            net(images)
    return normswap.convert(net.eval(), target, example_inputs=images[:2]).model


def hard_run(norm, out, resume=True, progress=None):
    """A run in which everything that has a state is at work; ``"gn passage"``: that too."""
    target, _, way = norm.partition(" ")
    model = crossing(target) if way else Net(norm, dropout=0.2)
    history = finetune(
        model,
        Augmented(23),
        samples(9, seed=1),
        replace(HARD, passage=0.7 if way else None),
        out=out,
        resume=resume,
        progress=progress,
    )
    return model, history


def small_sweep(folder):
    """Two cells, on which a killed sweep goes on."""
    options = FineTune(epochs=1, batch_size=3, checkpoint_every=0, tensorboard=False)
    shape = {"targets": ["bn", "gn"], "batch_sizes": [3], "seeds": 1}
    return sweep(Net(), samples(6), samples(4, seed=1), out=folder / "s", options=options, **shape)


def command_line(*arguments):
    """``normswap …`` in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def replaced(start, seed, *rest):
    """A command line with its folder last, for another process (a child finds it by name)."""
    *more, folder = rest
    command_line(*start, folder / "out", "--seed", seed, *more)


def child_run(norm, out, result):
    """``hard_run`` in a process of its own; its weights go to ``result``."""
    torch.set_num_threads(1)
    model, _ = hard_run(norm, out)
    torch.save(model.state_dict(), Path(result).with_suffix(".part"))
    Path(result).with_suffix(".part").replace(result)
