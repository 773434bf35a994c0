"""Run a model once under the recorder and turn the trace into sites.

The model runs on the meta device where it can (no arithmetic, no memory), else on its own. It runs
in eval mode, and where its code depends on the mode once more in training mode, because auxiliary
heads run only there and because a call that may be removed has to mean the same in both. The model
comes back exactly as it was.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normswap.errors import WalkError
from normswap.graph import norms
from normswap.graph.meta import put_on_meta
from normswap.graph.modes import any_depends_on_mode, class_depends_on_mode
from normswap.graph.preserved import preserved
from normswap.graph.recorder import Call, Trace, recording
from normswap.graph.sites import Activation, CallSite, Graph, Producer, Removal, Site
from normswap.graph.vocabulary import ACTIVATION_FUNCTIONS, PRODUCER_OPS, activation_module_op

_WRAPPERS = {
    "DistributedDataParallel": "convert the module inside it before wrapping it",
    "FullyShardedDataParallel": "convert the model before sharding it",
    "DataParallel": "convert the module inside it (model.module)",
    "OptimizedModule": "convert the original model, then torch.compile the result",
    "ScriptModule": "convert the Python model, then script the result",
    "RecursiveScriptModule": "convert the Python model, then script the result",
    "GraphModuleImpl": "convert the eager model before tracing it",
}


_Names = dict[nn.Module, tuple[str, ...]]

_NO_TRAINING = "the model did not run in training mode on these inputs"
_USED_APART = "its tensors are used by a batch_norm call outside of the module"


@dataclass(frozen=True)
class _Run:
    mode: str
    device: str
    trace: Trace


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` on example inputs.

    Args:
        model: any module.
        example_inputs: a tuple holds the positional arguments, a dict the keyword arguments;
            anything else (a tensor, a list of images) is the one argument.
    """
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    return model(example_inputs)


def matches(names: Iterable[str], patterns: str | Sequence[str] | None) -> bool:
    """Whether any name matches any shell-style pattern (``layer1.*``), or is one of them."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns or ())
    return any(name == p or fnmatchcase(name, p) for name in names for p in wanted)


def walk(
    model: nn.Module, example_inputs: Any, *, exclude: str | Sequence[str] | None = None
) -> Graph:
    """Find every BatchNorm of a model, what feeds it and what consumes it.

    Read-only: modes, hooks, attributes, buffers and RNG state are as before, also after an
    exception.

    Args:
        model: any module, also on the meta device.
        example_inputs: what the model is called with; see :func:`call`.
        exclude: name patterns of BatchNorm modules to pass over, of unknown classes for example.

    Returns:
        Graph: its sites in the order in which they first ran.

    Raises:
        WalkError: if the model does not run on the inputs, is wrapped or compiled, or holds a
            BatchNorm of a class whose computation is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> site = walk(net, torch.zeros(1, 3, 8, 8)).sites[0]
        >>> site.name, site.producer.name, site.activation.op, site.spatial
        ('1', '0', 'relu', (6, 6))
    """
    refuse_wrapped(model)
    names = qualified_names(model)
    found = _batchnorms(names, exclude)
    if not found:
        return Graph(())
    runs = _runs(model, example_inputs, names, found)
    silent = any(all(module not in run.trace.by_module for run in runs) for module in found)
    notes = [_NO_TRAINING] if silent and len(runs) == 1 else []
    sites = _Reader(model, names, found, runs).sites()
    return Graph(tuple(sites), runs[0].device, tuple(notes))


def qualified_names(model: nn.Module) -> _Names:
    """Every name of every module; a module registered twice has two."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return {module: tuple(found) for module, found in names.items()}


def batchnorms(
    model: nn.Module, *, exclude: str | Sequence[str] | None = None
) -> dict[nn.Module, tuple[str, ...]]:
    """Every BatchNorm module of ``model`` with all its names.

    Raises:
        WalkError: for a BatchNorm of unknown class that ``exclude`` does not name.
    """
    return _batchnorms(qualified_names(model), exclude)


