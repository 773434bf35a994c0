"""What small batches are for: segmentation and detection on photographs with exact masks and boxes.

    python examples/dense_tasks.py --cut-outs FOLDER --walls FOLDER --weights FILE --out dense
    python examples/dense_tasks.py --task detection --batch-sizes 2 --targets bn,frozen,gn …
    python examples/dense_tasks.py --quick --out dense        # drawn shapes, no weights: a minute

``--cut-outs`` holds pictures with alpha, a folder for each kind of thing; ``--walls`` pictures to
lay them on. One to three things at random places and sizes make a scene, whose masks and boxes are
exact. Training and test share no object and no wall. A U-Net and a RetinaNet stand on
EfficientNet-Lite0 (``--weights``: its published weights as a file; nothing is downloaded). Every
cell starts from the same network, converted, and sees the same scenes once; a run that is broken
off goes on where it stopped. Tables and pictures are written below ``--out``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset

from normswap import FineTune
from normswap.sweeps import Sweep, sweep

TARGETS = ("bn", "frozen", "brn", "cbn", "gn", "frn")
BACKBONE = "tf_efficientnet_lite0"
NOT_PHOTOGRAPHS = ("cartoon", "symbols", "flags", "roadsigns", "alphabets", "money", "space")


def kinds_of(folder: Path, count: int, least: int = 6) -> dict[str, list[Path]]:
    """The folders with most pictures with alpha, by name: what shall be told apart."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        name = path.parent.relative_to(folder).as_posix()
        if not any(word in name for word in NOT_PHOTOGRAPHS):
            found.setdefault(name, []).append(path)
    largest = sorted(found, key=lambda name: (-len(found[name]), name))
    chosen = [name for name in largest if len(found[name]) >= least][:count]
    return {name: found[name] for name in sorted(chosen)}


class Scenes(Dataset[tuple[Tensor, Any]]):
    """Cut-outs on walls, the same for the same seed.

    Args:
        kinds: name → cut-outs; those of ``part`` are every second one.
        walls: pictures; likewise.
        count: of scenes.
        size: edge in pixels.
        part: 0 to train on, 1 to test on.
        task: ``"segmentation"`` gives (image, mask), ``"detection"`` (image, target).
        seen: mean and deviation that the segmentation network wants.
    """

    def __init__(
        self,
        kinds: dict[str, list[Path]],
        walls: Sequence[Path],
        count: int,
        size: int,
        part: int,
        task: str,
        seen: tuple[float, float] = (0.5, 0.5),
        seed: int = 0,
    ) -> None:
        self.class_names = ("__background__", *kinds)
        self.things = [paths[part::2] for paths in kinds.values()]
        self.walls = list(walls)[part::2]
        self.task, self.size, self.seen = task, size, seen
        draw = random.Random(f"{seed}/{part}")
        self.made = [self._made(draw) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """As the task wants it."""
        picture, mask, boxes, labels = self.made[index]
        image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        if self.task == "segmentation":
            return (image - self.seen[0]) / self.seen[1], torch.from_numpy(mask).long()
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        return image, target

    def _made(self, draw: random.Random) -> tuple[Any, Any, list[list[int]], list[int]]:
        picture = self._wall(draw)
        whose = np.zeros((self.size, self.size), np.uint8)  # number of the thing seen there
        mask = np.zeros_like(whose)
        labels = []
        for number in range(1, draw.randint(1, 3) + 1):
            kind = draw.randrange(len(self.things))
            thing, place = self._thing(draw, kind)
            picture.paste(thing, place, thing)
            x, y = place
            solid = np.asarray(thing.getchannel("A")) > 127
            there = (slice(y, y + thing.height), slice(x, x + thing.width))
            whose[there][solid] = number
            mask[there][solid] = kind + 1
            labels.append(kind + 1)
        boxes, kept = [], []
        for number, label in enumerate(labels, start=1):
            rows, columns = np.nonzero(whose == number)
            if len(rows) < 0.002 * self.size**2:  # hidden by others
                mask[whose == number] = 0
                continue
            corner = [int(columns.min()), int(rows.min())]
            boxes.append([*corner, int(columns.max()) + 1, int(rows.max()) + 1])
            kept.append(label)
        return np.array(picture), mask, boxes, kept

    def _wall(self, draw: random.Random) -> Image.Image:
        wall = _opened(draw.choice(self.walls), "RGB", 2 * self.size)
        edge = draw.uniform(0.5, 1.0) * min(wall.size)
        x, y = draw.uniform(0, wall.width - edge), draw.uniform(0, wall.height - edge)
        box = (int(x), int(y), int(x + edge), int(y + edge))
        return wall.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)

    def _thing(self, draw: random.Random, kind: int) -> tuple[Image.Image, tuple[int, int]]:
        thing = _opened(draw.choice(self.things[kind]), "RGBA", 2 * self.size)
        if draw.random() < 0.5:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = self.size * draw.uniform(0.3, 0.7) / max(thing.size)
        width, height = (max(1, round(edge * scale)) for edge in thing.size)
        thing = thing.resize((width, height), Image.Resampling.BILINEAR)
        return thing, (draw.randint(0, self.size - width), draw.randint(0, self.size - height))


