"""Fine-tuning a real ImageNet network at batch 2, from every start: does it come up to BatchNorm?

    python examples/benchmarks/real_finetune.py --weights FILE --images FOLDER
    python examples/benchmarks/real_finetune.py ... --only gn frozen --seeds 1 --size 96
    python examples/benchmarks/real_finetune.py --report-only

The network is timm's ``tf_efficientnet_lite0`` with its published weights, as in real_weights.py.
It learns to tell 13 kinds of photographs apart (mammals, birds, fruit, flowers …): cut-outs on
plain colours and on crops of walls; training and test share neither an object nor a wall. First a
new head is trained on the original's frozen features. Then every row starts from that network,
converted or not (``kept``: as many sites as 80 % of the decisions allow, the others frozen), and is
fine-tuned with the defaults: the same photographs in the same order,
batch 2. Validated after every epoch on the test photographs; the last weights count. Every
finished row is one line of a file: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from shared import append, read, script
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normswap
from normswap import FineTune

HERE = Path(__file__).parent
KINDS = (
    "animals/mammals", "animals/birds", "animals/insects", "animals/fish", "food/fruit",
    "food/vegetables", "plants/trees", "plants/flowers", "vehicles", "household", "clothes",
    "hobbies", "sports",
)  # fmt: skip
Photographs = tuple[Tensor, Tensor]


@functools.cache
def scoreboard() -> Any:
    """The scoreboard of real weights, whose network and photographs these are."""
    return script(HERE / "real_weights.py")


def photographs(folder: Path, count: int, half: int, size: int, seed: int) -> Photographs:
    """``count`` photographs of one half of the objects, every kind as often as the others."""
    board = scoreboard()
    cut_outs, walls = board.pictures(folder, half)
    every = sorted([*cut_outs, *board.pictures(folder, 1 - half)[0]])
    of_kind = [[p for p in every if f"/{kind}/" in p.as_posix()][half::2] for kind in KINDS]
    draw = random.Random(seed + 10_000 * half)
    pictures, labels = [], []
    while len(labels) < count:
        label = len(labels) % len(KINDS)
        made = board.photograph(of_kind[label], walls, size, draw, thing=1.0)
        pictures.append(torch.from_numpy(made).permute(2, 0, 1).float() / 127.5 - 1)
        labels.append(label)
    return torch.stack(pictures), torch.tensor(labels)


def with_head(options: argparse.Namespace, train: Photographs) -> nn.Module:
    """The BatchNorm original with a head trained on its frozen features."""
    model: Any = scoreboard().original(options.network, options.weights)
    images, labels = train
    with torch.no_grad():
        features = torch.cat(
            [model.forward_head(model.forward_features(part), pre_logits=True)
             for part in images.split(25)]
        )  # fmt: skip
    torch.manual_seed(0)
    model.reset_classifier(len(KINDS))
    head = model.get_classifier()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(head(features), labels).backward()
        optimizer.step()
    model.eval()
    return model  # type: ignore[no-any-return]


KEPT = 0.8  # of the original's decisions, where as many sites are converted as that allows
# name → target, start, options of the fine-tuning
ROWS: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "bn": (None, "", {}),
    "frozen": ("frozen", "match", {}),
    "gn-passage": ("gn", "match", {"passage": 0.6}),
    "gn-steady-passage": ("gn", "steady", {"passage": 0.6}),
    "gn-matched": ("gn", "match", {}),
    "gn-steady": ("gn", "steady", {}),
    "gn-calibrated": ("gn", "calibrated", {}),
    "frn-passage": ("frn", "match", {"passage": 0.6}),
    "brn": ("brn", "match", {}),
    "cbn": ("cbn", "match", {}),
    "frn-matched": ("frn", "match", {}),
    "frn-calibrated": ("frn", "calibrated", {}),
    "gn-copied": ("gn", "copy", {}),
    "frn-copied": ("frn", "copy", {}),
    "frn-passage-teacher": ("frn", "match", {"passage": 0.6, "teacher": True}),
    "frn-calibrated-passage": ("frn", "calibrated", {"passage": 0.6}),
    "gn-kept": ("gn", "kept", {}),
    "frn-kept": ("frn", "kept", {}),
}


class Bench:
    """What all rows of a seed share."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.train = photographs(options.images, options.photographs, 0, options.size, seed)
        self.test = photographs(options.images, options.test, 1, options.size, 0)
        self.teacher = with_head(options, self.train)

    def row(self, name: str) -> dict[str, Any]:
        """One start, fine-tuned."""
        target, init, more = ROWS[name]
        model, options = copy.deepcopy(self.teacher), self.options
        example, unlabelled = self.train[0][:2], self.train[0][: options.calibration]
        budget: dict[str, Any] = {"seconds": options.seconds, "clock": time.process_time}
        if init == "kept":
            budget |= {"keep": KEPT, "images": unlabelled}
            model = normswap.convert(model, str(target), example_inputs=example, **budget).model
        elif target is not None:
            plain = "match" if init == "calibrated" else init
            model = normswap.convert(model, target, example_inputs=example, init=plain).model
        if init == "calibrated":
            normswap.calibrate(model, self.teacher, unlabelled, **budget)
        recipe = FineTune(
            batch_size=2, epochs=options.epochs, seed=self.seed, keep="last",
            learning_rate=options.lr,
            **more | ({"teacher": self.teacher} if "teacher" in more else {}),
        )  # fmt: skip
        begun = time.process_time()
        history = normswap.finetune(model, self.train, self.test, recipe)
        assert history.start is not None
        scores = [100 * (row.val_top1 or 0.0) for row in history.epochs]
        return {
            "start": 100 * history.start.top1,
            "scores": scores,
            "end": scores[-1],
            "steps": history.steps,
            "learning_rate": history.learning_rate,
            "seconds": time.process_time() - begun,
        }


