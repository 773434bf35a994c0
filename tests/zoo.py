"""Every architecture of timm and torchvision through walk, plan and swap; and a table of it all."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import normswap
from normswap import sources
from normswap.graph import norms
from normswap.graph.meta import without_autocast
from normswap.graph.recorder import recording
from normswap.targets import TARGETS


def architectures() -> list[str]:
    """Specs of everything that timm and torchvision can build without a download."""
    return sources.list_models()


def families() -> dict[str, list[str]]:
    """Specs by timm module or torchvision family (name of the Python module)."""
    import timm
    from torchvision.models._api import BUILTIN_MODELS

    grouped: dict[str, list[str]] = defaultdict(list)
    for module in timm.list_modules():
        grouped[f"timm.{module}"] = [f"timm/{n}" for n in timm.list_models(module=module)]
    for name, builder in BUILTIN_MODELS.items():
        home = builder.__module__.removeprefix("torchvision.models.")
        grouped[f"torchvision.{home}"].append(f"torchvision/{name}")
    return {family: sorted(found, key=lambda n: (len(n), n)) for family, found in grouped.items()}


def representatives() -> dict[str, str]:
    """The family's architecture with the shortest name, for each family."""
    return {family: found[0] for family, found in families().items() if found}


def build(spec, *, meta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if meta:
            try:
                with torch.device("meta"):
                    source = sources.build(spec, pretrained=False)
            except Exception:  # noqa: BLE001 - some constructors compute with values
                source = None
            # a detector decides by its values how many boxes there are
            if source is not None and source.task != "detection":
                return source
        return shrunk(sources.build(spec, pretrained=False))


def shrunk(source):
    """Detectors scale every image up to 800 pixels; a fifth of that shows as much."""
    transform = getattr(source.model, "transform", None)
    if source.task == "detection" and hasattr(transform, "min_size"):
        transform.min_size, transform.max_size = (160,), 256
    return source


def inputs_for(source, model):
    inputs = source.example_inputs(batch_size=1)
    if any(p.is_meta for p in model.parameters()):
        return tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, inputs)
    return inputs


def trace_of(model, inputs):
    """Activations and dropouts that run in one forward, and the output's shapes."""
    with (
        recording({m: n for n, m in model.named_modules()}) as recorder,
        torch.no_grad(),
        without_autocast(),  # which older releases of timm ask for on the meta device
    ):
        output = normswap.graph.call(model.eval(), inputs)
    # a BN is one call to the recorder; what is fused into it is counted by hand
    ran = [c.module for c in recorder.trace.calls if c.op == "batch_norm" and c.module]
    fused = [norms.fused_parts(m)[1] for m in ran if norms.fused_parts(m)]
    ops = Counter(type(a).__name__ for a in fused if not isinstance(a, nn.Identity))
    ops.update(
        type(c.module).__name__
        for c in recorder.trace.calls
        if c.module is not None and c.op in normswap.graph.vocabulary.ACTIVATION_FUNCTIONS
    )
    ops.update(
        c.op
        for c in recorder.trace.calls
        if c.module is None and c.op in normswap.graph.vocabulary.ACTIVATION_FUNCTIONS
    )
    ops["dropout"] = sum("dropout" in c.op for c in recorder.trace.calls)
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    # how many boxes a detector finds is a matter of its values
    boxes = isinstance(output, list) and output and isinstance(output[0], dict)
    return ops, [t.ndim if boxes else tuple(t.shape) for t in tensors]


def survey(spec, *, every_target=False):
    """Walk, plan for every target, apply GN (or every target); raise if anything is lost."""
    start = time.perf_counter()
    source = build(spec, meta=True)
    model, inputs = source.model, inputs_for(source, source.model)
    found = {m for m in model.modules() if norms.is_batchnorm(m)}
    row = {"architecture": spec, "bn_layers": len(found)}
    if not found:
        return row
    graph = normswap.walk(model, inputs)
    assert len(graph) == len(found), f"{spec}: {len(graph)} sites, {len(found)} BatchNorm modules"
    row["device"] = graph.device
    row["never_ran"] = sum(site.calls == 0 for site in graph)
    row["producers"] = sum(site.producer is not None for site in graph)
    row["no_producer"] = dict(Counter(s.no_producer for s in graph if s.no_producer))
    row["activations"] = dict(Counter(s.activation.op for s in graph if s.activation))
    row["fused"] = sum(bool(s.activation and s.activation.fused) for s in graph)
    row["converted"], row["reasons"] = {}, {}
    for target in TARGETS:
        plan = normswap.plan(model, target, graph=graph)
        row["converted"][target] = plan.counts().get(target, 0)
        reasons = Counter(e.reason.split(": ", 1)[-1] for e in plan if e.reason)
        row["reasons"][target] = dict(reasons)
        assert all(e.becomes == target or e.reason for e in plan)
        if target == "frn":
            row["tlus"] = sum(e.removal is not None for e in plan)
    for target in TARGETS if every_target else ("gn",):
        apply_and_compare(spec, model, inputs, target, graph)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


# the activations whose place a target takes, and what it computes in their place
TAKEN = {"frn": {"ReLU", "relu"}, "evonorm": {"ReLU", "relu", "SiLU", "silu"}}
OWN = {"frn": set(), "evonorm": {"sigmoid"}}


