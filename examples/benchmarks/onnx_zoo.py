"""Export one architecture per timm module and torchvision family, for each target, and prove it.

    python examples/benchmarks/onnx_zoo.py     # goes on where onnx_zoo.jsonl beside it ends
    python examples/benchmarks/onnx_zoo.py --report examples/benchmarks/onnx_zoo.jsonl
    python examples/benchmarks/onnx_zoo.py --dense    # all detection and segmentation models

Weights are random, running statistics are not fresh. Architectures that torch itself cannot export
with BatchNorm are listed with torch's own error, once. With ``--dense`` every model takes one
training step between conversion and export, at the smallest size that suits it, and rows go to
onnx_zoo_dense.jsonl. Runs resume: what is in the file is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from shared import append, read
from torch import nn

import normswap
from normswap.errors import ParityError
from normswap.graph import call

SIZES = (64, 128, 224, 256, 384)
# The smallest ConvMixer is so deep that FRN, with random weights, amplifies rounding until torch's
# own float32 output is wrong by 5 %: nothing can be proven about that. This one has fewer layers.
AS_WELL = ("convmixer_1024_20_ks9_p14",)
# At 64 to 128 px the last maps of these are 2×2, where FRN with random weights amplifies rounding
# (torch's own float32 up to 2.8e-3): they run at the size that they are made for.
LARGER = {
    "timm/inception_v3": 299,
    "timm/inception_v4": 299,
    "timm/lcnetv2_small": 224,
    "torchvision/shufflenet_v2_x0_5": 224,
}
DETECTION_SIZE = 96
Build = Callable[[], nn.Module]


def timm_models() -> Iterator[tuple[str, Build]]:
    """The smallest architecture with BatchNorm of every timm module."""
    import timm

    for module in timm.list_modules():
        names = sorted(timm.list_models(module=module), key=lambda name: (len(name), name))[:6]
        sized = [(size, name) for name in names if (size := _size(timm.create_model, name))]
        if sized:
            for name in (min(sized)[1], *(name for _, name in sized if name in AS_WELL)):
                yield f"timm/{name}", lambda name=name: timm.create_model(name, pretrained=False)


def _size(build: Callable[[str], nn.Module], name: str) -> int | None:
    """Number of parameters of a model that has BatchNorm."""
    try:
        with torch.device("meta"):
            model = build(name)
    except Exception:  # noqa: BLE001  some need what a meta device has not
        return None
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return sum(p.numel() for p in model.parameters()) if norms else None


def torchvision_models() -> Iterator[tuple[str, Build]]:
    """The smallest architecture with BatchNorm of every torchvision family.

    The quantisable ones are left out: they are the same networks; detection has its own survey.
    """
    import torchvision

    families: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        if "quantization" in builder.__module__ or "detection" in builder.__module__:
            continue
        size = _size(_torchvision, name)
        if size:
            families[builder.__module__].append((size, name))
    for sized in families.values():
        name = min(sized)[1]
        yield f"torchvision/{name}", lambda name=name: _torchvision(name)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    plain = {"weights": None}
    module = torchvision.models.get_model_builder(name).__module__
    if "segmentation" in module or "detection" in module:
        plain["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        plain["init_weights"] = False
    return torchvision.models.get_model(name, **plain)


def trained(build: Build) -> nn.Module:
    """A model whose running statistics are not fresh."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def example(name: str, model: nn.Module) -> Any:
    """The smallest image that the model takes; two of them for optical flow."""
    model.eval()
    own = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
    frames = (4, 16) if "video" in type(model).__module__ else (None,)
    sizes = [LARGER[name]] if name in LARGER else [*SIZES, own]
    for size, depth in itertools.product(sizes, frames):
        shape = [2, 3, *([depth] if depth else []), size, size]
        try:
            x: Any = torch.randn(shape)
            if _is_flow(model):
                x = (x, torch.randn(shape))
            with torch.no_grad():
                call(model, x)
        except (RuntimeError, AssertionError, ValueError):
            continue
        return x
    raise RuntimeError(f"{name} takes none of the sizes {SIZES}")


def _is_flow(model: nn.Module) -> bool:
    """Optical flow; torch's exporter fixes its batch size, with BatchNorm as well."""
    return "optical_flow" in type(model).__module__


