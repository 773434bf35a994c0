"""Write an artefact, all or nothing."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import normswap
from normswap.artifact.card import model_card
from normswap.artifact.rebuilding import check_agreement, swapped_again
from normswap.artifact.record import (
    CARD,
    FORMAT_VERSION,
    OWN_FILES,
    RECORD,
    WEIGHTS,
    read_record,
    record_digest,
    stamp,
)
from normswap.artifact.statistics import packed
from normswap.errors import ArtifactError, NormSwapError, SpecError
from normswap.files import contents, draft_folder, file_digest, final_name, sole_writer
from normswap.passage import refuse_crossing
from normswap.plain import plain
from normswap.provenance import Provenance, portable, provenance_of, versions
from normswap.room import full
from normswap.sources import canonical, rebuild
from normswap.trust import typed

logger = logging.getLogger("normswap")


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    source: str | None = None,
    force: bool = False,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write a model as an artefact, all or nothing.

    Args:
        model: converted or not; not changed.
        directory: to be made. One that exists and is not empty needs ``force``.
        source: ``python:package.module:factory`` for a model that ``load_model`` did not build.
        force: replace the artefact in ``directory``. Its other files stay; a directory that is no
            artefact keeps all it has, and is refused if it has files of the artefact's names.
        class_names: the labels in the order of the logits, if the model does not know them.

    Returns:
        The directory.

    Raises:
        ArtifactError: the directory cannot be written, is not empty, or the model's source does
            not build this model.
        BusyError: another run is writing the directory.
    """
    refuse_crossing(model, str(directory))
    target = Path(directory).resolve()
    check_target(target, force=force)
    if source is not None and source.startswith("python:"):
        with contextlib.suppress(SpecError):  # which _check_source explains
            source = canonical(source)
    document, tensors = _describe(model, source, class_names)
    _check_source(model, document, str(target), explicit=source is not None)
    with _one_clear_error(target), sole_writer(target):
        check_target(target, force=force)  # again: somebody may have been there meanwhile
        with draft_folder(target, OWN_FILES) as draft:
            _write(draft, document, tensors, final_name(target), packed(_known(model)))
    return Path(directory)


def _known(model: nn.Module) -> dict[str, Any]:
    """The statistics of the BatchNorms that stood where a layer still stands."""
    names = {name for name, _ in model.named_modules()}
    return {n: site for n, site in provenance_of(model).statistics.items() if n in names}


def _write(
    draft: Path,
    document: dict[str, Any],
    tensors: dict[str, Tensor],
    title: str,
    more: dict[str, str],
) -> None:
    (draft / WEIGHTS).touch()
    mode = (draft / WEIGHTS).stat().st_mode
    save_file(tensors, draft / WEIGHTS, metadata={"format": "pt", **more})
    _sort_metadata(draft / WEIGHTS)
    (draft / WEIGHTS).chmod(mode)  # safetensors makes files for the owner alone
    document["sha256"] = file_digest(draft / WEIGHTS)
    document["record_sha256"] = record_digest(document)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (draft / CARD).write_text(model_card(document, title), encoding="utf-8")
    (draft / RECORD).write_text(text + "\n", encoding="utf-8")


