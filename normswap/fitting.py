"""Weights into a model: under which prefix, what is taken, what is left, what starts afresh.

People's files hold more and less than one model: an encoder of a larger network, a second encoder,
a loss, no head, a head of another size. What may differ is written down here; everything else is
an error that names what differs. Nothing is taken because most of it fits.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import CheckpointError, some
from normswap.reading import reading

logger = logging.getLogger("normswap")

# torchvision renames these while loading its own densenet files
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$"
)
_SHOWN = 3
_HEAD_SEED = 0
"""A fresh head is the same every time, so that the same original can be had again."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """What became of a weight file.

    Attributes:
        prefix: what was taken off its keys.
        taken: keys of the model that were filled from it.
        left: keys of the file that belong to something else.
        initialised: keys of the model that start afresh: those of its head.
    """

    prefix: str = ""
    taken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()

    def __str__(self) -> str:
        under = f" under {self.prefix}" if self.prefix else ""
        parts = [f"took {len(self.taken)} tensors{under}"]
        if self.left:
            parts.append(f"left {len(self.left)}: {some(self.left)}")
        if self.initialised:
            parts.append(f"a fresh head, {len(self.initialised)} tensors: {some(self.initialised)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Terms:
    """What a file may be short of.

    Attributes:
        where: the file, for error texts.
        head: gives the keys of the model's head; asked only where something does not fit.
        fresh: whether a head may start afresh.
        num_classes: of the model as built; used to recognise a head of another size.
    """

    where: str
    head: Callable[[], Collection[str]]
    fresh: bool
    num_classes: int | None
    cache: list[frozenset[str]] = field(default_factory=list)

    def head_keys(self) -> frozenset[str]:
        if not self.cache:
            self.cache.append(frozenset(self.head()))
        return self.cache[0]


def fit_checkpoint(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str = "checkpoint",
    num_classes: int | None = None,
    prefix: str | None = None,
    fresh_head: bool = False,
    head: Callable[[], Collection[str]] = tuple,
    adapt: Callable[[str, Tensor], Tensor] | None = None,
) -> Fit:
    """Load a state dict that must fit the model in every key and shape, its head apart.

    Args:
        model: changed in place.
        state: as ``load_checkpoint`` gives it.
        where: named in the error.
        num_classes: of the model as built; used to recognise a head of another size.
        prefix: under which the model stands in the file; None: found where exactly one fits.
        fresh_head: whether the head may be missing or of another size; it then starts afresh.
        head: gives the keys of the model's head.
        adapt: gives a tensor the shape that the model wants under a name, where it can.

    Returns:
        Fit: what was taken, left and initialised; it is logged too.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ; the text says which.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    terms = _Terms(where, head, fresh_head, num_classes)
    prefix, mine, left = _under_prefix(model, own, dict(state), prefix, terms)
    if adapt is not None:
        bent = {k: adapt(k, mine[k]) for k in own if k in mine and differs(own, mine, k)}
        mine = {**mine, **bent}
    differing = [name for name in own if name in mine and differs(own, mine, name)]
    missing = [n for n in own if n not in mine and not n.endswith("num_batches_tracked")]
    fresh: tuple[str, ...] = ()
    if differing or missing:
        fresh = _fresh(own, mine, differing, missing, terms)
        mine = {k: v for k, v in mine.items() if k not in fresh}
    extra = [name for name in mine if name not in own]
    strange = [name for name in extra if _belongs(name, own, fresh)]
    if strange:
        raise _unfit(where, [], strange, len(own))
    with reading(where, CheckpointError, need="plain tensors", hint="saving model.state_dict()"):
        model.load_state_dict({k: v for k, v in mine.items() if k in own}, strict=False)
    _start_afresh(model, fresh)
    taken = tuple(name for name in mine if name in own)
    found = Fit(prefix, taken, (*left, *extra), fresh)
    log = logger.warning if found.left or found.initialised else logger.info
    log("%s: %s", where, found)
    return found