def apply_and_compare(spec, model, inputs, target, graph):
    """Nothing but the norms may change: keys, activations, dropouts, output shapes."""
    model = copy.deepcopy(model)
    sites = {n for n, m in model.named_modules(remove_duplicate=False) if norms.is_batchnorm(m)}
    prefixes = tuple(f"{name}." for name in sites)

    def others(m):
        return [k for k in m.state_dict() if not k.startswith(prefixes) or ".act." in k]

    keys, (acts, shapes) = others(model), trace_of(model, inputs)
    result = normswap.convert(model, normswap.plan(model, target, graph=graph))
    after, shapes_after = trace_of(result.model, inputs)
    assert shapes == shapes_after, f"{spec} {target}: {shapes} became {shapes_after}"
    assert [k for k in others(result.model) if not k.endswith("act.tau")] == keys
    if target in TAKEN:
        eval_taken = sum(
            1 for e in result.plan if e.removal and "training mode only" not in " ".join(e.notes)
        )
        lost, own = acts - after, after - acts
        assert lost.total() <= len(result.replaced), (spec, acts, after)
        assert bool(lost) == bool(eval_taken), (spec, acts, after)
        assert set(lost) <= TAKEN[target], (spec, acts, after)
        assert set(own) <= OWN[target], (spec, acts, after)
        assert own.total() <= len(result.replaced), (spec, acts, after)
    else:
        assert acts == after, f"{spec} {target}: {acts - after} lost, {after - acts} appeared"


def write_table(rows, folder):
    """``zoo.json`` with everything, ``zoo.md`` with a line per architecture and the totals."""
    folder = Path(folder)
    with_bn = [r for r in rows if r.get("bn_layers")]
    totals = {
        "architectures": len(rows),
        "with BatchNorm": len(with_bn),
        "BatchNorm layers": sum(r["bn_layers"] for r in with_bn),
        "fused with their activation": sum(r["fused"] for r in with_bn),
        "never run": sum(r["never_ran"] for r in with_bn),
        "with a producer": sum(r["producers"] for r in with_bn),
        "ReLUs a TLU replaces": sum(r["tlus"] for r in with_bn),
        "converted": {t: sum(r["converted"][t] for r in with_bn) for t in TARGETS},
        "seconds": round(sum(r["seconds"] for r in with_bn)),
    }
    packed = {"totals": totals, "rows": rows}
    (folder / "zoo.json").write_text(json.dumps(packed, separators=(",", ":")) + "\n")
    lines = ["# Every architecture", "", "One command makes this table: `pytest -m zoo`.", ""]
    lines += [f"- {name}: {value}" for name, value in totals.items()]
    lines += ["", "| architecture | BN | fused | never run | producers | TLUs | gn | frn | cbn |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for r in with_bn:
        done = r["converted"]
        cells = (r["architecture"], r["bn_layers"], r["fused"], r["never_ran"], r["producers"])
        cells += (r["tlus"], done["gn"], done["frn"], done["cbn"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (folder / "zoo.md").write_text("\n".join(lines) + "\n")
    return totals


EXACT = ("brn", "cbn", "naive-cbn", "frozen", "bn")


def outputs_of(model, inputs):
    """All floating-point tensors of the output, in one list."""
    with torch.no_grad():
        output = normswap.graph.call(model.eval(), inputs)
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def distance(outputs, references):
    """Largest difference over the largest reference; shapes have to agree."""
    worst = 0.0
    for output, reference in zip(outputs, references, strict=True):
        assert output.shape == reference.shape
        if reference.numel():
            scale = reference.abs().max().clamp_min(1e-30)
            worst = max(worst, float((output - reference).abs().max() / scale))
    return worst


def exactness(spec, *, dtype=torch.float32):
    """Errors of every exact target in eval mode, on real arithmetic and random statistics."""
    from traps import randomise

    torch.manual_seed(0)
    source = build(spec, meta=False)
    model = randomise(source.model).eval().to(dtype)
    inputs = tree_map(
        lambda t: t.to(dtype) if isinstance(t, torch.Tensor) else t, source.example_inputs()
    )
    if not any(norms.is_batchnorm(m) for m in model.modules()):
        return {}
    try:
        expected = outputs_of(model, inputs)
    except RuntimeError as error:
        # torchvision's RAFT builds float32 tensors on its way: its BN original fails in float64
        if "expected scalar type" not in str(error):
            raise
        return {}
    graph = normswap.walk(model, inputs)
    errors = {}
    for target in EXACT:
        plan = normswap.plan(model, target, graph=graph)
        twin = normswap.convert(copy.deepcopy(model), plan).model
        errors[target] = distance(outputs_of(twin, inputs), expected)
        if target == "frozen":
            back = normswap.convert(twin, normswap.plan(twin, "bn", example_inputs=inputs)).model
            outputs = outputs_of(back, inputs)
            same = all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
            errors["frozen→bn bits"] = 0.0 if same else 1.0
    frn = {}
    for tlu in ("auto", False):
        plan = normswap.plan(model, normswap.FilterResponseNorm(tlu=tlu), graph=graph)
        frn[tlu] = outputs_of(normswap.convert(copy.deepcopy(model), plan).model, inputs)
    errors["frn absorbed"] = distance(frn["auto"], frn[False])
    return errors
