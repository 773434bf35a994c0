"""What each target costs beside BatchNorm on a GPU: by batch, size, precision and memory format.

    python examples/benchmarks/gpu.py                  # every setting; goes on where it stopped
    python examples/benchmarks/gpu.py --batch-sizes 2 --sizes 224 --compile
    python examples/benchmarks/gpu.py --report-only

``normswap bench``'s measurement, in which all targets take turns, over a grid of settings. Ratios
are to BatchNorm in the same setting, eager; a row names the card and torch's version. cuDNN is left
as torch has it. Every finished setting is one line of a file.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from shared import append, read

from normswap import load_model
from normswap.benchmark import compare
from normswap.targets import split_targets

HERE = Path(__file__).parent
FILE = "gpu.jsonl"
SETTING = ("model", "batch", "size", "amp", "channels_last", "compiled")
TARGETS = "gn,frn,brn,cbn(window=4),cbn(window=8)"


def settings(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid, small ones first."""
    grid = itertools.product(
        chosen.sizes, chosen.batch_sizes, chosen.amp, chosen.channels_last, chosen.models
    )
    found = [
        {
            "model": model,
            "batch": batch,
            "size": size,
            "amp": None if amp == "no" else amp,
            "channels_last": last == "yes",
            "compiled": chosen.compile,
        }
        for size, batch, amp, last, model in grid
    ]
    return sorted(found, key=lambda row: row["batch"] * row["size"] ** 2)


def measured(row: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """One setting."""
    torch.manual_seed(0)
    model: Any = load_model(row["model"], pretrained=False, device="cuda").model
    images = torch.randn(row["batch"], 3, row["size"], row["size"], device="cuda")
    if row["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    targets = {name: name for name in split_targets(chosen.targets)}
    begun = time.perf_counter()
    found = compare(
        model,
        targets,
        images,
        rounds=chosen.rounds,
        warmup=chosen.warmup,
        compiled=row["compiled"],
        onnx=False,
        amp=row["amp"],
    )
    torch.cuda.empty_cache()
    seconds = time.perf_counter() - begun
    card = torch.cuda.get_device_name()
    return {**row, "card": card, "torch": torch.__version__, "seconds": seconds, **found.to_json()}


def report(out: Path) -> None:
    """Training step, median (inference, median); one line per setting."""
    lines = []
    for compiled in (False, True):
        rows = [row for row in read(out / FILE) if row["compiled"] == compiled]
        if not rows:
            continue
        names = [_label(one) for one in rows[0]["rows"]][1:]
        head = ["model", "batch × px", "precision", "format", "BN, ms", *names]
        head += [] if compiled else ["peak memory, cbn(window=4)"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in rows:
            last = "channels last" if row["channels_last"] else "contiguous"
            cells = [row["model"].rpartition("/")[2], f"{row['batch']} × {row['size']}"]
            cells += [row["amp"] or "fp32", last, f"{1e3 * row['training_seconds']:.1f}"]
            cells += [_cell(one) for one in row["rows"][1:]]
            peaks = {one["target"]: one["peak"] for one in row["rows"] if not one["compiled"]}
            if not compiled:
                cells.append(f"{peaks.get('cbn(window=4)', 0) / peaks['bn']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        cards = sorted({f"{row['card']}, torch {row['torch']}" for row in rows})
        notes = {f"{_label(one)}: {one['note']}" for row in rows for one in row["rows"]}
        lines += ["", *cards, *sorted(note for note in notes if not note.endswith(": ")), ""]
    text = "\n".join(lines)
    (out / "gpu.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def _label(row: dict[str, Any]) -> str:
    return f"{row['target']}, compiled" if row["compiled"] else str(row["target"])


def _cell(row: dict[str, Any]) -> str:
    if row["training"] is None:
        return "failed"
    return f"{row['training']['median']:.2f} ({row['inference']['median']:.2f})"


def main() -> None:
    """Measure what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["torchvision/resnet50"])
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 800], help="pixels")
    parser.add_argument("--amp", nargs="+", default=["no", "bf16"])
    parser.add_argument("--channels-last", nargs="+", default=["no", "yes"])
    parser.add_argument("--compile", action="store_true", help="measure the compiled forms too")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--report-only", action="store_true")
    chosen = parser.parse_args()
    if not chosen.report_only:
        if not torch.cuda.is_available():
            parser.error("no GPU that torch can use")
        done = {tuple(row[key] for key in SETTING) for row in read(chosen.out / FILE)}
        for row in settings(chosen):
            if tuple(row[key] for key in SETTING) not in done:
                append(chosen.out / FILE, measured(row, chosen))
                print(row, flush=True)
    report(chosen.out)


if __name__ == "__main__":
    main()