# --- the prefix -----------------------------------------------------------------------------------


def _under_prefix(
    model: nn.Module, own: State, state: State, prefix: str | None, terms: _Terms
) -> tuple[str, State, tuple[str, ...]]:
    """The prefix, what stands under it, and the keys that do not."""
    if prefix is not None:
        return _given_prefix(model, state, prefix, terms.where)
    plain = _adapted(model, state)
    if _fits(own, plain, ()):
        return "", plain, ()
    found = _prefixes(own, state)
    fitting = [p for p in found if _fits(own, _below(state, p), ())]
    if not fitting and found:
        fitting = [p for p in found if _fits(own, _below(state, p), terms.head_keys())]
    if len(fitting) > 1:
        raise CheckpointError(
            terms.where,
            got=f"the model under {len(fitting)} prefixes: {', '.join(fitting)}",
            need="to know which one is meant",
            hint=f"--checkpoint-prefix {fitting[0]} (checkpoint_prefix={fitting[0]!r})",
        )
    if fitting:
        return fitting[0], _below(state, fitting[0]), _beside(state, fitting[0])
    longer = _longer(own, state)
    return ("", plain, ()) if longer is None else ("", longer, ())


def _given_prefix(
    model: nn.Module, state: State, prefix: str, where: str
) -> tuple[str, State, tuple[str, ...]]:
    # what every key begins with was taken off already
    tried = [prefix, prefix.replace("_orig_mod.", "").removeprefix("module.")]
    for start in (p if p.endswith(".") or not p else f"{p}." for p in tried):
        below = _below(state, start)
        if below:
            return start, _adapted(model, below), _beside(state, start)
    tops = sorted({f"{name.partition('.')[0]}." for name in state if "." in name})
    raise CheckpointError(
        where,
        got=f"no keys under {prefix}",
        need="the prefix of the model's keys in this file",
        hint=" or ".join(tops[:_SHOWN]) or "leaving --checkpoint-prefix out",
    )


