"""How much of a BatchNorm original's accuracy a conversion keeps: the scoreboard.

    python examples/benchmarks/retention.py            # originals, cells, report
    python examples/benchmarks/retention.py train      # only the BN originals (cached)
    python examples/benchmarks/retention.py cells --network mobilenetv2 --target frn
    python examples/benchmarks/retention.py lasting    # fine-tuning curves: a day for all of them
    python examples/benchmarks/retention.py report     # tables and plots from what is there

Real handwritten digits (scikit-learn, 8 x 8) at random position, scale and colour on random
textured backgrounds of random contrast, 40 px; train and test digits are disjoint. The originals
are trained here from scratch, so nothing is downloaded. Weights and one JSON per finished cell go
to ``.cache/retention`` (git-ignored): an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SIZE = 40
TRAIN_IMAGES, TEST_IMAGES = 12_000, 4_000
BATCH = 32
GOOD = 92.0  # percent
MOST_ROUNDS = 6
CACHE = Path(os.environ.get("NORMSWAP_RETENTION_CACHE", ".cache/retention"))


# --- the images ---------------------------------------------------------------------------------


def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits in [0, 1]; the two splits share no digit."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures = torch.from_numpy(bunch.images).float().div(16)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:1300] if split == "train" else order[1300:]
    return pictures[chosen], labels[chosen]


def texture(count: int, draw: torch.Generator) -> Tensor:
    """Smooth noise at three random scales plus one wave: (count, 3, SIZE, SIZE), about N(0, 1)."""
    total = torch.zeros(count, 3, SIZE, SIZE)
    for cells in (3, 8, 24):
        coarse = torch.randn(count, 3, cells, cells, generator=draw)
        share = torch.rand(count, 1, 1, 1, generator=draw)
        total += share * F.interpolate(coarse, SIZE, mode="bilinear", align_corners=False)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angle, period, phase = (torch.rand(count, 1, 1, generator=draw) for _ in range(3))
    along = x * (angle * math.pi).cos() + y * (angle * math.pi).sin()
    wave = (along * 2 * math.pi / (4 + 20 * period) + phase * 6.28).sin()
    total += (wave * torch.rand(count, 1, 1, generator=draw))[:, None]
    return total


def _ink(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Every picture at a random place and scale on an empty canvas: (N, 1, SIZE, SIZE)."""
    count = len(pictures)
    side = 0.55 + 0.4 * torch.rand(count, generator=draw)  # of the canvas
    shift = (2 * torch.rand(count, 2, generator=draw) - 1) * (1 - side)[:, None]
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / side
    matrix[:, :, 2] = -shift / side[:, None]
    grid = F.affine_grid(matrix, [count, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False).clamp(0, 1)


def render(split: str, count: int, seed: int, *, plain: float = 0.0) -> tuple[Tensor, Tensor]:
    """``count`` preprocessed images and their labels, the same for the same seed.

    ``plain`` fades colours and textures out, down to white ink on black at 1: training starts
    there, because from the full task none of the networks leaves chance within an hour.
    """
    pictures, labels = digits(split)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (count,), generator=draw)
    ink = _ink(pictures[chosen], draw)
    ground = torch.rand(count, 3, 1, 1, generator=draw)
    strength = 0.02 + 0.08 * torch.rand(count, 1, 1, 1, generator=draw)
    direction = F.normalize(torch.randn(count, 3, 1, 1, generator=draw), dim=1)
    contrast = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=draw)
    direction = torch.where(
        (direction * (0.5 - ground)).sum(1, keepdim=True) < 0, -direction, direction
    )
    image = ground + strength * texture(count, draw)
    image = image * (1 - ink) + (ground + contrast * direction) * ink
    image = (1 - plain) * image.clamp(0, 1) + plain * ink
    return (image - 0.5) / 0.25, labels[chosen]


