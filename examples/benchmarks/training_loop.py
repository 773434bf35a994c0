"""What the fine-tuning loop costs: images per second against a bare PyTorch loop, same run.

    python examples/benchmarks/training_loop.py [--model resnet18] [--size 64] [--batch-size 2]
    python examples/benchmarks/training_loop.py --to gn       # and with a passage all the way

All loops read the same ``TensorDataset``, run the same model, optimizer and number of updates,
and are timed from the end of their first update to the end of their last. They take turns, and the
fastest turn of each counts. On the CPU the clock is the process's own CPU time, so that other work
on the machine does not count.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.training import FineTune, finetune


def clock_of(device: str) -> Callable[[], float]:
    """CPU time on the CPU, wall time elsewhere."""
    return time.process_time if device == "cpu" else time.perf_counter


def bare(model: torch.nn.Module, data: TensorDataset, batch_size: int, device: str) -> float:
    """Images per second of the loop that everybody writes first."""
    clock, ends = clock_of(device), []
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    losses = 0.0
    for images, labels in DataLoader(data, batch_size=batch_size, shuffle=True):
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += loss.item()
        ends.append(clock())
    return speed(ends, batch_size)


def ours(
    model: torch.nn.Module,
    data: TensorDataset,
    batch_size: int,
    device: str,
    passage: float | None = None,
) -> float:
    """Images per second of ``normswap.finetune``."""
    clock, ends = clock_of(device), []
    options = FineTune(
        batch_size=batch_size,
        epochs=1,
        learning_rate=1e-3,
        weight_decay=0.0,
        optimizer="sgd",
        device=device,
        passage=passage,
    )
    finetune(model, data, options=options, progress=lambda _: ends.append(clock()))
    return speed(ends, batch_size)


def speed(ends: list[float], batch_size: int) -> float:
    """Images per second between the first and the last update."""
    return (len(ends) - 1) * batch_size / (ends[-1] - ends[0])


def main() -> None:
    """Measure and print."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--to", help="a target; one that normalises each sample has a passage")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    count = chosen.batch_size * chosen.updates
    images = torch.randn(count, 3, chosen.size, chosen.size)
    data = TensorDataset(images, torch.randint(10, (count,)))
    loops: dict[str, Callable[..., float]] = {"bare": bare, "finetune": ours}
    if chosen.to is not None:
        loops["passage"] = functools.partial(ours, passage=0.999)
    found: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(chosen.turns + 1):
        for name, loop in loops.items():
            model = timm.create_model(chosen.model, num_classes=10)
            if chosen.to is not None:
                model = normswap.convert(model, chosen.to, example_inputs=images[:2]).model
            measured = loop(model, data, chosen.batch_size, chosen.device)
            if turn:  # the first turn warms up
                found[name].append(measured)
    best = {name: max(speeds) for name, speeds in found.items()}
    print(f"{chosen.model}, {chosen.size} px, batch {chosen.batch_size}, {chosen.device}")
    for name, fastest in best.items():
        print(f"{name:>9}: {fastest:8.1f} images/s")
    for name in list(loops)[1:]:
        print(f"{name} / bare: {best[name] / best['bare']:.3f}")


if __name__ == "__main__":
    main()
