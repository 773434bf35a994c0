"""Predicted and measured onnxruntime latency of each target beside BatchNorm, in one run.

    python examples/benchmarks/onnx_latency.py timm/resnet50 timm/mobilenetv2_100

Sessions take turns, so that a busy machine slows all of them alike. Measured: the median over the
rounds of the ratio to BatchNorm, and the ratio of the fastest runs. Predicted: the sum, over all
nodes, of the fastest time that onnxruntime's profiler saw for each, which noise can hardly touch.
Running statistics, affine values and thresholds are not fresh.

Two more rows bound what any form of a per-sample normaliser can reach, since it has to look at
every value of the convolution's output before it can scale the first one. Both are BatchNorm's file
with all of its fusions. ``one read``: plus a GlobalAveragePool of every convolution's output, which
is the cheapest pass that onnxruntime has (it stays in the blocked layout). ``read and scale``: plus
a depthwise 1×1 convolution with *constant* weights that takes over the ReLU, which is the cheapest
way to write the scaled output; a true normaliser's scale is no constant, and costs more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import nn

import normswap
from normswap.layers import ThresholdedLinearUnit


def export(spec: str, target: str, size: int, folder: Path) -> Path:
    """One proven file."""
    torch.manual_seed(0)
    source = normswap.load_model(spec, pretrained=False)
    model, x = source.model, torch.randn(2, 3, size, size)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if target != "bn":
        model = normswap.convert(model, target, example_inputs=x).model
    for module in model.modules():
        if getattr(module, "tau", None) is not None or isinstance(module, ThresholdedLinearUnit):
            nn.init.normal_(module.tau, 0.0, 0.05)  # a threshold of zero would become a ReLU
    path = folder / f"{target}.onnx"
    parity = normswap.export_onnx(model, path, example_inputs=x)
    print(f"{spec} {target}: {parity}", flush=True)
    return path


def bound(path: Path, out: Path, *, scale: bool) -> Path:
    """BatchNorm's file with the least that a per-sample normaliser adds to it."""
    proto = onnx.load(path)
    graph = proto.graph
    outputs = {value.name for value in graph.output}
    uses: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            uses[name].append(node)
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    pooled: list[str] = []
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "Conv" or node.output[0] in outputs:
            continue
        value, channels = node.output[0], weights[node.input[1]][0]
        if scale:
            node.output[0] = f"{value}_raw"
            ones = np.ones((channels, 1, 1, 1), np.float32)
            graph.initializer.append(numpy_helper.from_array(ones, f"{value}_ones"))
            nodes.append(
                helper.make_node("Conv", [f"{value}_raw", f"{value}_ones"], [value], group=channels)
            )
            source = node.output[0]
        else:
            followers = uses[value]
            alone = len(followers) == 1 and followers[0].op_type == "Relu"
            source = followers[0].output[0] if alone else value
        nodes.append(helper.make_node("GlobalAveragePool", [source], [f"{value}_pool"]))
        nodes.append(helper.make_node("Flatten", [f"{value}_pool"], [f"{value}_flat"]))
        pooled.append(f"{value}_flat")
    nodes.append(helper.make_node("Concat", pooled, ["pools"], axis=1))
    # the pools of a ReLU's output stand before the ReLU here: sort
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer} | {""}
    ordered = []
    while nodes:
        ready = [n for n in nodes if known.issuperset(n.input)]
        nodes = [n for n in nodes if not known.issuperset(n.input)]
        ordered += ready
        known.update(name for n in ready for name in n.output)
    del graph.node[:]
    graph.node.extend(ordered)
    graph.output.append(helper.make_tensor_value_info("pools", onnx.TensorProto.FLOAT, None))
    onnx.save(proto, out)
    return out


def session(path: Path, threads: int, profile: str | None = None) -> onnxruntime.InferenceSession:
    """A session with onnxruntime's default optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def predicted(path: Path, x: np.ndarray, threads: int, rounds: int) -> float:
    """Seconds: the sum of every node's fastest run."""
    with tempfile.TemporaryDirectory() as folder:
        running = session(path, threads, str(Path(folder) / "profile"))
        for _ in range(rounds):
            running.run(None, {running.get_inputs()[0].name: x})
        events = json.loads(Path(running.end_profiling()).read_text())
    nodes: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            nodes[event["name"]].append(event["dur"])
    return sum(min(times) for times in nodes.values()) / 1e6


def measured(paths: dict[str, Path], x: np.ndarray, threads: int, rounds: int) -> dict[str, list]:
    """Seconds of every round, the targets taking turns."""
    sessions = {target: session(path, threads) for target, path in paths.items()}
    times: dict[str, list[float]] = {target: [] for target in paths}
    for _ in range(rounds + 2):
        for target, running in sessions.items():
            started = time.perf_counter()
            running.run(None, {running.get_inputs()[0].name: x})
            times[target].append(time.perf_counter() - started)
    return {target: found[2:] for target, found in times.items()}  # two rounds warm up


def row(spec: str, options: argparse.Namespace) -> None:
    """The table of one architecture."""
    x = np.random.default_rng(0).standard_normal((1, 3, options.size, options.size))
    x = x.astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        targets = ["bn", *options.to]
        paths = {target: export(spec, target, options.size, Path(name)) for target in targets}
        for label, scale in (("one read", False), ("read and scale", True)):
            paths[label] = bound(paths["bn"], Path(name) / f"{label}.onnx", scale=scale)
        times = measured(paths, x, options.threads, options.rounds)
        nodes = {t: predicted(p, x, options.threads, options.rounds) for t, p in paths.items()}
    base = np.array(times["bn"])
    print(
        f"\n{spec}, batch 1 at {options.size}², {options.threads} thread(s), {os.cpu_count()} CPUs"
    )
    print("| target | predicted ms | predicted × BN | fastest ms | fastest × BN | median × BN |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for target in paths:
        found = np.array(times[target])
        print(
            f"| {target} | {nodes[target] * 1e3:.1f} | {nodes[target] / nodes['bn']:.3f} "
            f"| {found.min() * 1e3:.1f} | {found.min() / base.min():.3f} "
            f"| {np.median(found / base):.3f} |"
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--to", nargs="+", default=["gn", "frn", "brn", "cbn"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    for spec in options.models:
        row(spec, options)


if __name__ == "__main__":
    main()
