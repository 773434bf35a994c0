"""How many of a real ImageNet network's decisions a conversion keeps: the first scoreboard.

    python examples/benchmarks/real_weights.py --weights FILE --images FOLDER
    python examples/benchmarks/real_weights.py ... --only gn-calibrated --seeds 1 --clock cpu
    python examples/benchmarks/real_weights.py --report-only

The network is timm's ``tf_efficientnet_lite0`` (another one with --network) with published weights;
FILE is a state dict of it, also under other names if the order is timm's. FOLDER holds pictures:
those with transparent parts are cut-outs, the others are walls. A photograph is a cut-out on a
plain colour, or on a crop of a wall, or a crop of a wall alone. Every other file makes the test
photographs, the rest those that calibrate: they share neither a thing nor a wall. Nobody labelled
them, so agreement with the BatchNorm original is measured, over all photographs and over those
where it is sure (p > 0.5). Every finished row is written at once: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from shared import append, read
from torch import Tensor, nn

import normswap

HERE = Path(__file__).parent
NO_PHOTOGRAPHS = ("cartoon", "symbols", "flags", "roadsigns", "alphabets", "money", "seasonal")
NO_PHOTOGRAPHS += ("space",)
TEST = 300
BUDGETS = ((256, 120), (1024, 600))


# --- photographs and the original -----------------------------------------------------------------


def pictures(folder: Path, half: int) -> tuple[list[Path], list[Path]]:
    """Cut-outs and walls of one half."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    cut_outs, walls = [], []
    for path in found:
        if any(word in str(path) for word in NO_PHOTOGRAPHS):
            continue
        with Image.open(path) as picture:  # reads the header only
            if picture.mode in ("RGBA", "LA", "P"):
                cut_outs.append(path)
            elif min(picture.size) >= 400:
                walls.append(path)
    return cut_outs[half::2], walls[half::2]


def photographs(folder: Path, count: int, half: int, size: int, seed: int) -> Tensor:
    """``count`` photographs of one half, mean and std 0.5."""
    cut_outs, walls = pictures(folder, half)
    draw = random.Random(seed + 10_000 * half)
    made = [photograph(cut_outs, walls, size, draw) for _ in range(count)]
    return torch.stack([torch.from_numpy(m).permute(2, 0, 1).float() / 127.5 - 1 for m in made])


