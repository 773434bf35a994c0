"""Run a converted model once: nothing that was replaced may run, and the model's code must cope."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from normswap.errors import WalkError, in_short
from normswap.graph.meta import OnMeta, like_first
from normswap.graph.walker import qualified_names, ready_to_run
from normswap.running import call


def check_run(
    model: nn.Module, example_inputs: Any, replacements: Mapping[nn.Module, nn.Module]
) -> None:
    """Run a model in eval mode, on the meta device where that works.

    Args:
        model: comes back exactly as it was.
        example_inputs: inputs that the model took before it was changed.
        replacements: BatchNorms that must not run any more, and what stands in their place. Of
            these the meta device only needs to know that they keep the shape.

    Raises:
        WalkError: a replaced BatchNorm ran, or the model does not run.
    """
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for module in replacements
    ]
    try:
        problem = _attempt(model, example_inputs, replacements, meta=True)
        has_values = not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        if problem is not None and not ran and has_values:
            problem = _attempt(model, example_inputs, replacements, meta=False)
    finally:
        for hook in hooks:
            hook.remove()
    if ran:
        raise WalkError(
            "the model",
            got=f"a {type(ran[0]).__name__} that still runs after it was replaced",
            need="BatchNorms held as modules, in attributes, lists, tuples or dicts",
            hint="registering it as a submodule only, or exclude= with its name",
        )
    if problem is not None:
        raise WalkError(
            "the converted model",
            got=f"{type(problem).__name__}: {in_short(problem)}",
            need="code that takes any normaliser in the place of a BatchNorm",
            hint="exclude= with the names of the layers that the model's own code looks into",
        ) from problem


def _attempt(
    model: nn.Module,
    example_inputs: Any,
    replacements: Mapping[nn.Module, nn.Module],
    *,
    meta: bool,
) -> Exception | None:
    names = qualified_names(model)
    try:
        with (
            ready_to_run(model, example_inputs, names, mode="eval", meta=meta) as (inputs, _),
            OnMeta() if meta else nullcontext(),
        ):
            if meta:
                for module in replacements.values():
                    vars(module)["forward"] = like_first
            call(model, inputs)
    except Exception as error:  # noqa: BLE001  whatever the model raises
        return error
    return None
