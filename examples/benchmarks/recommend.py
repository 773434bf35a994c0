"""Is `normswap recommend` right? Its answer beside the truth of a short sweep, on the same images.

    python examples/benchmarks/recommend.py            # truth, answers, table: 25 minutes of a core
    python examples/benchmarks/recommend.py --table    # the table from what is there

Six small networks learn handwritten digits (scikit-learn) with BatchNorm at batch 32. Each is then
fine-tuned on digits on textures: half of them know such images already (``same``), half have seen
paler textures (``shifted``). The sweep fine-tunes every target at batch 2 and 16 from the same
start, two seeds; ``recommend`` sees the training images without their labels and no sweep. An
answer counts as right if its mean top-1 is the best, or less below the best than the spread: the
larger of the range over seeds of the two and two standard errors of the test set.

Every cell is a file of the sweep and every answer a line, written as they come, below ``--out``: a
run that is broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from shared import append, read, script
from torch import Tensor, nn

import normswap
from normswap.sweeps import Sweep, sweep

TARGETS = ("bn", "gn", "frn", "brn", "cbn", "frozen")
SIZES = (2, 16)
SEEDS = 2
TRAIN, TEST = 512, 1000
Data = tuple[Tensor, Tensor]


_HERE = Path(__file__).parent
small_batch = script(_HERE.parent / "small_batch.py")
retention = script(_HERE / "retention.py")


# --- six networks ---------------------------------------------------------------------------------


def _conv(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = size // 2
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def _head(features: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10)]


def residual() -> nn.Module:
    """The residual network of ``small_batch.py``: 7 BatchNorms."""
    net: nn.Module = small_batch.network(colours=3, stride=2)
    return net


def in_a_row() -> nn.Module:
    """Six convolutions in a row."""
    widths = (3, 24, 32, 48, 48, 64, 64)
    layers: list[nn.Module] = []
    for at, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [*_conv(inputs, outputs, stride=2 if at in (0, 2, 4) else 1), nn.ReLU()]
    return nn.Sequential(*layers, *_head(64))


def depthwise() -> nn.Module:
    """MobileNet's pairs of a depthwise and a pointwise convolution, with ReLU6."""
    layers: list[nn.Module] = [*_conv(3, 24, stride=2), nn.ReLU6()]
    for inputs, outputs, stride in ((24, 32, 1), (32, 48, 2), (48, 64, 1), (64, 64, 2)):
        layers += [*_conv(inputs, inputs, 3, stride, inputs), nn.ReLU6()]
        layers += [*_conv(inputs, outputs, 1), nn.ReLU6()]
    return nn.Sequential(*layers, *_head(64))


class _Dense(nn.Module):
    """BatchNorm before the convolution, and the input beside its output."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input with new channels behind it."""
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], 1)


