"""Large images, tiny defects, batches of one or two: a BN network against its conversions.

    python examples/high_resolution.py                # 1024 px; about half an hour on two cores
    python examples/high_resolution.py --size 2048 --batch-size 1
    python examples/high_resolution.py --quick

A generator makes surfaces: brushed texture under uneven light, and on half of them one scratch or
pit of a few pixels. The BN original learns on crops of 128 px at batch 16, which fit anywhere. But
a part is good or bad as a whole, so the network is then fine-tuned on whole images, of which only
one or two fit into memory: as it is, and converted to GN and to CBN. Images are made anew from
their number and never stored, so memory holds one batch.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import normswap


class Surfaces(Dataset[tuple[Tensor, int]]):
    """Images (1, size, size) and whether they have a defect.

    Args:
        count: how many.
        size: in pixels.
        seed: two sets with different seeds share no image.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        image = self._ground(draw)
        bad = index % 2
        if bad:
            self._defect(image, draw)
        return image, bad

    def _ground(self, draw: torch.Generator) -> Tensor:
        size = self.size
        brushed = F.avg_pool1d(torch.randn(1, size, size + 14, generator=draw), 15, stride=1)
        light = torch.randn(1, 1, 3, 3, generator=draw)
        light = F.interpolate(light, size, mode="bicubic", align_corners=False)[0]
        return 1.2 * brushed + 0.6 * light

    def _defect(self, image: Tensor, draw: torch.Generator) -> None:
        """A pit of radius 3 to 5, or a scratch of length 12 to 24 and width 3."""
        y0, x0 = torch.randint(16, self.size - 16, (2,), generator=draw).tolist()
        kind, length, turn = torch.rand(3, generator=draw).tolist()
        y, x = torch.meshgrid(torch.arange(-14, 15), torch.arange(-14, 15), indexing="ij")
        if kind < 0.5:
            inside = y**2 + x**2 <= (3 + 2 * length) ** 2
        else:
            along = y * math.sin(math.pi * turn) + x * math.cos(math.pi * turn)
            across = y * math.cos(math.pi * turn) - x * math.sin(math.pi * turn)
            inside = (along.abs() <= 6 + 6 * length) & (across.abs() <= 1.5)
        image[0, y0 - 14 : y0 + 15, x0 - 14 : x0 + 15] += 3.0 * inside


class Detector(nn.Module):
    """Convolutions with BatchNorm; an image is as bad as its worst place."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 32), (32, 64)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, H, W) to logits (N, 2)."""
        return self.head(self.features(x)).amax((2, 3))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Pretrain on crops, convert, fine-tune on whole images, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(arguments)
    crops = 1600
    if chosen.quick:
        chosen.size, chosen.images, chosen.epochs, crops = 256, 12, 1, 64
    torch.manual_seed(0)
    original = Detector()
    normswap.finetune(
        original,
        Surfaces(crops, 128, seed=0),
        options=normswap.FineTune(batch_size=16, epochs=4, optimizer="sgd", learning_rate=0.05),
    )
    train = Surfaces(chosen.images, chosen.size, seed=1)
    test = Surfaces(max(8, chosen.images // 2), chosen.size, seed=2)
    found = {"bn, crops only": normswap.evaluate(original, test, batch_size=1).top1}
    print(f"BN original from crops, on whole images: {found['bn, crops only']:.1%}")
    for target in ("bn", "gn", "cbn"):
        model = copy.deepcopy(original)
        if target != "bn":
            model = normswap.convert(model, target, example_inputs=train[0][0][None]).model
        before = normswap.evaluate(model, test, batch_size=1).top1
        options = normswap.FineTune(
            batch_size=chosen.batch_size,
            epochs=chosen.epochs,
            optimizer="sgd",
            learning_rate=0.002 * chosen.batch_size,
            clip_grad=1.0,
        )
        normswap.finetune(model, train, options=options)
        found[target] = normswap.evaluate(model, test, batch_size=1).top1
        print(
            f"{target:>4}: {before:.1%} before, {found[target]:.1%} after {chosen.epochs} epochs "
            f"at batch {chosen.batch_size}, {chosen.size} px"
        )
    return found


if __name__ == "__main__":
    main()
