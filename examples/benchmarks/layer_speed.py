"""Time a training step of a network with each normaliser, beside BatchNorm in the same process.

    OMP_NUM_THREADS=2 python examples/benchmarks/layer_speed.py resnet50 --to frn brn cbn4 cbn8 gn

Variants take turns within every round, so that a busy machine slows all of them alike; the table
holds quartiles over the rounds of each variant's time divided by BatchNorm's of the same round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from normswap.layers import (
    BatchRenorm2d,
    CrossIterationBatchNorm2d,
    FilterResponseNorm2d,
    FrozenBatchNorm2d,
)


def replace(
    model: nn.Module, build: Callable[[nn.BatchNorm2d], nn.Module], tlu: bool = False
) -> nn.Module:
    """Put ``build(bn)`` in the place of each BN; with ``tlu``, drop the ReLU that follows it."""
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, child), following in zip(children, [*children[1:], ("", None)], strict=False):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, build(child))
                relu = isinstance(following[1], nn.ReLU | nn.ReLU6)
                if tlu and isinstance(parent, nn.Sequential):
                    if relu:
                        setattr(parent, following[0], nn.Identity())
                    else:
                        getattr(parent, name).tau = None
    return model


def without_shared_relu(model: nn.Module) -> nn.Module:
    """Give torchvision's residual blocks a ReLU of their own behind the sum only.

    Their one ReLU serves every BN of a block; the TLUs of FRN take the place of all but the last.
    """
    kinds = torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck
    for block in model.modules():
        if isinstance(block, kinds):
            block.forward = _residual_forward.__get__(block)
            last = "bn3" if hasattr(block, "bn3") else "bn2"
            for name, norm in block.named_modules():
                if isinstance(norm, FilterResponseNorm2d) and (
                    name == last or name.startswith("downsample")
                ):
                    norm.tau = None
    if isinstance(model, torchvision.models.ResNet):
        model.relu = nn.Identity()
    return model


def _residual_forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = block.bn1(block.conv1(x))
    out = block.bn2(block.conv2(out))
    if hasattr(block, "bn3"):
        out = block.bn3(block.conv3(out))
    identity = x if block.downsample is None else block.downsample(x)
    out += identity
    return nn.functional.relu(out, inplace=True)


def to_frn(model: nn.Module) -> nn.Module:
    return without_shared_relu(
        replace(model, lambda bn: FilterResponseNorm2d(bn.num_features), True)
    )


def to_cbn(window: int, compensate: bool = True) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        replace(
            model,
            lambda bn: CrossIterationBatchNorm2d(
                bn.num_features, window=window, compensate=compensate
            ),
        )
        # in these networks every BN follows the convolution registered just before it
        last = None
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                last = module
            elif isinstance(module, CrossIterationBatchNorm2d) and compensate:
                module.attach(last)
        return model

    return build


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bn": lambda model: model,
    "gn": lambda model: replace(
        model,
        lambda bn: (
            nn.GroupNorm(max(bn.num_features // 16, 1), bn.num_features)
            if bn.num_features % 16 == 0
            else nn.GroupNorm(8, bn.num_features)
        ),
    ),
    "frn": to_frn,
    "brn": lambda model: replace(model, lambda bn: BatchRenorm2d(bn.num_features)),
    "cbn4": to_cbn(4),
    "cbn8": to_cbn(8),
    "naive-cbn8": to_cbn(8, compensate=False),
    "frozen": lambda model: replace(model, lambda bn: FrozenBatchNorm2d(bn.num_features)),
}


def training_step(model: nn.Module, x: torch.Tensor, compiled: bool) -> Callable[[], None]:
    model.train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    labels = torch.zeros(len(x), dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), labels).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: torch.Tensor, compiled: bool) -> Callable[[], None]:
    model.eval()
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.no_grad():
            run(x)

    return step


def ratios(
    steps: dict[str, Callable[[], None]], warmup: int, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Each variant's time over BN's, per round; and BN's median in seconds."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seen: dict[str, list[float]] = {name: [] for name in steps}
    base: list[float] = []
    for _ in range(rounds):
        seconds = {}
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - start
        base.append(seconds["bn"])
        for name, value in seconds.items():
            seen[name].append(value / seconds["bn"])
    return seen, statistics.median(base)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct activations that one training forward keeps for the backward."""
    model.train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--to", nargs="+", default=["gn", "frn", "brn", "cbn4", "cbn8"])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=9, help="fills CBN's window")
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.get_model(arguments.model, weights=None)
    x = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    if arguments.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    models = {name: VARIANTS[name](copy.deepcopy(model)) for name in ["bn", *arguments.to]}
    make = inference if arguments.inference else training_step
    steps = {name: make(m, x, arguments.compile) for name, m in models.items()}
    seen, base = ratios(steps, arguments.warmup, arguments.rounds)
    kept = {name: saved_bytes(m, x) for name, m in models.items()}
    print(f"{arguments.model}, BN {base * 1e3:.0f} ms; ratios to BN")
    for name, values in seen.items():
        low, middle, high = statistics.quantiles(values, n=4)
        memory = kept[name] / kept["bn"]
        print(f"{name:12s} {low:.2f} {middle:.2f} {high:.2f}   kept for backward {memory:.3f}")


if __name__ == "__main__":
    main()