def dense() -> nn.Module:
    """A DenseNet of two blocks with three layers each."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, 2, 1, bias=False)]
    channels = 24
    for block in range(2):
        for _ in range(3):
            layers.append(_Dense(channels, 16))
            channels += 16
        if block == 0:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 36, 1)]
            layers.append(nn.AvgPool2d(2))
            channels = 36
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *_head(channels))


def bottleneck() -> nn.Module:
    """The smallest ResNet of timm, of bottlenecks and a pooled stem."""
    import timm

    model: nn.Module = timm.create_model("test_resnet", num_classes=10)
    return model


def linear_bottleneck() -> nn.Module:
    """The smallest EfficientNet of timm: SiLU, squeeze and excitation, linear bottlenecks."""
    import timm

    model: nn.Module = timm.create_model("test_efficientnet", num_classes=10)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (residual, "shifted"),
    "in_a_row": (in_a_row, "same"),
    "depthwise": (depthwise, "shifted"),
    "dense": (dense, "same"),
    "test_resnet": (bottleneck, "shifted"),
    "test_efficientnet": (linear_bottleneck, "same"),
}


# --- images, originals, truth -------------------------------------------------------------------


def images() -> tuple[Data, Data]:
    """What is fine-tuned on, and what it is judged by."""
    return (
        retention.render("train", TRAIN, seed=1, plain=0.35),
        retention.render("test", TEST, seed=2, plain=0.35),
    )


def original(name: str, out: Path) -> nn.Module:
    """The BatchNorm network, trained once and then read again."""
    make, known = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    path = out / f"{name}.safetensors"
    if not path.exists():
        shade = 0.7 if known == "shifted" else 0.35
        recipe = normswap.FineTune(batch_size=32, epochs=5, learning_rate=3e-3)
        for plain in (1.0, shade):  # from textures at once some do not leave chance
            train = retention.render("train", 2000, seed=3, plain=plain)
            normswap.finetune(model, train, None, recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval()


def truth(name: str, model: nn.Module, data: tuple[Data, Data], out: Path) -> Sweep:
    """A short sweep."""
    return sweep(
        model,
        *data,
        targets=TARGETS,
        batch_sizes=SIZES,
        seeds=SEEDS,
        options=normswap.FineTune(batch_size=16, epochs=3, learning_rate=1e-3),
        out=out / name,
    )


# --- answers, and the table -----------------------------------------------------------------------


def answer(model: nn.Module, data: Data, size: int, seconds: float) -> dict[str, Any]:
    """What ``recommend`` says of the training images at a batch size."""
    found = normswap.recommend(model, data[0][:256], batch_size=size, seconds=seconds)
    effect = found.effect
    assert effect is not None
    return {
        "target": found.target,
        "reason": found.reason,
        "batchnorm_keeps": effect.kept,
        "shift": effect.shift,
        "noise": effect.noise,
        "kept": {o.target: o.kept for o in found.options if o.per_sample},
        "seconds": found.seconds,
    }


def answers(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines that are there, by network and batch size."""
    return {(row["network"], row["batch_size"]): row for row in read(path)}


def spread(found: Sweep, size: int, *targets: str) -> float:
    """Below this two targets do not differ."""
    points = [found.point(target, size) for target in targets]
    ranges = [(p.high or 0.0) - (p.low or 0.0) for p in points]
    share = max(p.mean or 0.0 for p in points)
    return max(*ranges, 2 * math.sqrt(share * (1 - share) / TEST))


def judged(found: Sweep, row: dict[str, Any]) -> dict[str, Any]:
    """An answer beside the truth."""
    size, said = row["batch_size"], row["target"]
    means = {target: found.point(target, size).mean or 0.0 for target in TARGETS}
    best = max(means, key=lambda target: means[target])
    allowed = spread(found, size, best, said)
    behind = means[best] - means[said]
    return {**row, "means": means, "best": best, "behind": behind, "spread": allowed,
            "right": behind <= allowed}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """As Markdown."""
    head = ["network", "images", "batch", *(f"`{t}`" for t in TARGETS)]
    head += ["BN keeps", "gn keeps", "answer", "behind the best", "spread", "right"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = [row["network"], NETWORKS[row["network"]][1], str(row["batch_size"])]
        for target, mean in row["means"].items():
            bold = "**" if target == row["best"] else ""
            cells.append(f"{bold}{100 * mean:.1f}{bold}")
        cells += [_percent(row["batchnorm_keeps"]), _percent(row["kept"]["gn"])]
        cells += [f"`{row['target']}`", f"{100 * row['behind']:.1f}"]
        cells += [f"{100 * row['spread']:.1f}", "yes" if row["right"] else "no"]
        yield f"| {' | '.join(cells)} |"
    right = sum(row["right"] for row in rows)
    yield f"\n{right} of {len(rows)} right, or within the spread of the best."


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Truth, answers, table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/recommend"))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each recommend")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--table", action="store_true", help="only what is there")
    chosen = parser.parse_args(arguments)
    data, lines, rows = images(), chosen.out / "answers.jsonl", []
    for name in chosen.networks:
        for size in SIZES:
            known = answers(lines)
            if chosen.table and not (chosen.out / name / "sweep.json").exists():
                continue
            if (name, size) not in known:
                if chosen.table:
                    continue
                said = answer(original(name, chosen.out), data[0], size, chosen.seconds)
                append(lines, {"network": name, "batch_size": size, **said})
                known = answers(lines)
            found = truth(name, original(name, chosen.out), data, chosen.out)
            rows.append(judged(found, known[name, size]))
            print("\n".join(table(rows[-1:])), flush=True)
    text = "\n".join(table(rows)) + "\n"
    (chosen.out / "recommend.md").write_text(text)
    print(text)
    return rows


if __name__ == "__main__":
    main()
