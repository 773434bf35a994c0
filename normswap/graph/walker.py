"""Run a model once under the recorder, to find its BatchNorms and what stands around them.

The model runs on the meta device where it can (no arithmetic, no memory), else on its own. It runs
in eval mode, and where its code depends on the mode once more in training mode, because auxiliary
heads run only there and because a call that may be removed has to mean the same in both. The model
comes back exactly as it was.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normswap.errors import WalkError, in_short
from normswap.graph import norms
from normswap.graph.interpretation import Forward, Names, read_others, read_sites
from normswap.graph.meta import put_on_meta, without_autocast
from normswap.graph.modes import any_depends_on_mode
from normswap.graph.preserved import preserved
from normswap.graph.recorder import recording
from normswap.graph.sites import Graph
from normswap.graph.wrappers import eagerly, refuse_wrapped
from normswap.running import call, device_of, moved

_NO_TRAINING = "the model did not run in training mode on these inputs"


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
    try:
        runs = _runs(model, example_inputs, names, found)
    except WalkError as error:
        if found:
            raise
        return Graph((), notes=(f"its code was not looked at: {in_short(error)}",))
    silent = any(all(module not in run.trace.by_module for run in runs) for module in found)
    notes = [_NO_TRAINING] if silent and len(runs) == 1 else []
    sites = read_sites(model, names, found, runs)
    return Graph(tuple(sites), runs[0].device, tuple(notes), read_others(runs))


def qualified_names(model: nn.Module) -> Names:
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


def _batchnorms(names: Names, exclude: str | Sequence[str] | None) -> Names:
    found = {m: n for m, n in names.items() if norms.is_batchnorm(m) and not matches(n, exclude)}
    for module, own_names in found.items():
        norms.check_known(module, own_names[0])
    return found


def _runs(model: nn.Module, example_inputs: Any, names: Names, found: Names) -> list[Forward]:
    """The eval run, and the training run where it can show anything else."""
    eval_run = _eval_run(model, example_inputs, names)
    seen = eval_run.trace.by_module
    if all(module in seen for module in found) and not any_depends_on_mode(names):
        return [eval_run]
    training_run = _training_run(model, example_inputs, names, meta=eval_run.device == "meta")
    return [eval_run] if training_run is None else [eval_run, training_run]


def _eval_run(model: nn.Module, example_inputs: Any, names: Names) -> Forward:
    try:
        return _run(model, example_inputs, names, mode="eval", meta=True)
    except Exception as error:
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise _cannot_run(error, example_inputs) from error
    try:
        return _run(model, example_inputs, names, mode="eval", meta=False)
    except Exception as error:
        raise _cannot_run(error, example_inputs) from error


def _training_run(
    model: nn.Module, example_inputs: Any, names: Names, *, meta: bool
) -> Forward | None:
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


def _cannot_run(error: Exception, example_inputs: Any) -> WalkError:
    hint = (
        "a tensor of the model's input size, a tuple of positional arguments, or a dict of "
        "keyword arguments, in the model's dtype"
    )
    if isinstance(example_inputs, dict):
        hint = (
            "(inputs,) where the dictionary is the one argument: its entries were taken for "
            "keyword arguments"
        )
    return WalkError(
        "example inputs",
        got=f"{type(error).__name__}: {in_short(error)}",
        need="inputs that the model can be called with in eval mode",
        hint=hint,
    )


def _run(model: nn.Module, example_inputs: Any, names: Names, *, mode: str, meta: bool) -> Forward:
    first_names = {module: found[0] for module, found in names.items()}
    with (
        ready_to_run(model, example_inputs, names, mode=mode, meta=meta) as (inputs, device),
        recording(first_names, meta=meta) as recorder,
    ):
        output = call(model, inputs)
        recorder.output(output)
    return Forward(mode, device.type, recorder.trace)


@contextmanager
def ready_to_run(
    model: nn.Module, example_inputs: Any, names: Names, *, mode: str, meta: bool
) -> Iterator[tuple[Any, torch.device]]:
    """A model set up to be called on the inputs that are yielded, and as it was afterwards.

    Args:
        model: any module.
        example_inputs: see :func:`call`.
        names: of all its modules.
        mode: ``eval`` or ``train``.
        meta: on the meta device; else where the model is.
    """
    device = torch.device("meta") if meta else device_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))  # its tensors count no versions
        stack.enter_context(preserved(list(names), values=not meta))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eagerly(names))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what the model has to say, it says when it is used
        if any(module.training != (mode == "train") for module in names):
            model.train(mode == "train")
        if meta:
            stack.enter_context(without_autocast())
            put_on_meta(names)
        yield moved(example_inputs, device), device