def cached_images(
    split: str, count: int, seed: int, *, plain: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``render``, kept on disk as 16-bit floats."""
    path = CACHE / f"images-{split}-{count}-{seed}-{plain:g}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images, labels = render(split, count, seed, plain=plain)
        torch.save({"images": images.half(), "labels": labels}, path)
    stored = torch.load(path, weights_only=True)
    return stored["images"].float(), stored["labels"]


def test_set() -> tuple[Tensor, Tensor]:
    """The images every accuracy below is measured on."""
    return cached_images("test", TEST_IMAGES, seed=1)


def unlabelled(count: int, seed: int) -> Tensor:
    """Images for calibration: training digits, freshly rendered, labels thrown away."""
    return render("train", count, seed=100 + seed)[0]


# --- the BN originals ---------------------------------------------------------------------------


def resnet() -> nn.Module:
    """ResNet-18's blocks at half width, without the first pooling."""
    from timm.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10, channels=(32, 64, 128, 256))
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def bottleneck() -> nn.Module:
    """ResNet-50 at a quarter of its width, without the first pooling."""
    from timm.models.resnet import Bottleneck, ResNet

    model = ResNet(
        Bottleneck, [3, 4, 6, 3], num_classes=10, channels=(16, 32, 64, 128), stem_width=32
    )
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def regnet() -> nn.Module:
    """RegNetX-200MF with a stem of stride 1."""
    import timm

    model = timm.create_model("regnetx_002", num_classes=10)
    model.stem.conv.stride = (1, 1)
    return model


def densenet() -> nn.Module:
    """A DenseNet-BC of 68 layers, growth rate 16, without the first pooling."""
    from timm.models.densenet import DenseNet

    model = DenseNet(growth_rate=16, block_config=(4, 8, 12, 8), num_classes=10)
    model.features.conv0 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


def mobilenetv2() -> nn.Module:
    """MobileNetV2 at half width (depthwise, ReLU6), one stride less."""
    import timm

    model = timm.create_model("mobilenetv2_050", num_classes=10)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


def mobilenetv3() -> nn.Module:
    """MobileNetV3-small (depthwise, squeeze-and-excitation, hard-swish), one stride less."""
    import timm

    model = timm.create_model("mobilenetv3_small_100", num_classes=10)
    model.blocks[0][0].conv_dw.stride = (1, 1)
    return model


def vgg() -> nn.Module:
    """VGG-11-BN at half width with a plain linear head."""
    from torchvision.models.vgg import VGG, make_layers

    layers = [32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256]
    model = VGG(make_layers(layers, batch_norm=True), num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(256, 10)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet": resnet,
    "densenet": densenet,
    "mobilenetv2": mobilenetv2,
    "mobilenetv3": mobilenetv3,
    "bottleneck": bottleneck,
    "regnet": regnet,
}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in eval mode, in percent."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)


def train(name: str) -> None:
    """Train one BN original from scratch, in rounds, until it is good enough to be converted."""
    path = CACHE / f"{name}.pt"
    torch.manual_seed(0)
    model = NETWORKS[name]()
    rounds, reached = 0, 0.0
    if path.exists():
        stored = torch.load(path, weights_only=True)
        rounds, reached = stored["rounds"], stored["accuracy"]
        model.load_state_dict(stored["model"])
    model.to(memory_format=torch.channels_last)
    while reached < GOOD and rounds < MOST_ROUNDS:
        draw = torch.Generator().manual_seed(rounds)
        train_round(name, model, draw, fade=0.0 if rounds else 0.6)
        rounds, reached = rounds + 1, accuracy(model, *test_set())
        print(f"{name} after round {rounds}: {reached:.2f} %", flush=True)
        stored = {"model": model.state_dict(), "rounds": rounds, "accuracy": reached}
        torch.save(stored, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def train_round(name: str, model: nn.Module, draw: torch.Generator, *, fade: float) -> None:
    """One learning-rate cycle; over its first share ``fade`` the images grow from plain to full."""
    images, labels = cached_images("train", TRAIN_IMAGES, seed=0)
    ink, _ = cached_images("train", TRAIN_IMAGES, seed=0, plain=1.0)
    epochs = 8 if fade and "mobilenet" in name else 5
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.1, div_factor=4
    )
    for epoch in range(epochs):
        model.train()
        started = time.monotonic()
        order = torch.randperm(len(labels), generator=draw)
        for index in order.split(BATCH)[: len(labels) // BATCH]:
            plain = min(1.0, max(0.0, 2 * (fade - schedule.last_epoch / steps)))
            inputs = torch.lerp(images[index], ink[index], plain)
            inputs = inputs[:, torch.randperm(3, generator=draw)]
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(inputs), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name} epoch {epoch}: {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)


