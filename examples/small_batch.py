"""The sweep that shows why: accuracy against batch size on real handwritten digits.

    python examples/small_batch.py                # both starts, three seeds (three hours)
    python examples/small_batch.py --batch-sizes 2,4,32 --start scratch      # 45 minutes
    python examples/small_batch.py --quick        # a smaller picture, a minute

Two starts. ``scratch``: random weights, the same for every target and batch size of a seed.
``pretrained``: a BN original that was trained at batch 32 on clean digits is converted and
fine-tuned. Both learn the retention scoreboard's digits, at any place, scale and colour on faded
textures of 40 px: every image has its own statistics, which is what hurts BN. ``--data camera``
takes the 8 x 8 digits as a worse camera sees them, with uneven light, blur and noise; they are too
small and too easy to hurt anybody.
``--network`` takes ResNet-20's shape, or inverted residuals with depthwise convolutions, in place
of the residual network of ten BatchNorms. Every cell sees the same number of samples; the learning
rate follows the linear rule. Tables go to the terminal, cells, JSON and pictures below ``--out``; a
run that is broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap import CrossIterationBatchNorm, FineTune, finetune
from normswap.sweeps import Sweep, sweep

TARGETS = {
    **{name: name for name in ("bn", "gn", "frn", "brn", "cbn")},
    "cbn-unsampled": CrossIterationBatchNorm(sampling=1),
    # the paper stops the gradient at past batches
    "cbn-paper": CrossIterationBatchNorm(through_history=False, sampling=1),
}
USUAL = ("bn", "gn", "frn", "brn", "cbn", "cbn-paper")


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions find."""
        found = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(found)))


