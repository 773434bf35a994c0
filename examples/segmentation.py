"""A torchvision segmentation network, converted and trained at batch 2.

    python examples/segmentation.py                    # DeepLabV3 on MobileNetV3
    python examples/segmentation.py --model fcn_resnet50 --to frn
    python examples/segmentation.py --quick

Masks come from a generator: bright discs and bars on textured ground. The network starts from
random weights, so that nothing is downloaded; give ``--weights`` a checkpoint of your own for more.
Here with a loop of one's own; ``normswap.finetune(..., task="segmentation")`` has one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

CLASSES = 3  # ground, disc, bar


def scene(size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image (3, size, size) and its mask (size, size)."""
    coarse = torch.randn(1, 3, 6, 6, generator=draw)
    image = F.interpolate(coarse, size, mode="bilinear", align_corners=False)[0]
    image = 0.5 * image + 0.2 * torch.randn(3, size, size, generator=draw)
    mask = torch.zeros(size, size, dtype=torch.long)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for kind in (1, 2):
        middle = size * (0.2 + 0.6 * torch.rand(2, generator=draw))
        extent = size * (0.1 + 0.1 * float(torch.rand((), generator=draw)))
        dy, dx = (y - middle[0]).abs(), (x - middle[1]).abs()
        inside = dy**2 + dx**2 < extent**2 if kind == 1 else (dy < extent / 2) & (dx < 2 * extent)
        mask[inside] = kind
        image[:, inside] += 1.5 if kind == 1 else -1.5
    return image, mask


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Many of them."""
    draw = torch.Generator().manual_seed(seed)
    images, masks = zip(*(scene(size, draw) for _ in range(count)), strict=True)
    return torch.stack(images), torch.stack(masks)


def overlap(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean intersection over union of the three classes."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part)["out"].argmax(1) for part in images.split(2)])
    shares = []
    for kind in range(CLASSES):
        both = ((found == kind) & (masks == kind)).sum()
        either = ((found == kind) | (masks == kind)).sum()
        shares.append(float(both / either.clamp_min(1)))
    return sum(shares) / CLASSES


def train(model: nn.Module, images: Tensor, masks: Tensor, epochs: int, rate: float) -> None:
    """Batches of two."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    steps = epochs * (len(images) // 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(2):
            loss = F.cross_entropy(model(images[chosen])["out"], masks[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train BN and its conversion from the same start; print both."""
    import torchvision

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deeplabv3_mobilenet_v3_large")
    parser.add_argument("--to", default="gn")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--weights", help="a state dict")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.size, chosen.images, chosen.epochs = 64, 6, 1
    images, masks = scenes(chosen.images, chosen.size, seed=0)
    test = scenes(max(4, chosen.images // 4), chosen.size, seed=1)
    found = {}
    for target in ("bn", chosen.to):
        torch.manual_seed(0)
        make = getattr(torchvision.models.segmentation, chosen.model)
        model = make(weights=None, weights_backbone=None, num_classes=CLASSES)
        if chosen.weights:
            model.load_state_dict(torch.load(chosen.weights, weights_only=True))
        if target != "bn":
            init = "match" if chosen.weights else "reset"
            result = normswap.convert(model, target, example_inputs=images[:1], init=init)
            print(f"{len(result.replaced)} of the BatchNorms are now {target}")
            for name, reason in result.kept.items():
                print(f"  kept {name}: {reason}")
        train(model, images, masks, chosen.epochs, rate=1e-3)
        found[target] = overlap(model, *test)
        print(f"{target:>4}: mean IoU {found[target]:.3f} after {chosen.epochs} epochs at batch 2")
    return found


if __name__ == "__main__":
    main()