def _batchnorms(names: _Names, exclude: str | Sequence[str] | None) -> _Names:
    found = {m: n for m, n in names.items() if norms.is_batchnorm(m) and not matches(n, exclude)}
    for module, own_names in found.items():
        norms.check_known(module, own_names[0])
    return found


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if the model, or a part of it, is wrapped in a way that hides its modules.

    Raises:
        WalkError: with the advice that fits the wrapper.
    """
    for name, module in model.named_modules():
        cls: Any = type(module)
        wrapper = _wrapper(cls)
        if wrapper is not None:
            kind = cls.__name__
            raise WalkError(
                name or "the model",
                got=f"a {wrapper}" + ("" if kind == wrapper else f" ({kind})"),
                need="a plain eager module",
                hint=f"to {_WRAPPERS[wrapper]}",
            )


@functools.cache
def _wrapper(cls: type[nn.Module]) -> str | None:
    known = (c for c in cls.__mro__ if c.__name__ in _WRAPPERS and c.__module__.startswith("torch"))
    return next((c.__name__ for c in known), None)


def _runs(model: nn.Module, example_inputs: Any, names: _Names, found: _Names) -> list[_Run]:
    """The eval run, and the training run where it can show anything else."""
    eval_run = _eval_run(model, example_inputs, names)
    seen = eval_run.trace.by_module
    if all(module in seen for module in found) and not any_depends_on_mode(names):
        return [eval_run]
    training_run = _training_run(model, example_inputs, names, meta=eval_run.device == "meta")
    return [eval_run] if training_run is None else [eval_run, training_run]


def _eval_run(model: nn.Module, example_inputs: Any, names: _Names) -> _Run:
    try:
        return _run(model, example_inputs, names, mode="eval", meta=True)
    except Exception as error:
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise _cannot_run(error) from error
    try:
        return _run(model, example_inputs, names, mode="eval", meta=False)
    except Exception as error:
        raise _cannot_run(error) from error


def _training_run(
    model: nn.Module, example_inputs: Any, names: _Names, *, meta: bool
) -> _Run | None:
    """Run in training mode; BN refuses one element per channel there, so try a doubled batch."""
    doubled = tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if _batched(leaf) else leaf, example_inputs
    )
    for inputs in (example_inputs, doubled):
        try:
            return _run(model, inputs, names, mode="train", meta=meta)
        except Exception:  # noqa: BLE001 - the eval run is what counts; sites say what ran
            continue
    return None


def _batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 1


def _cannot_run(error: Exception) -> WalkError:
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    return WalkError(
        "example inputs",
        got=f"{type(error).__name__}: {first_line}",
        need="inputs that the model can be called with in eval mode",
        hint="a tensor of the model's input size, a tuple of positional arguments, or a dict of "
        "keyword arguments, in the model's dtype",
    )


def _run(model: nn.Module, example_inputs: Any, names: _Names, *, mode: str, meta: bool) -> _Run:
    first_names = {module: found[0] for module, found in names.items()}
    device = torch.device("meta") if meta else _device_of(model)
    inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, example_inputs)
    with preserved(list(names), values=not meta), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model has to say, it says when it is used
        if any(module.training != (mode == "train") for module in names):
            model.train(mode == "train")
        if meta:
            put_on_meta(names)
        with recording(first_names, meta=meta) as recorder:
            output = call(model, inputs)
            recorder.output(output)
    return _Run(mode, device.type, recorder.trace)


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


class _Reader:
    """Turns traces into sites."""

    def __init__(self, model: nn.Module, names: _Names, found: _Names, runs: list[_Run]) -> None:
        self._found = found
        self._runs = runs
        self._names = {module: found_names[0] for module, found_names in names.items()}
        complete = len(runs) > 1 or not any_depends_on_mode(names)
        self._relus = _ReluCalls(model, runs, names, complete)

    def sites(self) -> list[Site]:
        sites: dict[nn.Module, Site] = {}
        for run in self._runs:
            for module, calls in run.trace.by_module.items():
                if module in self._found and module not in sites:
                    sites[module] = self._site(module, run, calls)
        for module in self._found:
            if module not in sites:
                sites[module] = self._silent_site(module)
        return self._with_shared_producers(list(sites.values()))

    def _blank(self, module: nn.Module) -> Site:
        state = norms.state_of(module)
        return Site(
            names=self._found[module],
            kind=type(module).__name__,
            channels=state.channels,
            rank=norms.spatial_rank_of(module),
            dtype=str(norms.dtype_of(module)),
            affine=state.weight is not None,
            tracked=state.mean is not None and state.var is not None,
        )

    def _silent_site(self, module: nn.Module) -> Site:
        site = self._blank(module)
        fused = self._fused(module)
        stray = any(module in run.trace.stray_norms for run in self._runs)
        note = _USED_APART if stray else "never ran, in eval or in training mode"
        return replace(
            site, calls=0, mode=None, no_producer="never ran", activation=fused, notes=(note,)
        )

    def _site(self, module: nn.Module, run: _Run, calls: list[Call]) -> Site:
        shapes = [c.shape for c in calls]
        spatial = min((s[2:] for s in shapes), key=lambda s: torch.Size(s).numel())
        producers = {
            self._producer(call, other.trace)
            for other in self._runs
            for call in other.trace.by_module.get(module, ())
        }
        producer, reason = producers.pop() if len(producers) == 1 else (None, "calls disagree")
        if module in run.trace.stray_norms:
            producer, reason = None, _USED_APART
        elif producer is not None and module._forward_pre_hooks:
            producer, reason = None, "a hook of the BatchNorm may change its input"
        notes = [] if run.mode == "eval" else ["ran in training mode only"]
        notes += [_USED_APART] if module in run.trace.stray_norms else []
        return replace(
            self._blank(module),
            rank=len(spatial),
            calls=len(calls),
            mode=run.mode,
            spatial=spatial,
            producer=producer,
            no_producer=reason,
            activation=self._activation(module, run, calls),
            notes=tuple(notes),
        )

    # producers ---------------------------------------------------------------------------------

    def _producer(self, norm: Call, trace: Trace) -> tuple[Producer | None, str | None]:
        if not norm.inputs:
            return None, "unknown input"
        axis: int | None = 1
        maker = trace.made.get(norm.inputs[0])
        while maker is not None and maker.view is not None and axis is not None:
            axis = maker.view.source_axis(axis)
            maker = trace.made.get(maker.inputs[0])
        if maker is None:
            return None, "input"
        if maker.op not in PRODUCER_OPS:
            return None, maker.op
        if axis is None or axis != _channel_axis(maker):
            return None, "a view that does not keep the channel axis"
        if maker.module is None:
            return None, f"{maker.op} with a computed weight"
        calls = len(trace.by_module[maker.module])
        kind = type(maker.module).__name__
        name = self._names[maker.module]
        return Producer(name, maker.op, kind, calls, plain=maker.own_weight), None

    @staticmethod
    def _with_shared_producers(sites: list[Site]) -> list[Site]:
        counts = Counter(site.producer.name for site in sites if site.producer)
        return [
            replace(site, producer=replace(site.producer, shared=True))
            if site.producer and counts[site.producer.name] > 1
            else site
            for site in sites
        ]

    # activations -------------------------------------------------------------------------------

    def _fused(self, module: nn.Module) -> Activation | None:
        parts = norms.fused_parts(module)
        if parts is None or isinstance(parts[1], nn.Identity):
            return None
        act = parts[1]
        op = activation_module_op(act) or type(act).__name__.lower()
        removals = (Removal("absorb"),) if op == "relu" else ()
        return Activation(op, self._names.get(act), fused=True, removals=removals)

    def _activation(self, module: nn.Module, run: _Run, calls: list[Call]) -> Activation | None:
        fused = self._fused(module)
        if fused is not None:
            return fused
        users = [run.trace.used.get(c.output or 0, []) for c in calls]
        if any(len(u) != 1 for u in users):
            return None
        found = list(dict.fromkeys(self._activation_of(u[0], run.trace) for u in users))
        first = found[0]
        if first is None or any(
            a is None or (a.op, a.name) != (first.op, first.name) for a in found
        ):
            return None
        if len(found) > 1:
            apart = Removal("call", obstacle="it is called in several places")
            return replace(first, removals=(apart,) if first.op == "relu" else ())
        return first

    def _activation_of(self, user: Call, trace: Trace) -> Activation | None:
        if user.module is None:
            op = user.op if user.op in ACTIVATION_FUNCTIONS else None
            return Activation(op, None, removals=self._relus.removals(user)) if op else None
        op = activation_module_op(user.module)
        if op is None:
            return None
        uses = len(trace.by_module[user.module])
        name = user.slot or self._names[user.module]
        return Activation(op, name, uses=uses, removals=self._relus.removals(user))


class _ReluCalls:
    """Every ReLU that ran, in all runs, by the ways in which it could be taken out."""

    def __init__(
        self,
        model: nn.Module,
        runs: list[_Run],
        names: _Names,
        complete: bool,
    ) -> None:
        self._model = model
        self._names = names
        self._complete = complete
        self._sources: dict[Any, dict[str, None]] = defaultdict(dict)
        for run in runs:
            for call in run.trace.calls:
                if call.op == "relu":
                    source = self._source(call, run.trace)
                    for key in (call.module, call.slot, _place(call.site)):
                        self._sources[key].setdefault(source)

    def _source(self, relu: Call, trace: Trace) -> str:
        """Name of the BN that alone feeds ``relu``, else ``?`` and what does."""
        maker = trace.made.get(relu.inputs[0]) if relu.inputs else None
        if maker is None or maker.op != "batch_norm" or maker.module is None:
            return "?" + (maker.op if maker else "an input")
        alone = len(trace.used[relu.inputs[0]]) == 1 and maker.module not in trace.stray_norms
        return self._names[maker.module][0] if alone else "?a BN output that has other uses"

    def removals(self, relu: Call) -> tuple[Removal, ...]:
        if relu.op != "relu":
            return ()
        found = []
        if relu.module is not None:
            names = self._names[relu.module]
            found.append(self._removal("module", relu.module, names))
            if relu.slot is not None and len(names) > 1:
                found.append(self._removal("slot", relu.slot, (relu.slot,)))
        if relu.site is not None:
            removal = self._removal("call", _place(relu.site), ())
            obstacle = relu.site.obstacle or removal.obstacle
            if obstacle is None and relu.site.moody and not self._complete:
                obstacle = f"{relu.site.method} depends on the mode and did not run in training"
            found.append(replace(removal, call=relu.site, obstacle=obstacle))
        if relu.module is not None and _has_hooks(relu.module):
            return tuple(replace(r, obstacle="the ReLU carries hooks") for r in found)
        return tuple(found)

    def _removal(self, how: str, key: Any, names: tuple[str, ...]) -> Removal:
        sources = tuple(self._sources[key])
        others = [source[1:] for source in sources if source.startswith("?")]
        feeders = tuple(s for s in sources if not s.startswith("?"))
        obstacle = f"it is also applied to {others[0]}" if others else None
        if obstacle is None and not self._complete:
            blocks = {name.rpartition(".")[0] for name in feeders}
            classes: set[Any] = {type(self._model.get_submodule(block)) for block in blocks}
            if any(class_depends_on_mode(cls) for cls in classes):
                obstacle = "its block depends on the mode, and the model did not run in training"
        return Removal(how, names, feeders, obstacle)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def _place(site: CallSite | None) -> tuple[Any, ...] | None:
    return (site.owner, site.method, site.position) if site is not None else None


def _channel_axis(maker: Call) -> int:
    if maker.op == "linear":
        return len(maker.output_shape) - 1
    return len(maker.output_shape) - 1 - int(maker.op[-2])