def prove(name: str, build: Build, target: str) -> dict[str, Any]:
    """One row of the table."""
    with _row(name, target) as row:
        model = trained(build)
        x = example(name, model)
        row["size"] = (x[0] if isinstance(x, tuple) else x).shape[-1]
        if target != "bn":
            model = normswap.convert(model, target, example_inputs=x).model
        with tempfile.TemporaryDirectory() as folder:
            parity = normswap.export_onnx(
                model, Path(folder) / "m.onnx", example_inputs=x, static_batch=_is_flow(model)
            )
        row |= {"passed": True, **facts(parity)}
        if parity.notes:
            row["notes"] = list(parity.notes)
    return row


@contextlib.contextmanager
def _row(name: str, target: str) -> Iterator[dict[str, Any]]:
    """A row of the table, whatever happens while it is made."""
    row: dict[str, Any] = {"model": name, "target": target}
    started = time.perf_counter()
    try:
        yield row
    except ParityError as error:
        problem = re.sub(r"\S*/m\.onnx", "m.onnx", str(error))
        row |= {"passed": False, "problem": problem[:400], **facts(error.parity)}
    except (Exception, _TooLong) as error:  # noqa: BLE001  a table of everything that can happen
        row |= {"passed": False, "problem": f"{type(error).__name__}: {str(error)[:400]}"}
    row["seconds"] = round(time.perf_counter() - started, 1)


def facts(parity: Any) -> dict[str, Any]:
    """The numbers of a proof."""
    return {
        "error": parity.max_relative_error,
        "torch": max((case.torch_error for case in parity.cases), default=0.0),
        "top1": parity.top1_agreement,
        "cases": len(parity.cases),
    }


def dense_models() -> Iterator[tuple[str, Build]]:
    """Every detection and segmentation model of torchvision, the smallest first."""
    import torchvision

    sized = []
    for task in ("detection", "segmentation"):
        for name in torchvision.models.list_models(getattr(torchvision.models, task)):
            with torch.device("meta"):
                sized.append((sum(p.numel() for p in _small(name).parameters()), name))
    for _, name in sorted(sized):
        yield f"torchvision/{name}", lambda name=name: _small(name)


