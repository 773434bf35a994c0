"""Turn the traces of a model's runs into sites: producers, activations, ways to take them out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph import norms
from normswap.graph.modes import any_depends_on_mode, class_depends_on_mode
from normswap.graph.sites import Activation, CallSite, Other, Producer, Removal, Site
from normswap.graph.trace import Call, Trace
from normswap.graph.vocabulary import (
    ACTIVATION_FUNCTIONS,
    PRODUCER_OPS,
    REPLACEABLE,
    activation_module_op,
    replaceable_op,
)

Names = dict[nn.Module, tuple[str, ...]]
"""Every name of every module."""

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_USED_APART = "its tensors are used by a batch_norm call outside of the module"


@dataclass(frozen=True)
class Forward:
    """One forward of the model under the recorder.

    Attributes:
        mode: ``eval`` or ``train``.
        device: where it ran.
        trace: what it did.
    """

    mode: str
    device: str
    trace: Trace


def read_sites(model: nn.Module, names: Names, found: Names, runs: Sequence[Forward]) -> list[Site]:
    """One site per BatchNorm, in the order in which they first ran; the silent ones last.

    Args:
        model: the model that ran.
        names: names of all its modules.
        found: names of its BatchNorms.
        runs: in eval mode, and in training mode where that could show anything else.
    """
    return _Reader(model, names, found, runs).sites()


def read_others(runs: Sequence[Forward]) -> tuple[Other, ...]:
    """What normalises activations in any run and is no BatchNorm of the model, each once."""
    found: dict[str, Other] = {}
    for run in runs:
        for other in run.trace.others.values():
            found.setdefault(other.name, other)
    return tuple(found.values())


class _Reader:
    """Turns traces into sites."""

    def __init__(
        self, model: nn.Module, names: Names, found: Names, runs: Sequence[Forward]
    ) -> None:
        self._found = found
        self._affine = {module: _affine(module) for module in found}
        self._holders: dict[int, list[str]] = defaultdict(list)
        for module, found_names in found.items():
            for tensor in self._affine[module].values():
                self._holders[id(tensor)].append(found_names[0])
        self._runs = runs
        self._names = {module: found_names[0] for module, found_names in names.items()}
        complete = len(runs) > 1 or not any_depends_on_mode(names)
        self._taken = _ActivationCalls(model, runs, names, complete)

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
            affine=state.weight is not None and state.bias is not None,
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

    def _site(self, module: nn.Module, run: Forward, calls: list[Call]) -> Site:
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
        notes += self._tied(module)
        if any(vars(module).get(name) for name in _STATE_HOOKS):
            notes.append("its state-dict hooks stay behind with it")
        return replace(
            self._blank(module),
            rank=len(spatial),
            calls=len(calls),
            mode=run.mode,
            spatial=spatial,
            mixed=len({len(shape) for shape in shapes}) > 1,
            producer=producer,
            no_producer=reason,
            activation=self._activation(module, run, calls),
            notes=tuple(notes),
        )

    def _tied(self, module: nn.Module) -> list[str]:
        """A note for each of γ and β that other BatchNorms hold too."""
        notes = []
        for letter, tensor in self._affine[module].items():
            others = [name for name in self._holders[id(tensor)] if name != self._names[module]]
            if others:
                notes.append(
                    f"its {letter} is also that of {', '.join(others)}: per-sample targets give "
                    "each its own"
                )
        return notes

    # producers ---------------------------------------------------------------------------------

    def _producer(self, norm: Call, trace: Trace) -> tuple[Producer | None, str | None]:
        if not norm.inputs:
            return None, "unknown input"
        axis: int | None = 1
        value = norm.inputs[0]
        maker, alone = trace.made.get(value), len(trace.used[value]) == 1
        while maker is not None and maker.view is not None and axis is not None:
            axis, value = maker.view.source_axis(axis), maker.inputs[0]
            maker, alone = trace.made.get(value), alone and len(trace.used[value]) == 1
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
        around = any(part is norm.module for part in maker.module.modules())
        plain = maker.own_weight
        return Producer(name, maker.op, kind, calls, plain=plain, around=around, alone=alone), None

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
        ways = (Removal("absorb", op=op),) if replaceable_op(act) == op else ()
        return Activation(op, self._names.get(act), fused=True, ways=ways)

    def _activation(self, module: nn.Module, run: Forward, calls: list[Call]) -> Activation | None:
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
            apart = Removal("call", obstacle="it is called in several places", op=first.op)
            return replace(first, ways=(apart,) if first.op in REPLACEABLE else ())
        return first

    def _activation_of(self, user: Call, trace: Trace) -> Activation | None:
        if user.module is None:
            op = user.op if user.op in ACTIVATION_FUNCTIONS else None
            return Activation(op, None, ways=self._taken.ways(user)) if op else None
        op = user.op
        if op in PRODUCER_OPS or op == "batch_norm":
            return None
        uses = len(trace.by_module[user.module])
        name = user.slot or self._names[user.module]
        return Activation(op, name, uses=uses, ways=self._taken.ways(user))


def _affine(module: nn.Module) -> dict[str, Tensor]:
    """γ and β, as far as a BatchNorm has them."""
    state = norms.state_of(module)
    pairs = (("γ", state.weight), ("β", state.bias))
    return {letter: tensor for letter, tensor in pairs if tensor is not None}


class _ActivationCalls:
    """Every replaceable activation that ran, in all runs, by the ways to take it out."""

    def __init__(
        self,
        model: nn.Module,
        runs: Sequence[Forward],
        names: Names,
        complete: bool,
    ) -> None:
        self._model = model
        self._names = names
        self._complete = complete
        self._sources: dict[Any, dict[str, None]] = defaultdict(dict)
        for run in runs:
            for call in run.trace.calls:
                if call.op in REPLACEABLE:
                    source = self._source(call, run.trace)
                    for key in (call.module, call.slot, _place(call.site)):
                        self._sources[key].setdefault(source)

    def _source(self, call: Call, trace: Trace) -> str:
        """Name of the BN that alone feeds ``call``, else ``?`` and what does."""
        maker = trace.made.get(call.inputs[0]) if call.inputs else None
        if maker is None or maker.op != "batch_norm" or maker.module is None:
            return "?" + (maker.op if maker else "an input")
        alone = len(trace.used[call.inputs[0]]) == 1 and maker.module not in trace.stray_norms
        return self._names[maker.module][0] if alone else "?a BN output that has other uses"

    def ways(self, call: Call) -> tuple[Removal, ...]:
        if call.op not in REPLACEABLE:
            return ()
        if call.module is not None and replaceable_op(call.module) != call.op:
            return ()
        found = []
        if call.module is not None:
            names = self._names[call.module]
            found.append(self._removal("module", call.module, names))
            if call.slot is not None and len(names) > 1:
                found.append(self._removal("slot", call.slot, (call.slot,)))
        if call.site is not None:
            removal = self._removal("call", _place(call.site), ())
            obstacle = call.site.obstacle or removal.obstacle
            if obstacle is None and call.site.moody and not self._complete:
                obstacle = f"{call.site.method} depends on the mode and did not run in training"
            found.append(replace(removal, call=call.site, obstacle=obstacle))
        if call.module is not None and _has_hooks(call.module):
            obstacle = f"the {REPLACEABLE[call.op]} carries hooks"
            found = [replace(r, obstacle=obstacle) for r in found]
        return tuple(replace(r, op=call.op) for r in found)

    def _removal(self, how: str, key: Any, names: tuple[str, ...]) -> Removal:
        sources = tuple(self._sources[key])
        others = [source[1:] for source in sources if source.startswith("?")]
        feeders = tuple(s for s in sources if not s.startswith("?"))
        obstacle = f"it is also applied to {others[0]}" if others else None
        if obstacle is None and not self._complete:
            blocks = {name.rpartition(".")[0] for name in feeders}
            classes = {type(self._model.get_submodule(block)) for block in blocks}
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