def network(colours: int = 1, stride: int = 1) -> nn.Module:
    """A residual network; for 8 x 8 pixels its BatchNorms see maps of 8 x 8 and 4 x 4."""
    return nn.Sequential(
        nn.Conv2d(colours, 32, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        Block(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def resnet20(colours: int = 3, stride: int = 2) -> nn.Module:
    """Three stages of three blocks, 16 to 64 channels, as ResNet-20 has them for CIFAR."""
    layers: list[nn.Module] = []
    before = colours
    for channels, step in ((16, stride), (32, 2), (64, 2)):
        conv = nn.Conv2d(before, channels, 3, stride=step, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [Block(channels) for _ in range(3)]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Inverted(nn.Module):
    """MobileNetV2's block: widen, filter each channel by itself, narrow."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 4 * before
        self.narrow = nn.Sequential(
            nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.keeps = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        """Add what is found, where the shape allows it."""
        found: Tensor = self.narrow(x)
        return x + found if self.keeps else found


def depthwise(colours: int = 3, stride: int = 2) -> nn.Module:
    """Five of MobileNetV2's blocks."""
    conv = nn.Conv2d(colours, 16, 3, stride=stride, padding=1, bias=False)
    blocks = [Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1)]
    blocks += [Inverted(24, 40, 2), Inverted(40, 40, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10)]
    return nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)


NETWORKS = {"residual": network, "resnet20": resnet20, "depthwise": depthwise}


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits, 1297 to train on and 500 to test on, about N(0, 1)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 0.61
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    return (images[train], labels[train]), (images[test], labels[test])


def another_camera(data: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """The same digits under uneven light, out of focus, with noise."""
    images, labels = data
    draw = torch.Generator().manual_seed(seed)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = torch.rand(len(images), 1, 1, 1, generator=draw)
    images = torch.lerp(images, blurred, strength)
    slope = torch.randn(len(images), 1, 1, 2, generator=draw)
    ramp = torch.linspace(-1, 1, 8)
    light = slope[..., :1] * ramp[:, None] + slope[..., 1:] * ramp[None, :]
    noise = 0.3 * torch.randn(images.shape, generator=draw)
    return images + 0.7 * light + noise, labels


def textured(count: int, plain: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The retention scoreboard's digits: any place, scale and colour on textures, 40 px."""
    path = Path(__file__).parent / "benchmarks" / "retention.py"
    spec = importlib.util.spec_from_file_location("retention", path)
    assert spec is not None
    assert spec.loader is not None
    retention = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(retention)
    return (
        retention.render("train", count, seed=1, plain=plain),
        retention.render("test", 1000, seed=2, plain=plain),
    )


def _recipe(epochs: int, rate: float) -> FineTune:
    """At batch 32; SGD, as the papers train, whose rate the linear rule scales."""
    return FineTune(
        batch_size=32, epochs=epochs, optimizer="sgd", learning_rate=rate, weight_decay=5e-4
    )


def original(model: nn.Module, train: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    """The BN network as it comes from a machine with room for batches of 32."""
    finetune(model, train, options=_recipe(epochs, 0.05))
    return model


def show(title: str, found: Sweep) -> None:
    """Print the table and how far each target at batch 2 is from BN at the largest batch."""
    print(f"\n{title}: top-1, mean ± deviation over seeds, %")
    print(found)
    if "bn" not in found.targets:
        return
    largest = max(found.batch_sizes)
    reference = found.point("bn", largest).mean
    for target in found.targets:
        for size in (2, 4):
            mean = found.point(target, size).mean if size in found.batch_sizes else None
            if mean is not None and reference is not None:
                points = 100 * (mean - reference)
                print(f"{target:>4} at {size}: {points:+.1f} points against bn at {largest}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _seeds(text: str) -> int | tuple[int, ...]:
    return tuple(int(seed) for seed in text.split(",") if seed) if "," in text else int(text)


def main(arguments: Sequence[str] | None = None) -> dict[str, Sweep]:
    """Run the sweep from both starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--start", choices=("scratch", "pretrained", "both"), default="both")
    parser.add_argument("--data", choices=("textured", "camera"), default="textured")
    parser.add_argument("--plain", type=float, default=0.35, help="1 fades the textures out")
    parser.add_argument("--batch-sizes", type=_sizes)
    parser.add_argument("--network", choices=NETWORKS, default="residual")
    parser.add_argument(
        "--targets", type=lambda t: tuple(t.split(",")), default=USUAL, help=",".join(TARGETS)
    )
    parser.add_argument("--out", type=Path, default=Path("small_batch"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=_seeds, help="how many, or which: 3, or 0,1,2")
    chosen = parser.parse_args(arguments)
    make: Callable[[], nn.Module] = network
    if chosen.network != "residual" and chosen.data == "camera":
        parser.error("8 x 8 pixels are for --network residual")
    if chosen.data == "textured":
        make = functools.partial(NETWORKS[chosen.network], colours=3, stride=2)
        count = 96 if chosen.quick else 3000
        clean, _ = textured(count, plain=1.0)
        train, test = textured(count, plain=chosen.plain)
    else:
        clean, test = digits()
        train, test = another_camera(clean, seed=1), another_camera(test, seed=2)
    if chosen.quick:
        clean, train, test = ((x[:96], y[:96]) for x, y in (clean, train, test))
    sizes = chosen.batch_sizes or ((2, 16) if chosen.quick else (1, 2, 4, 8, 16, 32))
    epochs = chosen.epochs or (2 if chosen.quick else 8)
    seeds = chosen.seeds or (1 if chosen.quick else 3)
    found = {}
    for start in ("scratch", "pretrained") if chosen.start == "both" else (chosen.start,):
        scratch = start == "scratch"
        torch.manual_seed(0)
        found[start] = sweep(
            make if scratch else original(make(), clean, epochs),
            train,
            test,
            targets={name: TARGETS[name] for name in chosen.targets},
            batch_sizes=sizes,
            seeds=seeds,
            from_scratch=scratch,
            # a quarter of the rate from scratch for a fine-tune
            options=_recipe(epochs, 0.1 if scratch else 0.025),
            out=chosen.out / chosen.data / start,
        )
        show(start, found[start])
        print(f"picture: {chosen.out / chosen.data / start / 'sweep.png'}")
    return found


if __name__ == "__main__":
    main()
