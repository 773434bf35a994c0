"""Load an artefact, or any other spec."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from normswap.artifact.rebuilding import fill, same_model
from normswap.artifact.record import RECORD, WEIGHTS, Document, read_record, stamp
from normswap.artifact.statistics import Sites, check_channels, unpacked
from normswap.data import Preprocessing
from normswap.errors import ArtifactError
from normswap.files import current, file_digest
from normswap.graph.numbers import check_numbers
from normswap.provenance import provenance_of, remember
from normswap.reading import reading
from normswap.sources import Source, build, is_spec
from normswap.trust import Trust, trusted

logger = logging.getLogger("normswap")


def load_model(
    spec: str | Path,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    checkpoint_prefix: str | None = None,
    ignore_head: bool = False,
    device: str | torch.device = "cpu",
    trust: Trust = None,
    allow_nonfinite: bool = False,
) -> Source:
    """Load a model from any spec: a library's name, a factory of one's own, or an artefact.

    Args:
        spec: ``timm/NAME[.TAG]``, ``torchvision/NAME[:WEIGHTS]``, ``hf-hub:ORG/REPO``,
            ``python:package.module:factory`` or a directory that ``save`` wrote. A repository may
            hold a model of timm's or an artefact that ``push_to_hub`` uploaded.
        pretrained: with the library's own weights, through its own download code.
        checkpoint: weights from a file instead; nothing is downloaded.
        num_classes: outputs of the head; pretrained weights keep all but the head.
        image_size: height and width, where they differ from the model's own.
        in_chans: channels of the input, where they are not red, green and blue; a pretrained first
            convolution is adapted by timm's rule.
        checkpoint_prefix: under which the model's keys stand in the file (``module.encoder_q.``);
            found by itself where exactly one fits.
        ignore_head: a head that the file lacks, or has in another size, starts afresh. With
            ``num_classes`` it does so anyway.
        device: where the model goes.
        trust: for a directory, see :func:`load`.
        allow_nonfinite: take weights and running statistics that are not finite, and negative
            variances, to look at them.

    Returns:
        The model in eval mode, with its preprocessing and example inputs.

    Raises:
        SpecError: unknown model, no weights to be had, no network.
        CheckpointError: the checkpoint cannot be read or does not fit.
        ArtifactError: the directory is no artefact, or has been changed.
        ImpossibleNumbersError: weights or running statistics that are not finite, or negative
            variances.

    Example:
        >>> source = load_model("torchvision/resnet18", pretrained=False)
        >>> source.preprocessing.input_size
        (3, 224, 224)
    """
    folder = _directory(spec)
    if folder is None:
        source = build(
            str(spec),
            pretrained=pretrained,
            checkpoint=checkpoint,
            num_classes=num_classes,
            image_size=image_size,
            in_chans=in_chans,
            checkpoint_prefix=checkpoint_prefix,
            ignore_head=ignore_head,
        )
        if not allow_nonfinite:
            check_numbers(source.model)
        source.model.to(device)
        return source
    if not pretrained:
        logger.warning("%s: an artefact brings its own weights; pretrained is ignored", spec)
    given = {
        "checkpoint": checkpoint,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "checkpoint_prefix": checkpoint_prefix,
        "ignore_head": ignore_head or None,
    }
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise ArtifactError(
            str(spec),
            got=f"an artefact together with {extra[0]}",
            need="an artefact alone: it brings its weights and its head",
            hint="leaving the option out, or the spec the artefact was made from",
        )
    model = load(folder, device=device, trust=trust)
    if not allow_nonfinite:
        check_numbers(model)
    known = provenance_of(model)
    preprocessing = Preprocessing.from_json(known.preprocessing or {}).resized(image_size)
    if image_size is not None:
        remember(model, preprocessing=preprocessing.to_json())
    task = str((known.source or {}).get("task", "image"))
    return Source(model, str(spec), preprocessing, known.class_names, known.source, task)


def _directory(spec: str | Path) -> Path | None:
    """The artefact that a spec names, here or on the hub; None if it names none.

    What is written like a library's model is one, whatever lies in the current folder.
    """
    named = isinstance(spec, str) and is_spec(spec)
    if Path(spec).is_dir():
        if not named:
            return Path(spec)
        logger.warning("%s is the library's model; the folder of that name is ./%s", spec, spec)
    if str(spec).startswith("hf-hub:"):
        from normswap.artifact.hub import fetched

        return fetched(str(spec))
    return None


def load(
    directory: str | Path,
    *,
    into: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust: Trust = None,
) -> nn.Module:
    """Load what ``save`` wrote: build the BN original, swap it again, put the weights in.

    Args:
        directory: the artefact.
        into: a freshly built BN original to use, for models that normswap cannot build; changed.
        device: where the model goes.
        trust: the ``python:`` or ``hf-hub:`` source (or several) that the artefact may be built
            from, because you trust its author. Without it nothing that the artefact names is
            imported, called or downloaded.

    Returns:
        The model in eval mode, with its provenance; its outputs are those of the saved one, bit
        for bit.

    Raises:
        ArtifactError: no artefact, a newer format, an edited file, a model it does not fit, or a
            source that needs ``trust``.
    """
    consent = trusted(trust)
    document, state, statistics = read_checked(Path(directory))
    record = document.provenance()
    with reading(
        directory,
        ArtifactError,
        what=f"a malformed {RECORD}",
        need="an artefact as normswap wrote it",
        hint="copying it again, or asking its author for it",
    ):
        model = same_model(document, record, into, state, consent)
        fill(model, state, document)
        check_channels(str(directory), model, statistics)
    remember(
        model,
        source=record.source,
        preprocessing=record.preprocessing,
        class_names=record.class_names,
        plans=record.plans,
        history=record.history,
        statistics=statistics,
        trusted=consent,
    )
    return model.to(device).eval()


def read_checked(folder: Path) -> tuple[Document, dict[str, Tensor], Sites]:
    """Record and weights of one artefact, also while another one takes its place."""
    while True:
        before = stamp(folder)
        try:
            document = Document(folder, read_record(folder))
            state, statistics = _read_weights(document)
        except ArtifactError:
            if stamp(folder) == before:
                raise
        else:
            if stamp(folder) == before:
                return document, state, statistics


def _read_weights(document: Document) -> tuple[dict[str, Tensor], Sites]:
    path = current(document.folder, WEIGHTS)
    expected = document.get("sha256", str)
    hint = "copying the artefact again"
    with reading(path, ArtifactError, need="the saved weights", hint=hint):
        found = file_digest(path)
        if found != expected:
            raise ArtifactError(
                str(path),
                got=f"SHA-256 {found[:16]}…",
                need=f"SHA-256 {expected[:16]}…, as {RECORD} says",
                hint=f"{hint}: the file has been edited or damaged",
            )
        # copies, because tensors in a mapped file lie at odd addresses, where CPU kernels round
        # differently
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        statistics = unpacked(path)
    for alias, name in document.aliases().items():
        if name not in state:
            raise document.malformed("aliases", {alias: name})
        state[alias] = state[name]
    return state, statistics