_opened_before: dict[tuple[Path, int], Image.Image] = {}


def _opened(path: Path, mode: str, largest: int) -> Image.Image:
    if (path, largest) not in _opened_before:
        image = Image.open(path).convert(mode)
        image.thumbnail((largest, largest))
        _opened_before[path, largest] = image
    return _opened_before[path, largest]


def drawn_pictures(folder: Path) -> tuple[Path, Path]:
    """Polygons with alpha in eight kinds, and plain walls, for ``--quick``."""
    draw = random.Random(0)
    things, walls = folder / "things", folder / "walls"
    walls.mkdir(parents=True, exist_ok=True)
    for kind in range(8):
        home = things / f"{kind + 3} corners"
        home.mkdir(parents=True, exist_ok=True)
        for number in range(6):
            image = Image.new("RGBA", (64, 64))
            colour = tuple(draw.randrange(256) for _ in range(3))
            turn = draw.uniform(0, 360)
            ImageDraw.Draw(image).regular_polygon((32, 32, 30), kind + 3, turn, fill=colour)
            image.save(home / f"{number}.png")
    for number in range(4):
        Image.effect_noise((96, 96), 20 + 10 * number).convert("RGB").save(walls / f"{number}.png")
    return things, walls


def models() -> Any:
    """The factories beside this file."""
    path = Path(__file__).with_name("dense_models.py")
    spec = importlib.util.spec_from_file_location("dense_models", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def fill(body: nn.Module, name: str, file: Path) -> None:
    """Weights from a file: under timm's names, or in the same order under other ones."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    whole = timm.create_model(name)
    if not set(whole.state_dict()) <= set(state):
        keys = [key for key in whole.state_dict() if "num_batches" not in key]
        values = [value.contiguous() for key, value in state.items() if "num_batches" not in key]
        state = dict(zip(keys, values, strict=True))
    whole.load_state_dict(state, strict=False)
    kept = body.state_dict().keys()
    body.load_state_dict({k: v for k, v in whole.state_dict().items() if k in kept})


def network(task: str, classes: int, chosen: argparse.Namespace) -> nn.Module:
    """The BatchNorm network that all cells of a task start from."""
    torch.manual_seed(0)
    common = {"num_classes": classes, "pretrained": False, "backbone": chosen.backbone}
    if task == "segmentation":
        model = models().unet(**common)
        body = model.backbone
    else:
        model = models().retinanet(image_size=chosen.size, **common)
        body = model.backbone.body
    if chosen.weights is not None:
        fill(body, chosen.backbone, chosen.weights)
    return model.eval()


def run(task: str, chosen: argparse.Namespace) -> Sweep:
    """All cells of a task."""
    kinds = kinds_of(chosen.cut_outs, chosen.kinds)
    if len(kinds) < 2:
        raise SystemExit(f"{chosen.cut_outs}: need folders with six pictures with alpha at least")
    walls = sorted(p for p in chosen.walls.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    config = timm.get_pretrained_cfg(chosen.backbone)
    seen = (float(config.mean[0]), float(config.std[0]))
    train = Scenes(kinds, walls, chosen.samples, chosen.size, 0, task, seen)
    test = Scenes(kinds, walls, chosen.test, chosen.size, 1, task, seen)
    print(f"{task}: {len(kinds)} kinds ({', '.join(kinds)}), {len(train)} scenes, {len(test)} held")
    example = train[0][0]
    return sweep(
        network(task, len(kinds) + 1, chosen),
        train,
        test,
        targets=chosen.targets,
        batch_sizes=chosen.batch_sizes,
        seeds=chosen.seeds,
        options=FineTune(
            batch_size=max(chosen.batch_sizes),
            epochs=1,
            learning_rate=chosen.lr,
            clip_grad=10.0,
            passage=chosen.passage,
            eval_batch_size=8,
        ),
        example_inputs=[example] if task == "detection" else example[None],
        out=chosen.out / task,
        task=task,
        progress=lambda now: print(f"\r{task} {now.share:.1%} {now.message}", end="", flush=True),
    )


def table(found: dict[str, Sweep], chosen: argparse.Namespace) -> str:
    """Both tasks side by side, in percent, as Markdown."""
    sizes = chosen.batch_sizes
    heading = [f"{_MEASURED[task]}, batch {size}" for task in found for size in sizes]
    lines = [
        f"{chosen.backbone} at {chosen.size} px, {chosen.samples} scenes seen once, "
        f"{chosen.test} held out, {chosen.kinds} kinds, {chosen.seeds} seed(s), "
        f"passage {chosen.passage or 'none'}, learning rate {chosen.lr:g} at batch {max(sizes)}",
        "",
        "| target | " + " | ".join(heading) + " |",
        "|---" * (len(heading) + 1) + "|",
    ]
    for target in chosen.targets:
        cells = [
            _entry(found[task].point(target, size).mean, found[task].point(target, size).deviation)
            for task in found
            for size in sizes
        ]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_MEASURED = {"segmentation": "mean IoU", "detection": "mAP"}


def _entry(mean: float | None, deviation: float) -> str:
    if mean is None or math.isnan(mean):
        return "failed"
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation else "")


def main(arguments: Sequence[str] | None = None) -> dict[str, Sweep]:
    """Both tasks, a table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cut-outs", type=Path, help="pictures with alpha, a folder each kind")
    parser.add_argument("--walls", type=Path, help="pictures to lay them on")
    parser.add_argument("--weights", type=Path, help="of the backbone: a state dict")
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--task", choices=("segmentation", "detection", "both"), default="both")
    parser.add_argument("--targets", type=lambda t: tuple(t.split(",")), default=TARGETS)
    parser.add_argument(
        "--batch-sizes", type=lambda t: tuple(int(n) for n in t.split(",")), default=(1, 2)
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--kinds", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-4, help="at the largest batch size")
    parser.add_argument("--passage", type=float, help="of gn and frn, a share of the run")
    parser.add_argument("--out", type=Path, default=Path("dense_tasks"))
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.cut_outs, chosen.walls = drawn_pictures(chosen.out / "drawn")
        chosen.backbone, chosen.size, chosen.kinds = "test_efficientnet", 64, 8
        chosen.samples, chosen.test, chosen.seeds = 8, 4, 1
    if chosen.cut_outs is None or chosen.walls is None:
        parser.error("need --cut-outs and --walls, or --quick")
    tasks = ("segmentation", "detection") if chosen.task == "both" else (chosen.task,)
    found = {task: run(task, chosen) for task in tasks}
    text = table(found, chosen)
    (chosen.out / "table.md").write_text(text)
    print(text)
    print("pictures:", *(chosen.out / task / "sweep.png" for task in found))
    return found


if __name__ == "__main__":
    main()