def check_target(directory: str | Path, *, force: bool) -> None:
    """Find out whether ``save`` may write there.

    Raises:
        ArtifactError: a file; a directory that is not empty, without ``force``; one that is no
            artefact and has files of an artefact's names.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ArtifactError(str(target), got="a file", need="a directory", hint="another name")
    present = contents(target)
    if present and not force:
        raise ArtifactError(
            str(target),
            got="a directory that is not empty",
            need="a new or empty one",
            hint="another name, or --force (force=True) to replace the artefact in it",
        )
    clash = sorted(present & set(OWN_FILES))
    if clash and not _is_artifact(target):
        raise ArtifactError(
            str(target),
            got=f"a directory that is no artefact but holds {', '.join(clash)}",
            need="an artefact to replace, or a directory without such files",
            hint="another name",
        )


def _is_artifact(folder: Path) -> bool:
    """Whether one is there, also while another one takes its place."""
    while True:
        before = stamp(folder)
        try:
            read_record(folder)
        except ArtifactError as error:
            if "written by normswap" in error.got:  # a newer one is one, too
                return True
            if stamp(folder) == before:
                return False
        else:
            return True


def _sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata in order: it writes them in a random one.

    The header is an 8-byte length and JSON, padded with blanks; its length stays.
    """
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def _describe(
    model: nn.Module, source: str | None, class_names: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = provenance_of(model)
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ArtifactError(
            odd[0],
            got="extra state that is no tensor",
            need="a model whose state dict holds tensors alone",
            hint="removing get_extra_state from that module",
        )
    if any(value.is_meta for value in state.values()):
        raise ArtifactError(
            type(model).__name__,
            got="tensors on the meta device",
            need="a model with weights",
            hint="loading weights first",
        )
    tensors, aliases = _without_duplicates(state)
    names = record.class_names if class_names is None else class_names
    document = {
        "format_version": FORMAT_VERSION,
        "normswap": normswap.__version__,
        "versions": {**versions("torchvision", "timm"), "torch": str(torch.__version__)},
        "model": type(model).__name__,
        "source": _explicit_source(record, source),
        "preprocessing": record.preprocessing,
        "class_names": None if names is None else [str(name) for name in names],
        "plans": list(record.plans),
        "history": list(record.history),
        "dtype": _main_dtype(model),
        "frozen": [
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        ],
        "aliases": aliases,
        "channels_last": [name for name, value in state.items() if _is_channels_last(value)],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": "",
    }
    found: dict[str, Any] = plain(document)
    return found, tensors


def _explicit_source(record: Provenance, source: str | None) -> dict[str, Any] | None:
    if source is None:
        return portable(record.source)
    return {
        "spec": source,
        "num_classes": (record.source or {}).get("num_classes"),
        "arguments": {},
        "task": (record.source or {}).get("task", "image"),
        "weights": "none",
        "checkpoint": None,
        "sha256": None,
    }


def _without_duplicates(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, on the CPU and in a row, and which further names it goes by."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        identity = (
            value.device,
            value.data_ptr(),
            value.dtype,
            tuple(value.shape),
            value.stride(),
        )
        if value.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        # a copy, because safetensors refuses tensors that overlap in memory
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return tensors, aliases


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() not in (4, 5):
        return False
    layout = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    contiguous, last = (
        torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
        for memory_format in (torch.contiguous_format, layout)
    )
    # by strides: a 1x1 kernel counts as contiguous in both layouts, and kernels are chosen by them
    return tensor.stride() == last != contiguous


def _main_dtype(model: nn.Module) -> str:
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    main = max(set(kinds), key=kinds.count) if kinds else torch.float32
    return str(main).removeprefix("torch.")


def _check_source(
    model: nn.Module, document: dict[str, Any], where: str, *, explicit: bool
) -> None:
    """Make sure that what is written can be read again; else say so now, not after the training.

    A model that no longer fits its recorded source (it was changed by hand) is saved without one.
    """
    if document["source"] is None:
        return
    try:
        trust = provenance_of(model).trusted
        if explicit:  # the user has typed it, here
            trust |= typed(document["source"]["spec"])
        twin = _meta_twin(document, trust)
        check_agreement(where, _state_of(twin), model.state_dict())
        _check_modules(where, twin, model)
    except NormSwapError as error:
        if explicit:
            raise ArtifactError(
                where,
                got=f"source {document['source']['spec']}, which does not build this model "
                f"({error.got})",
                need="the factory of its BatchNorm original",
                hint="another factory, or no source and load(directory, into=…)",
            ) from error
        logger.warning("%s: %s; it will load with into= only", where, error.got)
        document["source"] = None


def _check_modules(where: str, twin: nn.Module, model: nn.Module) -> None:
    """What is in no state dict (ε, strides, a pooling cut out) would be lost without a word.

    An edit inside a ``forward`` cannot be seen here.
    """
    mine, right = (
        {name: _settings(module) for name, module in net.named_modules()} for net in (model, twin)
    )
    differing = [name for name in {**right, **mine} if mine.get(name) != right.get(name)]
    if differing:
        name = differing[0]
        found, wanted = (net.get(name, "nothing") for net in (mine, right))
        raise ArtifactError(
            where,
            got=f"{found} at {name or 'the root'}, where its source has {wanted}",
            need="a model as its source builds it",
            hint="load(directory, into=…)",
        )


def _settings(module: nn.Module) -> str:
    """A module's class and what it says of itself; of normswap's layers without their schedules."""
    kind = type(module).__name__
    if type(module).__module__.startswith("normswap."):
        return f"{kind}(eps={getattr(module, 'eps', None)})"
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):  # they tell of their device
        return kind
    return f"{kind}({module.extra_repr()})"


def _meta_twin(document: Mapping[str, Any], trust: frozenset[str]) -> nn.Module:
    def twin() -> nn.Module:
        original = rebuild(document["source"], trust=trust)
        return swapped_again("source", original, document["plans"])

    try:
        with torch.device("meta"):
            return twin()
    except (NormSwapError, NotImplementedError, RuntimeError):
        return twin()  # some constructors compute with their weights


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def _one_clear_error(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = error.strerror if isinstance(error, OSError) else None
        reason = full(error) or told or str(error)
        raise ArtifactError(
            str(target),
            got=f"{reason}, so that nothing was written",
            need="a place where a directory can be made, with room for the weights",
            hint="another directory, or freeing space",
        ) from error
