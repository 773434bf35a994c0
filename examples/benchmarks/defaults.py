"""Do fine-tuning's defaults hold? One epoch at batch 2, nothing chosen, from every start.

    python examples/benchmarks/defaults.py                 # all cells; goes on where it stopped
    python examples/benchmarks/defaults.py --only vgg frn  # cells whose names have all of these
    python examples/benchmarks/defaults.py --report-only

Small networks, made by their libraries' own classes with few blocks, learn handwritten digits
(scikit-learn's, each in its own colours on its own faint texture, 32 px) as BatchNorm networks at
batch 32. Each is converted to every target, matched without data or calibrated on unlabelled
images, and fine-tuned by ``FineTune(epochs=1)``: batch 2, no other option. Accuracy is measured on
test images of digits that neither training nor selection has seen: of the original, of the start,
of the last weights, and of those that the run keeps (the best on its validation images, the start
included). Each finished cell is one line of a file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import append, read, script
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import normswap
from normswap import FineTune

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("NORMSWAP_DEFAULTS_CACHE", ".cache/defaults"))
SIZE = 32
PRETRAINING, TRAINING, VALIDATION, TEST = 2000, 600, 200, 1000
TARGETS = ("gn", "ln", "frn", "brn", "cbn", "frozen")
EXACT = ("brn", "cbn", "frozen")  # there is nothing to calibrate
CALIBRATION = {"count": 256, "seconds": 6.0}
LOSS, SHARE = 0.5, 0.98  # points that may be lost, share of the original that must be reached


# --- the networks ---------------------------------------------------------------------------------


def vgg() -> nn.Module:
    """VGG with BatchNorm, six convolutions, a plain head."""
    from torchvision.models.vgg import VGG, make_layers

    layers: list[str | int] = [16, "M", 32, "M", 64, 64, "M", 64, 64]
    model = VGG(make_layers(layers, batch_norm=True), num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(1)  # type: ignore[assignment]
    model.classifier = nn.Linear(64, 10)  # type: ignore[assignment]
    return model


def resnet() -> nn.Module:
    """ResNet of basic blocks, one each."""
    from timm.models.resnet import BasicBlock, ResNet

    return _opened(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, channels=(16, 32, 64, 128)))


def bottleneck() -> nn.Module:
    """ResNet of bottlenecks, two each."""
    from timm.models.resnet import Bottleneck, ResNet

    return _opened(ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10, channels=(8, 16, 32, 64)))


def _opened(model: Any) -> Any:
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def mobilenetv2() -> nn.Module:
    """MobileNetV2's inverted residuals (depthwise, ReLU6), five of them."""
    blocks = [["ds_r1_k3_s1_c16"], ["ir_r2_k3_s2_e4_c24"], ["ir_r2_k3_s2_e4_c40"]]
    return _mobile(blocks, nn.ReLU6)


def efficientnet() -> nn.Module:
    """EfficientNet's: squeeze-and-excitation, SiLU."""
    shape = "_se0.25"
    blocks = [["ds_r1_k3_s1_c16" + shape], ["ir_r2_k3_s2_e4_c24" + shape]]
    return _mobile([*blocks, ["ir_r2_k5_s2_e4_c40" + shape]], nn.SiLU)


def _mobile(blocks: list[list[str]], act: type[nn.Module]) -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    made: nn.Module = EfficientNet(
        decode_arch_def(blocks), num_classes=10, num_features=128, stem_size=16, act_layer=act
    )
    return made


def mobilenetv3() -> nn.Module:
    """MobileNetV3's: squeeze-and-excitation in some, hard-swish, a head behind the pooling."""
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    blocks = [["ds_r1_k3_s1_c16_se0.25_nre"], ["ir_r2_k3_s2_e4_c24_nre"]]
    blocks += [["ir_r2_k5_s2_e4_c40_se0.25"], ["cn_r1_k1_s1_c96"]]
    made: nn.Module = MobileNetV3(
        decode_arch_def(blocks), num_classes=10, num_features=128, stem_size=16,
        act_layer=nn.Hardswish,
    )  # fmt: skip
    return made