def _small(name: str) -> nn.Module:
    """A model of torchvision that does not enlarge its images; SSD has one size."""
    import torchvision

    plain: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if "rcnn" in name or name.startswith(("fcos", "retinanet")):
        plain |= {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
    model = torchvision.models.get_model(name, **plain)
    if name.startswith("ssdlite"):
        # at random weights its classes are so close that rounding decides between boxes
        with torch.no_grad():
            for part in model.head.classification_head.module_list:
                part[-1].weight.mul_(10.0)
    return model


def prove_dense(name: str, build: Build, target: str) -> dict[str, Any]:
    """One row: convert, one training step, export, proof."""
    with _row(name, target) as row:
        model = trained(build)
        detects = "detection" in type(model).__module__
        size = DETECTION_SIZE if detects and "ssd" not in name else 320 if detects else 64
        if "ssd300" in name:
            size = 300
        row["size"] = size
        images = torch.rand(2, 3, size, size)
        inputs: Any = list(images) if detects else images
        result = normswap.convert(model, target, example_inputs=inputs)
        row["replaced"] = len(result.replaced)
        row["loss"] = round(training_step(result.model, images, detects=detects), 4)
        with tempfile.TemporaryDirectory() as folder:
            parity = normswap.export_onnx(
                result.model.eval(),
                Path(folder) / "m.onnx",
                example_inputs=inputs,
                dynamic_size=not detects,
            )
        row |= {"passed": True, **facts(parity), "notes": list(parity.notes)}
    return row


def training_step(model: nn.Module, images: torch.Tensor, *, detects: bool) -> float:
    """One step of plain SGD on two images; the loss, which must be finite."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if detects:
        loss = sum(model(list(images), [_target(image) for image in images]).values())
    else:
        labels = torch.randint(0, 21, (len(images), *images.shape[-2:]))
        outputs = model(images).values()
        loss = sum(nn.functional.cross_entropy(output, labels) for output in outputs)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    if not loss.isfinite():
        raise RuntimeError(f"a loss of {float(loss)} in the training step")
    return float(loss)


def _target(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """One box in the middle of an image, with a mask and keypoints."""
    height, width = image.shape[-2:]
    box = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    keypoints = torch.tensor([width / 2, height / 2, 1.0]).repeat(1, 17, 1)
    return {"boxes": box, "labels": torch.ones(1).long(), "masks": mask, "keypoints": keypoints}


def survey_dense(targets: list[str], out: Path, pattern: str, seconds: int) -> None:
    """Append one line per detection or segmentation model and target to ``out``."""
    done = {(r["model"], r["target"]) for r in read(out)}
    signal.signal(signal.SIGALRM, _too_long)
    for name, build in dense_models():
        for target in targets:
            if pattern in name and (name, target) not in done:
                _append(out, _within(seconds, prove_dense, name, build, target))


def survey(targets: list[str], out: Path, pattern: str, seconds: int) -> None:
    """Append one line per architecture and target to ``out``."""
    done = {(r["model"], r["target"]) for r in read(out)}
    signal.signal(signal.SIGALRM, _too_long)
    for name, build in itertools.chain(torchvision_models(), timm_models()):
        if pattern not in name:
            continue
        for target in targets:
            if (name, target) in done:
                continue
            if _hopeless(out, name):
                break
            row = _within(seconds, prove, name, build, target)
            _append(out, row)
            if not row["passed"] and (name, "bn") not in done:
                done.add((name, "bn"))  # is it torch's exporter that cannot, or the swap?
                _append(out, _within(seconds, prove, name, build, "bn"))


def _hopeless(out: Path, name: str) -> bool:
    """Whether torch's exporter has failed on the model with BatchNorm too."""
    rows = read(out)
    return any((r["model"], r["target"], r["passed"]) == (name, "bn", False) for r in rows)


def _within(
    seconds: int, proven: Callable[..., dict[str, Any]], name: str, build: Build, target: str
) -> dict[str, Any]:
    signal.alarm(seconds)
    try:
        return proven(name, build, target)
    finally:
        signal.alarm(0)


def _append(out: Path, row: dict[str, Any]) -> None:
    append(out, row)
    print(json.dumps(row), file=sys.stderr)


class _TooLong(BaseException):
    """No ``Exception``: whoever catches everything on the way must let it through."""


def _too_long(*_: Any) -> None:
    raise _TooLong("took too long")


def report(path: Path) -> None:
    """The table, in Markdown; of a dense survey with what was replaced and the loss of the step."""
    rows = read(path)
    dense = any("replaced" in row for row in rows)
    extra = " replaced | loss |" if dense else ""
    print(f"| model | size | target |{extra} verdict | error | torch fp32 | top-1 | cases | s |")
    print(
        f"| --- | ---: | --- |{' ---: | ---: |' * dense} --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for row in rows:
        more = f" {row.get('replaced', '')} | {row.get('loss', '')} |" if dense else ""
        print(
            f"| {row['model']} | {row.get('size', '')} | {row['target']} |{more} {_verdict(row)} | "
            f"{_numbers(row)} | {row['seconds']} |"
        )
    good = sum(row["passed"] for row in rows)
    print(f"\n{good} of {len(rows)} exports passed their proof.")


def _numbers(row: dict[str, Any]) -> str:
    if "error" not in row:
        return " | | | "
    return f"{row['error']:.1e} | {row['torch']:.1e} | {row['top1']:.4f} | {row['cases']}"


def _verdict(row: dict[str, Any]) -> str:
    verdict: str = row.get("problem", "passed").replace("|", "/").replace("\n", " ")
    notes = row.get("notes", ())
    staged = any("in stages" in note for note in notes)
    moved = any("at the model's own score threshold" in note for note in notes)
    return verdict + ", means in stages" * staged + ", at a moved threshold alone" * moved


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", nargs="+", default=["gn", "frn", "brn", "cbn"])
    parser.add_argument("--out", type=Path, help="default: onnx_zoo.jsonl beside this file")
    parser.add_argument("--dense", action="store_true", help="detection and segmentation models")
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--seconds", type=int, default=900, help="limit of one export")
    parser.add_argument("--report", type=Path, help="print the table of a finished run")
    options = parser.parse_args()
    if options.report:
        report(options.report)
        return
    warnings.simplefilter("ignore")
    name = "onnx_zoo_dense.jsonl" if options.dense else "onnx_zoo.jsonl"
    run = survey_dense if options.dense else survey
    run(options.to, options.out or Path(__file__).with_name(name), options.only, options.seconds)


if __name__ == "__main__":
    main()