def _below(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _beside(state: State, prefix: str) -> tuple[str, ...]:
    return tuple(name for name in state if not name.startswith(prefix))


def _prefixes(own: State, state: State) -> list[str]:
    """Every prefix under which the file holds the model's first matrix, in the file's order."""
    first = next((name for name, tensor in own.items() if tensor.ndim > 1), None)
    if first is None:
        return []
    ending = f".{first}"
    return [name.removesuffix(first) for name in state if name.endswith(ending)]


def _fits(own: State, state: State, head: Collection[str]) -> bool:
    """Whether a file holds all of the model, its head apart, in its shapes."""
    wanted = (n for n in own if n not in head and not n.endswith("num_batches_tracked"))
    return all(name in state and not differs(own, state, name) for name in wanted)


def _longer(own: State, state: State) -> State | None:
    """A file whose keys lack one prefix that the model's have."""
    for prefix in {f"{name.partition('.')[0]}." for name in own if "." in name}:
        longer = {prefix + name: tensor for name, tensor in state.items()}
        if _fits(own, longer, ()) and set(longer) <= set(own):
            return longer
    return None


def _adapted(model: nn.Module, state: State) -> State:
    """Old or foreign key names brought up to date by the model's own library, if it can."""
    state = {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    if set(state) == set(model.state_dict()):
        return state
    home = sys.modules.get(type(model).__module__)
    adapt = getattr(home, "checkpoint_filter_fn", None)
    if not callable(adapt) or not type(model).__module__.startswith("timm."):
        return state
    try:
        adapted = adapt(dict(state), model)
    except Exception as error:  # noqa: BLE001  (made for other files; the check that follows tells)
        logger.info("timm could not adapt the checkpoint: %s", error)
        return state
    return adapted if isinstance(adapted, dict) else state


# --- the head -------------------------------------------------------------------------------------


def _fresh(
    own: State, mine: State, differing: list[str], missing: list[str], terms: _Terms
) -> tuple[str, ...]:
    """The keys of the head that start afresh; an error where anything else does not fit."""
    region = _head_region(own, mine, terms.head_keys())
    outside = [name for name in (*differing, *missing) if name not in region]
    if not outside and terms.fresh:
        return tuple(name for name in own if name in region)
    told = outside or [*differing, *missing]
    if shapes := [name for name in differing if name in told]:
        raise _wrong_shapes(shapes, own, mine, terms)
    extra = [name for name in mine if name not in own]
    lacking = [name for name in missing if name in told]
    raise _unfit(terms.where, lacking, extra, len(own), headless=not outside)


def _head_region(own: State, mine: State, head: frozenset[str]) -> frozenset[str]:
    """The head's keys, with the parts around it of which the file has nothing either.

    torchvision's classifiers are several layers: a file without the last has none of them.
    """
    parts = set()
    for key in head:
        layer = key.rpartition(".")[0]
        while layer and not any(name.startswith(f"{layer}.") for name in mine):
            parts.add(f"{layer}.")
            layer = layer.rpartition(".")[0]
    around = (name for name in own if any(name.startswith(part) for part in parts))
    # the layer itself goes as a whole: half a head is none
    layers = {f"{key.rpartition('.')[0]}." for key in head}
    whole = (name for name in own if any(name.startswith(layer) for layer in layers))
    return frozenset((*around, *whole)) if head else frozenset()


def _start_afresh(model: nn.Module, keys: Iterable[str]) -> None:
    """Initialise the layers of some keys, the same way every time."""
    layers = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        for layer in layers:
            reset = getattr(model.get_submodule(layer), "reset_parameters", None)
            if callable(reset):
                reset()


# --- what does not fit ----------------------------------------------------------------------------


def differs(own: Mapping[str, Any], state: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor has another shape in the file than in the model."""
    return _shape(own[name]) != _shape(state[name])


def _belongs(name: str, own: State, fresh: tuple[str, ...]) -> bool:
    """Whether a key that the model does not have stands among its own: it is another model's.

    A loss, a metric, a queue or a second encoder has a name of its own at the top.
    """
    top = name.partition(".")[0]
    if any(key.partition(".")[0] == top for key in fresh):
        return False
    return "." in name and any(key.partition(".")[0] == top and "." in key for key in own)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else ()


def _wrong_shapes(names: list[str], own: State, state: State, terms: _Terms) -> CheckpointError:
    lines = [f"{n} {_shape(state[n])} for {_shape(own[n])}" for n in names]
    heads = {(_shape(own[n])[:1], _shape(state[n])[:1]) for n in names}
    hint = "the model that the file was made with"
    if len(heads) == 1:
        mine, theirs = heads.pop()  # nothing of a scalar
        classes = mine if terms.num_classes is None else (terms.num_classes,)
        if mine and theirs and mine == classes != theirs:
            hint = (
                f"--num-classes {theirs[0]} (num_classes={theirs[0]}): the head has that many "
                "outputs; "
                "or --ignore-head (ignore_head=True) for a fresh one"
            )
    return CheckpointError(
        terms.where,
        got=f"{len(names)} tensors of another shape: {some(lines)}",
        need="the shapes of this model",
        hint=hint,
    )


def _unfit(
    where: str, missing: list[str], extra: list[str], count: int, *, headless: bool = False
) -> CheckpointError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing keys: {some(missing)}")
    if extra:
        parts.append(f"{len(extra)} extra keys: {some(extra)}")
    hint = "the model that the file was made with"
    if headless and missing:
        hint = (
            "--num-classes N (num_classes=N) for a fresh head of that size, or --ignore-head "
            "(ignore_head=True) for one of the model's own"
        )
    return CheckpointError(
        where, got="; ".join(parts), need=f"the {count} tensors of this model", hint=hint
    )
