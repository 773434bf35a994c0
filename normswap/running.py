"""Run a model: call it, look into it, move it for a while, and put everything back.

Nothing here knows a normaliser, and nothing here stays changed when a block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.modes import refuse_other_meanings


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


# --- for a while ----------------------------------------------------------------------------------


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode; every module's own flag comes back.

    Raises:
        WalkError: ``eval`` or ``train`` of a model means something else.
    """
    for model in models:
        refuse_other_meanings(model)
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def placed(device: str | torch.device | None, *models: nn.Module) -> Iterator[torch.device]:
    """Models on ``device``, which is yielded; None is where the first of them is."""
    homes = [device_of(model) for model in models]
    where = homes[0] if device is None else torch.device(device)
    away = [(model, home) for model, home in zip(models, homes, strict=True) if home != where]
    try:
        for model, _ in away:
            model.to(where)
        yield where
    finally:
        for model, home in away:
            model.to(home)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove hooks on the way out, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(
    model: nn.Module,
    see: Callable[[str, Any], None],
    names: Container[str] | None = None,
    *,
    before: bool = False,
) -> Iterator[None]:
    """Show ``see`` what modules give while the model runs.

    Args:
        model: whose modules.
        see: takes a module's name and its output.
        names: of the modules; None is all of them.
        before: show what they are given, as a tuple, in place of what they give.
    """

    def shown(name: str) -> Callable[..., None]:
        return lambda _module, *found: see(name, found[-1])

    handles = [
        module.register_forward_pre_hook(shown(name))
        if before
        else module.register_forward_hook(shown(name))
        for name, module in model.named_modules()
        if names is None or name in names
    ]
    with hooked(*handles):
        yield


# --- inputs and outputs of any structure ----------------------------------------------------------


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A norm's one input, given by position or by keyword."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def leaves(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output of any structure, in a stable order.

    Example:
        >>> [t.shape[0] for t in leaves({"a": torch.zeros(2), "b": [torch.zeros(3), None]})]
        [2, 3]
    """
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in leaves(value)]
    if isinstance(output, (list, tuple)):
        return [leaf for value in output for leaf in leaves(value)]
    if is_dataclass(output) and not isinstance(output, type):
        return [leaf for f in fields(output) for leaf in leaves(getattr(output, f.name))]
    return []


def entries(batch: Any) -> int:
    """How many images a batch holds: the length of its first tensor."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, list) and all(isinstance(t, Tensor) and t.dim() == 3 for t in batch):
        return len(batch)  # a detector's images
    if isinstance(batch, (list, tuple)):
        return entries(batch[0]) if batch else 0
    return int(batch.shape[0]) if isinstance(batch, Tensor) and batch.dim() else 1


def first(batches: Iterable[Any], count: int) -> list[Any]:
    """The first batches, of about ``count`` images together."""
    chosen, seen = [], 0
    for batch in batches:
        if seen >= count:
            break
        chosen.append(batch)
        seen += entries(batch)
    return chosen


def channels_last(x: Tensor) -> Tensor:
    """Maps and volumes with their channels last in memory; any other tensor as it is."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


def put_channels_last(model: nn.Module) -> None:
    """The same for a model's weights, in place."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = channels_last(tensor.data)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors live."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def moved(batch: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """A batch of any structure on ``device``."""
    return tree_map_only(
        Tensor, lambda tensor: _usable(tensor).to(device, non_blocking=non_blocking), batch
    )


def _usable(tensor: Tensor) -> Tensor:
    # what was made in inference mode cannot be recorded or trained on
    return tensor.clone() if tensor.is_inference() else tensor


def copied(batch: Any) -> Any:
    """A batch for one forward pass, which may write into its input."""
    return tree_map_only(Tensor, Tensor.clone, batch)


def example_inputs(model: nn.Module, draw: Callable[[], Tensor], task: str) -> Any:
    """Inputs as a model of that task takes them, on its device and in its dtype.

    Args:
        model: any module.
        draw: makes a batch of images.
        task: ``detection`` takes a list of images with values in (0, 1), ``flow`` two batches as
            two arguments, everything else one batch.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))

    def batch() -> Tensor:
        return draw().to(device=like.device, dtype=like.dtype)

    if task == "detection":
        return list(batch().sigmoid())
    return (batch(), batch()) if task == "flow" else batch()
