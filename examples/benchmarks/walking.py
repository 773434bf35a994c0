"""What finding the BatchNorms costs beside building the model and beside one plain forward.

    python examples/benchmarks/walking.py                   # one architecture per family
    python examples/benchmarks/walking.py resnet152 densenet121 fasterrcnn_resnet50_fpn_v2

One process, one thread, the three in turn, medians of five rounds. A walk has to run the model once
(twice where its code depends on the mode), on the meta device where it can: ``forward`` is that run
without any recording, so it says how much of the walk is torch's own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from onnx_zoo import timm_models, torchvision_models
from torch import nn

import normswap


def named(name: str) -> Callable[[], nn.Module]:
    """How to build an architecture of timm or, where timm has none, of torchvision."""
    if timm.is_model(name):
        return lambda: timm.create_model(name)
    parts = {"weights": None}
    if any(part in name for part in ("rcnn", "retinanet", "ssd", "fcos", "deeplab", "fcn")):
        parts["weights_backbone"] = None
    return lambda: torchvision.models.get_model(name, **parts)


def inputs_for(model: nn.Module) -> Any:
    """The smallest usual image that the model takes."""
    if hasattr(model, "transform") and hasattr(model, "backbone"):  # a torchvision detector
        return [torch.rand(3, 224, 224)]
    for shape in ((1, 3, 224, 224), (1, 3, 256, 256), (1, 3, 384, 384), (1, 3, 8, 112, 112)):
        try:
            with torch.device("meta"), torch.no_grad():
                copy.deepcopy(model).to("meta").eval()(torch.empty(shape))
        except Exception:  # noqa: BLE001 - the next size may do
            continue
        return torch.zeros(shape)
    raise RuntimeError("no usual image size fits")


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(build: Callable[[], nn.Module], rounds: int) -> tuple[int, str, dict[str, float]]:
    """Number of BatchNorms, device of the walk, and median seconds."""
    model = build().eval()
    inputs = inputs_for(model)
    graph = normswap.walk(model, inputs)
    twin = copy.deepcopy(model).to(graph.device)
    given = inputs.to(graph.device) if isinstance(inputs, torch.Tensor) else inputs
    times: dict[str, list[float]] = {"build": [], "forward": [], "walk": []}
    for _ in range(rounds):
        times["build"].append(seconds(build))
        with torch.no_grad():
            times["forward"].append(seconds(lambda: normswap.graph.call(twin, given)))
        times["walk"].append(seconds(lambda: normswap.walk(model, inputs)))
    return len(graph), graph.device, {what: statistics.median(t) for what, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    models = [(name, named(name)) for name in options.models]
    ratios = []
    print("| model | BatchNorms | device | build ms | forward ms | walk ms | walk / build |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name, build in models or [*torchvision_models(), *timm_models()]:
        try:
            count, device, times = measure(build, options.rounds)
        except Exception as error:  # noqa: BLE001 - a table of all that can be measured
            print(f"| {name} | {type(error).__name__}: {str(error)[:60]} | | | | | |", flush=True)
            continue
        ratios.append(times["walk"] / times["build"])
        figures = " | ".join(f"{times[what] * 1e3:.1f}" for what in ("build", "forward", "walk"))
        print(f"| {name} | {count} | {device} | {figures} | {ratios[-1]:.2f} |", flush=True)
    below = sum(ratio < 1 for ratio in ratios)
    print(f"\n{below} of {len(ratios)} below 1, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
