"""From a record and weights to a model: build, swap again, fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.artifact.record import Document
from normswap.errors import ArtifactError, ConsentError, NormSwapError
from normswap.factories import no_larger_than
from normswap.provenance import Provenance, remember
from normswap.reading import reading
from normswap.sources import rebuild
from normswap.trust import Trust

_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


def same_model(
    document: Document,
    record: Provenance,
    into: nn.Module | None,
    state: Mapping[str, Tensor],
    trust: Trust = None,
) -> nn.Module:
    """A model of the saved structure, with whatever weights, for those of ``state``."""
    where = str(document.folder)
    model = into
    if model is None:
        if record.source is None:
            raise _unknown_source(where)
        try:
            with no_larger_than(state.values()):
                model = rebuild(record.source, trust=trust)
        except ConsentError as error:
            raise ArtifactError(where, got=error.got, need=error.need, hint=error.hint) from error
        except NormSwapError as error:
            raise ArtifactError(
                where,
                got=f"a source that cannot be built here ({error.where}: got {error.got})",
                need=f"{error.need}",
                hint="load(directory, into=a freshly built BatchNorm model)",
            ) from error
    remember(model, plans=(), history=())
    dtype = _DTYPES.get(document.get("dtype", str))
    if dtype is None:
        raise document.malformed("dtype", document.data["dtype"])
    return swapped_again(where, model.to(dtype), record.plans)


def _unknown_source(where: str) -> ArtifactError:
    return ArtifactError(
        where,
        got="a model whose source is not known",
        need="a way to build its BatchNorm original",
        hint="load(directory, into=a freshly built BatchNorm model), or saving it with "
        "save(..., source='python:package.module:factory')",
    )


def swapped_again(where: str, model: nn.Module, plans: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Apply recorded plans to a BatchNorm original."""
    if not plans:
        return model
    from normswap.planning import Plan
    from normswap.swap import apply_plan

    try:
        with reading(
            where,
            ArtifactError,
            what="a malformed plan",
            need="plans as normswap wrote them",
            hint="saving the model again; the file has been edited or damaged",
        ):
            for plan in plans:
                model = apply_plan(model, Plan.from_json(dict(plan))).model
    except ArtifactError:
        raise
    except NormSwapError as error:
        raise ArtifactError(
            where,
            got=f"a plan that does not fit the model ({error.where}: got {error.got})",
            need="the BatchNorm original that the plan was made for",
            hint="load(directory, into=that model)",
        ) from error
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor], document: Document) -> None:
    """Give every tensor of the model its saved value, type and memory layout; ties stay ties."""
    saved = set(model.state_dict())
    own = {name: value for name, value in _tensors(model).items() if name in saved}
    check_agreement(str(document.folder), own, state)
    channels_last = set(document.strings("channels_last"))
    for name, tensor in own.items():
        value = state[name]
        if name in channels_last and value.dim() in (4, 5):
            value = _as_channels_last(value)
        with torch.no_grad():
            tensor.data = value
    frozen = set(document.strings("frozen"))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trainable = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(trainable and name not in frozen)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that reaches it."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def check_agreement(where: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Say exactly which tensors of a model and of a file differ in name or shape."""
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    found = [
        f"{len(names)} {what}: {', '.join(names[:3])}" + ("…" if len(names) > 3 else "")
        for what, names in (
            ("tensors missing", missing),
            ("tensors left over", extra),
            ("tensors of another shape", shapes),
        )
        if names
    ]
    if found:
        raise ArtifactError(
            where,
            got="weights that do not fit the model: " + "; ".join(found),
            need="the model that was saved",
            hint="load(directory, into=a BatchNorm model of the same structure)",
        )


def _as_channels_last(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout)
    return empty.copy_(tensor)