def run(options: argparse.Namespace) -> None:
    """Every row that is not there yet."""
    done = {tuple(row.get(key) for key in SETTING) for row in read(options.out / FILE)}
    for seed in range(options.seeds):
        bench = None
        for name in ROWS:
            facts = {key: getattr(options, key) for key in SETTING if hasattr(options, key)}
            facts |= {"name": name, "seed": seed}
            wanted = not options.only or name in options.only
            if not wanted or tuple(facts[key] for key in SETTING) in done:
                continue
            bench = Bench(options, seed) if bench is None else bench
            facts |= {"load": os.getloadavg()[0], **bench.row(name)}
            append(options.out / FILE, facts)
            path = " → ".join(f"{score:.1f}" for score in facts["scores"])
            print(f"{name}, seed {seed}: {facts['start']:.1f} → {path}", flush=True)


# --- the report -----------------------------------------------------------------------------------

FILE = "real-finetune.jsonl"
SETTING = ("network", "size", "photographs", "epochs", "test", "lr", "name", "seed")


def report(out: Path) -> None:
    """Start, end, and the updates until the frozen network's end is reached."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in read(out / FILE):
        groups.setdefault(tuple(row.get(key) for key in SETTING[:-1]), []).append(row)
    lines = ["| px | rate | row | seeds | start | after each epoch | updates until frozen's end |"]
    lines.append("|---" * 7 + "|")
    for key, rows in groups.items():
        frozen = groups.get((*key[:-1], "frozen"), [])
        goal = statistics.fmean(row["end"] for row in frozen) if frozen else None
        start = statistics.fmean(row["start"] for row in rows)
        path = [statistics.fmean(scores) for scores in zip(*(r["scores"] for r in rows))]  # noqa: B905
        each = rows[0]["steps"] // len(path)
        reached = [(at + 1) * each for at, score in enumerate(path) if goal and score >= goal]
        rate = f"{rows[0]['learning_rate']:.1e}"
        cells = [str(key[1]), rate, str(key[-1]), str(len(rows)), f"{start:.1f}"]
        cells += [", ".join(f"{score:.1f}" for score in path)]
        cells += [str(reached[0]) if reached else "not" if goal else ""]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (out / "real-finetune.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Run, or report only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="state dict of the network")
    parser.add_argument("--images", type=Path, help="folder of cut-outs and walls")
    parser.add_argument("--network", default="tf_efficientnet_lite0", help="timm's name")
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--photographs", type=int, default=390, help="to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="in place of the default")
    parser.add_argument("--test", type=int, default=390, help="photographs")
    parser.add_argument("--calibration", type=int, default=128, help="photographs")
    parser.add_argument("--seconds", type=float, default=60, help="of calibration, CPU time")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="rows")
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