def densenet() -> nn.Module:
    """DenseNet-BC of 25 layers."""
    from timm.models.densenet import DenseNet

    model = DenseNet(growth_rate=8, block_config=(3, 4, 4), num_classes=10)
    model.features.conv0 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


def shufflenet() -> nn.Module:
    """ShuffleNetV2, two blocks a stage."""
    from torchvision.models.shufflenetv2 import ShuffleNetV2

    model: Any = ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256], num_classes=10)
    model.conv1[0].stride, model.maxpool = (1, 1), nn.Identity()
    return model


def regnet() -> nn.Module:
    """RegNetX of eight blocks."""
    from timm.models.regnet import RegNet, RegNetCfg

    shape = RegNetCfg(depth=8, w0=16, wa=24.0, wm=2.2, group_size=8)
    model: Any = RegNet(shape, num_classes=10)
    model.stem.conv.stride = (1, 1)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet": resnet,
    "mobilenetv2": mobilenetv2,
    "efficientnet": efficientnet,
    "mobilenetv3": mobilenetv3,
    "densenet": densenet,
    "regnet": regnet,
    "shufflenet": shufflenet,
    "bottleneck": bottleneck,
}


# --- the images and the originals -----------------------------------------------------------------

Data = tuple[Tensor, Tensor]


@functools.cache
def scoreboard() -> Any:
    """The retention scoreboard's module, whose digits these are."""
    module = script(HERE / "retention.py")
    module.SIZE = SIZE
    return module


@functools.cache
def images(split: str, count: int, seed: int) -> Data:
    """Digits of a split, the same for the same seed."""
    pictures, labels = scoreboard().digits(split)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (count,), generator=draw)
    ink = interpolate(pictures[chosen][:, None], SIZE, mode="bilinear", align_corners=False)
    ground = 0.4 * torch.rand(count, 3, 1, 1, generator=draw)
    contrast = 0.3 + 0.5 * torch.rand(count, 3, 1, 1, generator=draw)
    texture = scoreboard().texture(count, draw)
    strength = 0.1 * torch.rand(count, 1, 1, 1, generator=draw)
    image = ground + contrast * ink + strength * texture
    return (image - 0.5) / 0.25, labels[chosen]


