"""Convert inside your own training loop, with your own optimizer.

    python examples/own_training_loop.py

A BN network trains for a while at batch 32, as on the big machine. Then it is converted in place
and the same loop goes on at batch 2 with the same optimizer object: ``convert(optimizer=...)``
moves its parameter groups onto the new parameters, and state whose parameter survived is kept.

With ``--passage 0.5`` the converted network begins as exactly the BN original and becomes itself in
the first half of the last epoch: one more line in the loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: images and labels to train on, images and labels to test on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 0.61
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def network() -> nn.Module:
    """Three convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 1), (32, 32, 2), (32, 64, 2)):
        layers += [
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    passage: normswap.Passage | None = None,
) -> None:
    """One epoch of a loop that knows nothing of normswap, but for a passage if there is one."""
    model.train()
    order = torch.randperm(len(images))
    for chosen in order.split(batch_size):
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if passage is not None:
            passage.step()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, convert, train on; print the accuracy after each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", default="gn")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--passage", type=float, metavar="SHARE", help="of the last epoch")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    found = {}

    def say(step: str) -> None:
        found[step] = normswap.evaluate(model, (test_images, test_labels)).top1
        print(f"{step:<28} top-1 {found[step]:.2%}")

    for _ in range(chosen.epochs):
        train(model, optimizer, images, labels, batch_size=32)
    say("BN, batch 32")
    result = normswap.convert(model, chosen.to, example_inputs=images[:1], optimizer=optimizer)
    assert result.model is model  # in place: only a network that is itself one BN gives a new one
    print(f"{len(result.replaced)} layers are now {chosen.to}")
    say("converted, not yet trained")
    for group in optimizer.param_groups:
        group["lr"] *= 2 / 32  # the linear rule
    passage = None
    if chosen.passage:
        passage = normswap.Passage(model, steps=round(chosen.passage * len(images) / 2))
        say("at the start of the passage")
    train(model, optimizer, images, labels, batch_size=2, passage=passage)
    say("one more epoch at batch 2")
    return found


if __name__ == "__main__":
    main()