def original(name: str) -> nn.Module:
    """The trained BN original, from the cache or trained now."""
    train(name)
    model = NETWORKS[name]()
    model.load_state_dict(torch.load(CACHE / f"{name}.pt", weights_only=True)["model"])
    return model.eval()


def original_accuracy(name: str) -> float:
    """Test accuracy of a BN original in percent."""
    return float(torch.load(CACHE / f"{name}.pt", weights_only=True)["accuracy"])


# --- the cells of the scoreboard ------------------------------------------------------------------

TARGETS = ("gn", "ln", "frn")
BUDGETS = {"calibrated-256": (256, 60.0), "calibrated-1024": (1024, 300.0)}
FIXED_GROUPS = (1, 2, 4, 8, 16, 32)


def methods(target: str) -> list[str]:
    """What is tried with one target, cheapest first."""
    groups = ["auto", *(f"groups-{n}" for n in FIXED_GROUPS)] if target == "gn" else []
    return ["copy", "match", *groups, *BUDGETS]


def recipe(target: str, method: str) -> Any:
    """GN's groups are chosen automatically wherever the method does not say otherwise."""
    import normswap

    if target != "gn":
        return target
    if method in ("copy", "match"):
        return normswap.GroupNorm(groups=None)
    if method.startswith("groups-"):
        return normswap.GroupNorm(groups=None, max_groups=int(method.removeprefix("groups-")))
    return normswap.GroupNorm(groups="auto")


def converted(name: str, target: str, method: str) -> tuple[nn.Module, nn.Module]:
    """The converted model and its BN original."""
    return swapped(name, recipe(target, method), "copy" if method == "copy" else "match")


def swapped(name: str, wanted: Any, init: str) -> tuple[nn.Module, nn.Module]:
    """A BN original by recipe, and itself."""
    import normswap

    teacher = original(name)
    model = copy.deepcopy(teacher)
    example = torch.zeros(2, 3, SIZE, SIZE)
    return normswap.convert(model, wanted, example_inputs=example, init=init).model, teacher


def run_cell(name: str, target: str, method: str, seed: int, clock: str) -> dict[str, Any]:
    """One number of the scoreboard, and how it came about."""
    import normswap

    model, teacher = converted(name, target, method)
    facts: dict[str, Any] = {"network": name, "target": target, "method": method, "seed": seed}
    facts["small maps left to the fallback"] = _frozen(model)
    if method in BUDGETS:
        count, seconds = BUDGETS[method]
        tick = time.process_time if clock == "cpu" else time.monotonic
        started = time.monotonic()
        report = normswap.calibrate(
            model, teacher, unlabelled(count, seed), seconds=seconds, seed=seed, clock=tick
        )
        facts |= {
            "clock": clock,
            "budget": seconds,
            "wall seconds": time.monotonic() - started,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "steps": report.steps,
            "stopped": report.stopped,
            "agreement": report.after.agreement,
            "output error": report.after.output_error,
        }
    reference = original_accuracy(name)
    found = accuracy(model, *test_set())
    return facts | {"original": reference, "accuracy": found, "share": 100 * found / reference}


def _frozen(model: nn.Module) -> int:
    return sum("Frozen" in type(module).__name__ for module in model.modules())


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1))
    part.replace(path)


def run_cells(
    networks: list[str], targets: list[str], wanted: list[str], seeds: int, clock: str
) -> None:
    """Every cell that is not there yet."""
    for method in wanted:
        for name in networks:
            for target in targets:
                if method not in methods(target):
                    continue
                for seed in range(seeds if method in BUDGETS else 1):
                    path = CACHE / "cells" / f"{name}-{target}-{method}-{seed}.json"
                    if path.exists():
                        continue
                    cell = run_cell(name, target, method, seed, clock)
                    _write(path, cell)
                    print(f"{path.stem}: {cell['share']:.1f} %", flush=True)


# --- does the gain last? --------------------------------------------------------------------------