def original(name: str) -> nn.Module:
    """The trained BatchNorm network, from the cache or trained now."""
    path = CACHE / f"{name}.pt"
    torch.manual_seed(0)
    model = NETWORKS[name]()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    inputs, labels = images("train", PRETRAINING, seed=1)
    epochs, batch = 8, 32
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(batch)[: len(labels) // batch]:
            cross_entropy(model(inputs[index]), labels[index], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


# --- the cells ------------------------------------------------------------------------------------


def top1(model: nn.Module) -> float:
    """On the test images, in percent."""
    return 100 * normswap.evaluate(model, images("test", TEST, seed=2)).top1


def start(name: str, target: str, init: str) -> tuple[nn.Module, nn.Module]:
    """The converted network before its fine-tuning, and its original."""
    teacher = original(name)
    model = copy.deepcopy(teacher)
    model = normswap.convert(model, target, example_inputs=torch.zeros(2, 3, SIZE, SIZE)).model
    if init == "calibrated":
        unlabelled, _ = images("train", CALIBRATION["count"], seed=3)
        seconds, clock = CALIBRATION["seconds"], time.process_time
        normswap.calibrate(model, teacher, unlabelled, seconds=seconds, clock=clock)
    return model, teacher


def cell(name: str, target: str, init: str, **options: Any) -> dict[str, Any]:
    """One line: what it was, where it started and ended."""
    model, teacher = start(name, target, init)
    facts: dict[str, Any] = {"network": name, "target": target, "init": init, **options}
    facts |= {"original": top1(teacher), "start": top1(model)}
    recipe = FineTune(epochs=1, **options)  # what is under test: nothing chosen but its length
    train, chosen_on = images("train", TRAINING, seed=4), images("train", VALIDATION, seed=5)
    begun = time.process_time()
    last = copy.deepcopy(model)
    history = normswap.finetune(last, train, chosen_on, FineTune(**_last(recipe)))
    facts |= {"seconds": time.process_time() - begun, "last": top1(last)}
    begun_at, ended_at = history.start, history.epochs[-1]
    assert begun_at is not None  # there is validation data
    facts |= {"val_start": begun_at.top1, "val_last": ended_at.val_top1}
    facts |= {"val_start_loss": begun_at.loss, "val_last_loss": ended_at.val_loss}
    # the best on the validation images, of two that are as often right the surer one
    started, ended = (begun_at.top1, -begun_at.loss), (ended_at.val_top1, -ended_at.val_loss)
    return facts | {"kept": facts["last"] if ended > started else facts["start"]}


def _last(recipe: FineTune) -> dict[str, Any]:
    """The same run, left at its last weights: what it would keep follows from its history."""
    return {**vars(recipe), "keep": "last"}


def cells() -> list[tuple[str, str, str]]:
    """All of the table."""
    return [
        (name, target, init)
        for name in NETWORKS
        for target in TARGETS
        for init in (("matched",) if target in EXACT else ("matched", "calibrated"))
    ]


def run(only: list[str], out: Path) -> None:
    """Every cell that is not there yet."""
    rows = out / ROWS
    for wanted in cells():
        done = {(row["network"], row["target"], row["init"]) for row in read(rows)}
        if wanted in done or not all(word in wanted for word in only):
            continue
        facts = cell(*wanted)
        append(rows, facts)
        print(" ".join(wanted), *(f"{k} {facts[k]:.2f}" for k in SCORES), flush=True)


# --- the report -----------------------------------------------------------------------------------

ROWS = "defaults.jsonl"
SCORES = ("original", "start", "last", "kept")


def report(out: Path) -> None:
    """One line for each network and start: start → kept (last), and what falls short."""
    found = {(row["network"], row["init"], row["target"]): row for row in read(out / ROWS)}
    lines = ["| network (BN original) | start | " + " | ".join(TARGETS) + " |"]
    lines.append("|---" * (len(TARGETS) + 2) + "|")
    for name in NETWORKS:
        for init in ("matched", "calibrated"):
            mine = {target: found.get((name, init, target)) for target in TARGETS}
            known = next((row for row in mine.values() if row), None)
            if known is not None:
                head = f"| {name} ({known['original']:.1f}) | {init} | "
                lines.append(
                    head
                    + " | ".join(_entry(row, target, init) for target, row in mine.items())
                    + " |"
                )
    rows = list(found.values())
    held = [row for row in rows if row["kept"] >= row["start"] - LOSS]
    fell = [row for row in rows if row not in held]
    held_last = [row for row in rows if row["last"] >= row["start"] - LOSS]
    short = [row for row in rows if row["kept"] < SHARE * row["original"]]
    lines += [
        "",
        f"{len(rows)} cells. What is kept ends at the start − {LOSS} points or above in "
        f"{len(held)}, the last weights in {len(held_last)}; at {SHARE:.0%} of the original or "
        f"above in {len(rows) - len(short)}.",
        "Kept below the start: " + ("; ".join(map(_fall, fell)) or "none") + ".",
        "Below that share: " + ("; ".join(map(_shortfall, short)) or "none") + ".",
    ]
    text = "\n".join(lines) + "\n"
    (out / "defaults.md").write_text(text, encoding="utf-8")
    print(text)


def _entry(row: dict[str, Any] | None, target: str, init: str) -> str:
    if row is None:
        return "as matched" if init == "calibrated" and target in EXACT else "not run"
    last = "" if row["last"] == row["kept"] else f" ({row['last']:.1f})"
    return f"{row['start']:.1f} → {row['kept']:.1f}{last}"


def _shortfall(row: dict[str, Any]) -> str:
    share = 100 * row["kept"] / row["original"]
    return f"{row['network']} {row['target']} {row['init']} ({share:.1f} %)"


def _fall(row: dict[str, Any]) -> str:
    points = row["kept"] - row["start"]
    return f"{row['network']} {row['target']} {row['init']} ({points:+.1f})"


def main() -> None:
    """Run, or report only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="words that a cell's name has")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    if not options.report_only:
        run(options.only, options.out)
    report(options.out)


if __name__ == "__main__":
    main()