def photograph(
    cut_outs: list[Path], walls: list[Path], size: int, draw: random.Random, thing: float = 0.75
) -> np.ndarray[Any, Any]:
    """A cut-out, with probability ``thing``, on a plain colour or a crop of a wall."""
    wall = Image.open(draw.choice(walls)).convert("RGB")
    wall.thumbnail((1400, 1400))
    edge = draw.uniform(0.35, 1) * min(wall.size)
    x, y = draw.uniform(0, wall.width - edge), draw.uniform(0, wall.height - edge)
    box = (int(x), int(y), int(x + edge), int(y + edge))
    picture = wall.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if draw.random() < thing:
        shown = Image.open(draw.choice(cut_outs)).convert("RGBA")
        scale = size * draw.uniform(0.55, 0.95) / max(shown.size)
        width, height = (max(1, int(n * scale)) for n in shown.size)
        shown = shown.resize((width, height), Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            colour = tuple(draw.randrange(180, 256) for _ in range(3))
            picture = Image.new("RGB", (size, size), colour)
        place = draw.randrange(size - width + 1), draw.randrange(size - height + 1)
        picture.paste(shown, place, shown)
    return np.array(picture)


def original(network: str, weights: Path) -> nn.Module:
    """The BatchNorm original with its published weights."""
    model = timm.create_model(network)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    values = [v.contiguous() for k, v in state.items() if "num_batches" not in k]
    keys = [k for k in model.state_dict() if "num_batches" not in k]
    model.load_state_dict(dict(zip(keys, values, strict=True)), strict=False)
    return model.eval()


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """In batches of 25."""
    return torch.cat([model.eval()(batch) for batch in images.split(25)])


# --- the rows -------------------------------------------------------------------------------------


class Board:
    """The original, its photographs, and what is measured on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.teacher = original(options.network, options.weights)
        self.test = photographs(options.images, TEST, 1, options.size, 0)
        self.truth = logits(self.teacher, self.test)
        self.sure = self.truth.softmax(1).max(1).values > 0.5
        self.clock = time.process_time if options.clock == "cpu" else time.monotonic

    def images(self, count: int, seed: int) -> Tensor:
        """Photographs for calibration."""
        return photographs(self.options.images, count, 0, self.options.size, seed)

    def convert(self, target: str, **more: Any) -> normswap.Conversion:
        """A copy, converted."""
        model = copy.deepcopy(self.teacher)
        return normswap.convert(model, target, example_inputs=self.test[:2], **more)

    def kept(self, model: nn.Module) -> dict[str, float]:
        """Decisions kept, in percent, and the divergence of the softmax."""
        found = logits(model, self.test)
        same = found.argmax(1) == self.truth.argmax(1)
        ours, theirs = found.log_softmax(1), self.truth.log_softmax(1)
        kl = nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        shares = [100 * float(part.float().mean()) for part in (same, same[self.sure])]
        return {"kept": shares[0], "sure": shares[1], "kl": float(kl)}


Facts = dict[str, Any]


def converted(board: Board, target: str, init: str) -> Facts:
    """No data."""
    return board.kept(board.convert(target, init=init).model)


def calibrated(
    board: Board, target: str, budget: tuple[int, float], seed: int, **more: Any
) -> Facts:
    """With photographs, a budget and a seed."""
    (count, seconds), model = budget, board.convert(target).model
    images, begun = board.images(count, seed), board.clock()
    report = normswap.calibrate(
        model, board.teacher, images, seconds=seconds, seed=seed, clock=board.clock, **more
    )
    spent = board.clock() - begun
    return {**board.kept(model), "steps": report.steps, "seconds": spent, "end": report.stopped}


def chosen(board: Board, target: str, share: float, budget: tuple[int, float], seed: int) -> Facts:
    """As many sites as a share of the decisions allows."""
    count, seconds = budget
    images, begun = board.images(count, seed), board.clock()
    work: Any = {"images": images, "seconds": seconds, "seed": seed, "clock": board.clock}
    result = board.convert(target, keep=share, **work)
    done = sum(entry.becomes == target for entry in result.plan)
    spent = board.clock() - begun
    return {**board.kept(result.model), "sites": done, "of": len(result.plan), "seconds": spent}


Row = tuple[str, int, Callable[[Board, int], Facts]]


def rows(seeds: int, solving: float) -> Iterator[Row]:
    """Name, number of seeds, what is done."""
    for target in ("brn", "cbn", "frozen", "gn", "ln", "frn"):
        yield f"{target}-matched", 1, lambda b, _, t=target: converted(b, t, "match")
    yield "gn-steady", 1, lambda b, _: converted(b, "gn", "steady")
    for target in ("gn", "frn"):
        yield f"{target}-copied", 1, lambda b, _, t=target: converted(b, t, "copy")
        for budget in BUDGETS:
            name = f"{target}-calibrated-{budget[0]}-images-{budget[1]}-s"
            yield name, seeds, lambda b, s, t=target, n=budget: calibrated(b, t, n, s)
    for moves in ("norms", "producers", "all"):
        name = f"gn-calibrated-256-images-120-s-{moves}"
        yield name, seeds, lambda b, s, p=moves: calibrated(b, "gn", (256, 120), s, parameters=p)
    yield "gn-solved", seeds, lambda b, s: calibrated(b, "gn", (256, solving), s, steps=0)
    for target, share in (("gn", 0.9), ("gn", 0.95), ("frn", 0.9)):
        name = f"{target}-keep-{100 * share:.0f}"
        yield name, seeds, lambda b, s, t=target, k=share: chosen(b, t, k, (256, 180), s)


def run(options: argparse.Namespace) -> None:
    """Every row that is not there yet."""
    board = None
    done = {
        (row["network"], row["name"], row["seed"], row["size"]) for row in read(options.out / ROWS)
    }
    for name, seeds, work in rows(options.seeds, options.solving):
        if options.only and not any(word in name for word in options.only):
            continue
        for seed in range(seeds):
            if (options.network, name, seed, options.size) in done:
                continue
            board = Board(options) if board is None else board
            facts = {"name": name, "seed": seed, "size": options.size, "network": options.network}
            facts |= {"clock": options.clock, "threads": torch.get_num_threads()}
            facts |= {"load": os.getloadavg()[0], **work(board, seed)}
            append(options.out / ROWS, facts)
            print(f"{name}, seed {seed}: {facts['kept']:.1f} ({facts['sure']:.1f})", flush=True)


# --- the report -----------------------------------------------------------------------------------


ROWS = "real-weights.jsonl"


def report(out: Path) -> None:
    """The table."""
    found: dict[tuple[str, str, int], list[Facts]] = {}
    for row in read(out / ROWS):
        found.setdefault((row["network"], row["name"], row["size"]), []).append(row)
    head = ["network", "px", "row", "seeds", "decisions kept, %", "of the sure ones, %", "KL"]
    head += ["sites converted", "spent, s (clock, threads)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (network, name, size), mine in found.items():
        sites = ", ".join(f"{row['sites']}/{row['of']}" for row in mine if "sites" in row)
        spent = ", ".join(f"{row['seconds']:.0f}" for row in mine if "seconds" in row)
        clock = f" ({mine[0]['clock']}, {mine[0]['threads']})" if spent else ""
        cells = [network, str(size), name, str(len(mine))]
        cells += [_spread([row[key] for row in mine], 1) for key in ("kept", "sure")]
        cells += [_spread([row["kl"] for row in mine], 2), sites, spent + clock]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (out / "real-weights.md").write_text(text, encoding="utf-8")
    print(text)


def _spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="What real ImageNet weights keep.")
    parser.add_argument("--weights", type=Path, help="state dict of the network")
    parser.add_argument("--images", type=Path, help="folder of cut-outs and walls")
    parser.add_argument("--network", default="tf_efficientnet_lite0", help="timm's name")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these in it")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--solving", type=float, default=600, help="seconds of gn-solved")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    if not options.report_only:
        if options.weights is None or options.images is None:
            parser.error("give --weights FILE and --images FOLDER")
        run(options)
    report(options.out)


if __name__ == "__main__":
    main()