LASTING = ("resnet", "mobilenetv2", "bottleneck", "regnet")
STARTS: dict[str, tuple[str, str | None, bool]] = {  # init, groups (None: 32), calibrated
    "copied": ("copy", None, False),
    "matched": ("match", None, False),
    "calibrated": ("match", None, True),
    "copied-auto": ("copy", "auto", False),
    "matched-auto": ("match", "auto", False),
    "calibrated-auto": ("match", "auto", True),
}
RATES = (1e-4, 3e-4, 1e-3)
WATCHED = (100, *range(250, 4001, 250))
WARM_UP = 100  # steps
MEMORY = 0.995  # of the weights' running average, which is what is tested


@functools.lru_cache(maxsize=1)
def started(name: str, start: str, seed: int) -> nn.Module:
    """The GN that a fine-tuning starts from; calibrated on 256 images."""
    import normswap

    init, groups, calibrated = STARTS[start]
    model, teacher = swapped(name, normswap.GroupNorm(groups=groups), init)
    if calibrated:
        count, seconds = BUDGETS["calibrated-256"]
        images, tick = unlabelled(count, seed), time.process_time
        normswap.calibrate(model, teacher, images, seconds=seconds, seed=seed, clock=tick)
    return model


def finetuned(name: str, start: str, rate: float, seed: int) -> dict[str, Any]:
    """Test accuracy along a fine-tuning of a GN at batch size 2, from one way of converting.

    The rate stays constant after a short warm-up and the running average of the weights is tested,
    so no schedule decides at which step a start arrives. The curve ends where it reaches the
    accuracy of the BN original.
    """
    torch.manual_seed(seed)
    model, goal = copy.deepcopy(started(name, start, seed)), original_accuracy(name)
    images, labels = cached_images("train", TRAIN_IMAGES, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARM_UP)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MEMORY))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw).split(2)
    curve = [(0, accuracy(model, *test_set()))]
    for step, index in enumerate(order[: WATCHED[-1]], start=1):
        model.train()
        inputs = images[index][:, torch.randperm(3, generator=draw)]
        loss = F.cross_entropy(model(inputs), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step in WATCHED:
            curve.append((step, accuracy(average, *test_set())))
            if curve[-1][1] >= goal or not loss.isfinite():
                break
    facts = {"network": name, "start": start, "rate": rate, "seed": seed}
    return facts | {"curve": curve, "original": goal}


def arrival(curve: dict[str, Any]) -> int | None:
    """The first step at which the original's accuracy is reached."""
    return next((step for step, value in curve["curve"] if value >= curve["original"]), None)


def run_finetuning(networks: list[str], starts: list[str], rates: list[float], seeds: int) -> None:
    """Every curve that is not there yet."""
    for seed, name, start in itertools.product(range(seeds), LASTING, starts):
        if name not in networks:
            continue
        for rate in rates:
            path = CACHE / "lasting" / f"{name}-{start}-{rate:g}-{seed}.json"
            if not path.exists():
                curve = finetuned(name, start, rate, seed)
                _write(path, curve)
                last = curve["curve"][-1]
                print(f"{path.stem}: there at {arrival(curve)}, {last}", flush=True)


# --- the report -----------------------------------------------------------------------------------


def read(folder: str) -> list[dict[str, Any]]:
    """All finished results of one kind."""
    return [json.loads(path.read_text()) for path in sorted((CACHE / folder).glob("*.json"))]


def shares(cells: list[dict[str, Any]], **wanted: str) -> list[float]:
    """The retained shares of the cells that agree with ``wanted``."""
    return [c["share"] for c in cells if all(c[key] == value for key, value in wanted.items())]


def _entry(values: list[float]) -> str:
    if not values:
        return ""
    middle = statistics.fmean(values)
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{middle:.1f}{spread}"


def table(cells: list[dict[str, Any]]) -> str:
    """Accuracy as a share of the BN original's, in percent, as Markdown."""
    present = [name for name in NETWORKS if shares(cells, network=name)]
    head = ["target, method", *present, "mean", "worst"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    originals = [f"{original_accuracy(name):.1f}" for name in present]
    lines.append("| *BN original, accuracy in %* | " + " | ".join(originals) + " | | |")
    for target in TARGETS:
        for method in methods(target):
            rows = [shares(cells, network=n, target=target, method=method) for n in present]
            means = [statistics.fmean(values) for values in rows if values]
            if not means:
                continue
            all_there = len(means) == len(present)
            ends = (
                [f"{statistics.fmean(means):.1f}", f"{min(means):.1f}"] if all_there else ["", ""]
            )
            entries = [f"{target} {method}", *map(_entry, rows), *ends]
            lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines)


def best_curves(
    curves: list[dict[str, Any]],
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The seeds of every network and start, at the rate that arrives first, or ends highest."""

    def merit(mine: list[dict[str, Any]]) -> tuple[float, int, float, float]:
        steps = [arrival(curve) or math.inf for curve in sorted(mine, key=lambda c: c["seed"])]
        ends = [curve["curve"][-1][1] for curve in mine]
        # by the first seed, which every rate has; then where there are more of them
        return steps[0], -len(mine), statistics.fmean(steps), -statistics.fmean(ends)

    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in itertools.product(LASTING, STARTS):
        mine = [c for c in curves if (c["network"], c["start"]) == key]
        by_rate = [[c for c in mine if c["rate"] == rate] for rate in {c["rate"] for c in mine}]
        if by_rate:
            found[key] = min(by_rate, key=merit)
    return found


def _steps(curve: dict[str, Any]) -> str:
    step = arrival(curve)
    return f"> {WATCHED[-1]:,}" if step is None else f"{step:,}"


def lasting_table(curves: list[dict[str, Any]]) -> str:
    """Steps until the BN original's accuracy is reached, as Markdown."""
    head = ["network, start", "before", *(f"rate {rate:g}" for rate in RATES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, start in itertools.product(LASTING, STARTS):
        mine = [c for c in curves if (c["network"], c["start"]) == (name, start)]
        if mine:
            before = statistics.fmean(c["curve"][0][1] for c in mine)
            cells = [", ".join(_steps(c) for c in mine if c["rate"] == rate) for rate in RATES]
            lines.append(f"| {name}, {start} | {before:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_lasting(curves: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against fine-tuning steps, one panel per network, every start at its best rate."""
    from matplotlib.figure import Figure

    best = best_curves(curves)
    shown = [name for name in LASTING if any(network == name for network, _ in best)]
    figure = Figure(figsize=(4.2 * len(shown), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        for number, start in enumerate(STARTS):
            for curve in best.get((name, start), ()):
                steps, values = zip(*curve["curve"], strict=True)
                label = f"{start}, rate {curve['rate']:g}" if curve["seed"] == 0 else None
                axes.plot(steps, values, color=f"C{number}", linewidth=1.2, label=label)
                if arrival(curve) is not None:
                    axes.plot(steps[-1], values[-1], marker="o", color=f"C{number}")
                goal = curve["original"]
        axes.axhline(goal, color="grey", linestyle=":")
        axes.set(title=f"{name} → GN, batch 2", xlabel="step")
        axes.set_ylim(80, None)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
    panels[0].set_ylabel("test accuracy, %")
    figure.get_layout_engine().set(wspace=0.1)
    figure.suptitle("dotted: BN original; dot: it is reached", fontsize=9)
    figure.savefig(path, dpi=110)


def report(out: Path) -> None:
    """Tables, JSON and the plot of whatever is finished."""
    out.mkdir(parents=True, exist_ok=True)
    cells, curves = read("cells"), read("lasting")
    (out / "retention.json").write_text(json.dumps({"cells": cells, "lasting": curves}, indent=1))
    text = table(cells) + "\n"
    if curves:
        draw_lasting(curves, out / "retention-lasting.png")
        text += "\n" + lasting_table(curves) + "\n"
    (out / "retention.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="How much accuracy a conversion keeps.")
    stages = ("all", "train", "cells", "lasting", "report")
    parser.add_argument("stage", nargs="?", default="all", choices=stages)
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--method", nargs="+", default=methods("gn"), choices=methods("gn"))
    parser.add_argument("--start", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--rate", nargs="+", type=float, default=list(RATES), help="of AdamW")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="what a calibration budget is read from; cpu for a machine that is shared",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    stage = options.stage
    if stage in ("all", "train"):
        for name in options.network:
            train(name)
    if stage in ("all", "cells"):
        run_cells(options.network, options.target, options.method, options.seeds, options.clock)
    if stage == "lasting":
        run_finetuning(options.network, options.start, options.rate, options.seeds)
    if stage in ("all", "report"):
        report(options.out)


if __name__ == "__main__":
    main()
