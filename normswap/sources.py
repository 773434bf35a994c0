"""Model specs: where a BatchNorm model comes from, its weights, and inputs that fit it.

    timm/NAME[.TAG] · torchvision/NAME[:WEIGHTS] · hf-hub:ORG/REPO · python:package.module:factory

A source is recorded on the model (``provenance.py``), so that an artefact can build it again. This
room refuses to guess: a checkpoint fits in every key and shape, its head apart, or is an error.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap import files, running
from normswap.checkpoints import fit_checkpoint, load_checkpoint
from normswap.data import Preprocessing
from normswap.errors import CheckpointError, NormSwapError, SpecError
from normswap.factories import (
    Built,
    Request,
    canonical,
    check_recorded,
    detector_classes,
    from_python,
    from_timm,
    from_torchvision,
    graft_head,
)
from normswap.factories.stems import adapted_stem
from normswap.libraries import library
from normswap.provenance import provenance_of, remember
from normswap.trust import Trust, check_consent, trusted, typed
from normswap.whereabouts import find_checkpoint, note_checkpoint

__all__ = [
    "Source",
    "build",
    "canonical",
    "count_batchnorms",
    "is_spec",
    "list_models",
    "load_checkpoint",
    "original",
    "rebuild",
    "resize_head",
    "weights_digest",
]

_FAMILIES = {
    "timm/": from_timm,
    "hf-hub:": from_timm,
    "torchvision/": from_torchvision,
    "python:": from_python,
}

_log = logging.getLogger("normswap")


def is_spec(text: str) -> bool:
    """Whether a text begins like a spec, and names no file or folder therefore."""
    return text.startswith(tuple(_FAMILIES))


@dataclass(frozen=True)
class Source:
    """A model with what is known about it.

    Attributes:
        model: in eval mode; carries its provenance.
        spec: where it came from.
        preprocessing: what it wants of its input.
        class_names: the labels in the order of its logits, or None.
        origin: plain data from which ``rebuild`` makes the same model without weights; None if
            unknown.
        task: ``"image"``, ``"video"``, ``"detection"`` (takes a list of images) or ``"flow"``
            (takes two batches).
    """

    model: nn.Module
    spec: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    origin: dict[str, Any] | None = None
    task: str = "image"

    def example_inputs(
        self, batch_size: int = 1, image_size: int | Sequence[int] | None = None, seed: int = 0
    ) -> Any:
        """Random inputs that the model takes, on its device; the same for the same seed.

        Returns:
            A tensor, a list of images for a detector (one argument), or a tuple of two tensors for
            an optical-flow model (two arguments).
        """
        size = self.preprocessing.resized(image_size).input_size
        generator = torch.Generator().manual_seed(seed)
        return running.example_inputs(
            self.model, lambda: torch.randn(batch_size, *size, generator=generator), self.task
        )


def build(
    spec: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    checkpoint_prefix: str | None = None,
    ignore_head: bool = False,
    recorded: bool = False,
) -> Source:
    """Build a model from a spec, with weights; :func:`normswap.load_model` says what is what.

    Args:
        spec: see the module's docstring.
        pretrained: with the library's own weights, through its own download code.
        checkpoint: weights from a file instead; nothing is downloaded.
        num_classes: outputs of the head.
        image_size: height and width, where they differ from the model's own.
        in_chans: channels of the input.
        checkpoint_prefix: under which the model's keys stand in the file.
        ignore_head: a head that does not fit starts afresh.
        recorded: the spec comes from a record, and not from whoever calls.

    Returns:
        The model in eval mode with its provenance.

    Raises:
        SpecError: unknown model, no weights to be had, no network.
        CheckpointError: the file cannot be read or does not fit.

    Example:
        >>> source = build("timm/resnet18", pretrained=False, num_classes=10)
        >>> source.model(source.example_inputs(batch_size=2)).shape
        torch.Size([2, 10])
    """
    family, name = _family(spec)
    if num_classes is not None and num_classes < 1:
        raise SpecError(
            "num_classes", got=str(num_classes), need="at least 1", hint="leaving it out"
        )
    if in_chans is not None and in_chans < 1:
        raise SpecError("in_chans", got=str(in_chans), need="at least 1", hint="leaving it out")
    _check_file_options(checkpoint, checkpoint_prefix, ignore_head=ignore_head)
    state = None if checkpoint is None else load_checkpoint(checkpoint)
    request = Request(
        spec,
        name,
        pretrained=pretrained and state is None,
        filled_later=state is not None,
        num_classes=num_classes,
        image_size=_edges(image_size),
        in_chans=in_chans,
        keys=frozenset(state or ()),
        recorded=recorded,
    )
    built = family(request)
    if state is not None:
        classes = num_classes or getattr(built.model, "num_classes", None)
        fit_checkpoint(
            built.model,
            state,
            where=str(checkpoint),
            num_classes=classes if isinstance(classes, int) else None,
            prefix=checkpoint_prefix,
            fresh_head=ignore_head or num_classes is not None,
            head=lambda: _head_keys(built, family, request),
            adapt=_stem_adapter(built.model),
        )
    found = _recorded(spec, built, num_classes, pretrained=pretrained, checkpoint=checkpoint)
    return _with_file_options(found, checkpoint_prefix, ignore_head=ignore_head)


def _with_file_options(source: Source, prefix: str | None, *, ignore_head: bool) -> Source:
    """How the file was read belongs to how the original can be had again."""
    given = {"checkpoint_prefix": prefix} if prefix is not None else {}
    origin = {**(source.origin or {}), **given} | ({"ignore_head": True} if ignore_head else {})
    remember(source.model, source=origin)
    return replace(source, origin=origin)


def _check_file_options(
    checkpoint: str | Path | None, prefix: str | None, *, ignore_head: bool
) -> None:
    given = {"checkpoint_prefix": prefix is not None, "ignore_head": ignore_head}
    unused = [name for name, is_given in given.items() if is_given]
    if checkpoint is None and unused:
        option = f"--{unused[0].replace('_', '-')}"
        raise SpecError(
            f"{unused[0]} ({option})",
            got="it without a checkpoint",
            need="a weight file that it speaks of",
            hint="--checkpoint FILE (checkpoint=…), or leaving it out",
        )


def _head_keys(built: Built, family: Any, request: Request) -> frozenset[str]:
    """The keys of a model's head: those whose shapes follow the number of classes.

    A factory that takes no number of classes has for its head the last layer with a matrix.
    """
    asked = replace(request, arguments=built.arguments)
    try:
        few, many = (_shapes(family, replace(asked, num_classes=n)) for n in (3, 5))
    except NormSwapError:
        layers = [n.rpartition(".")[0] for n, p in built.model.named_parameters() if p.ndim > 1]
        return frozenset(n for n in built.model.state_dict() if n.rpartition(".")[0] in layers[-1:])
    return frozenset(name for name in few if few[name] != many.get(name))


def _shapes(family: Any, request: Request) -> dict[str, tuple[int, ...]]:
    state = _without_values(family, request).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _without_values(family: Any, request: Request) -> nn.Module:
    """The model on the meta device, where its constructor allows that."""
    with contextlib.suppress(NormSwapError), torch.device("meta"):
        model: nn.Module = family(request).model
        return model
    found: nn.Module = family(request).model  # some constructors compute with their weights
    return found


def _stem_adapter(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """Gives weights of red, green and blue the channels of a model that takes others."""
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def adapt(name: str, tensor: Tensor) -> Tensor:
        wanted, found = own.get(name, ()), tuple(tensor.shape)
        same = wanted[:1] == found[:1] and wanted[2:] == found[2:]
        if len(wanted) > 3 and same and found[1] == 3 and name == _first_matrix(model):
            return adapted_stem(tensor, wanted[1])
        return tensor

    return adapt


def _first_matrix(model: nn.Module) -> str | None:
    return next((name for name, p in model.named_parameters() if p.ndim > 1), None)


def _family(spec: str) -> tuple[Any, str]:
    for prefix, family in _FAMILIES.items():
        if spec.startswith(prefix) and len(spec) > len(prefix):
            return family, spec.removeprefix(prefix)
    _refuse_files(spec)
    bare = spec.strip("/").partition(":")[0]
    near = list_models(f"*/{bare}") if bare.isidentifier() else []
    raise SpecError(
        repr(spec),
        got="neither a known kind of spec nor a folder",
        need="timm/NAME, torchvision/NAME, hf-hub:ORG/REPO, python:module:factory "
        "or a normswap directory",
        hint=" or ".join(near) or "`normswap list` for names",
    )


_WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def _refuse_files(spec: str) -> None:
    """Weights alone are no model; an ONNX file is one that cannot be converted."""
    kind = Path(spec).suffix.lower()
    if kind in _WEIGHTS:
        raise SpecError(
            spec,
            got="a file of weights",
            need="the model that they belong to",
            hint=f"timm/NAME --checkpoint {spec}, or torchvision/NAME, or "
            "python:PACKAGE.MODULE:FACTORY for a model of your own (checkpoint=…)",
        )
    if kind == ".onnx":
        raise SpecError(
            spec,
            got="an ONNX file",
            need="the torch model that it was made from",
            hint="`normswap verify`, `evaluate` or `predict`, which take such files",
        )


def _edges(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = Preprocessing().resized(image_size).input_size
    return size[1], size[2]


def _recorded(
    spec: str,
    built: Built,
    num_classes: int | None,
    *,
    pretrained: bool,
    checkpoint: str | Path | None,
) -> Source:
    given = pretrained if built.pretrained is None else built.pretrained
    weights = "checkpoint" if checkpoint is not None else "pretrained" if given else "none"
    origin = {
        "spec": built.spec or spec,
        "num_classes": num_classes,
        "arguments": built.arguments,
        "task": built.task,
        "weights": weights,
        "checkpoint": None if checkpoint is None else str(Path(checkpoint).resolve()),
        "sha256": None if weights == "none" else weights_digest(built.model),
    }
    if checkpoint is not None:
        note_checkpoint(str(origin["sha256"]), checkpoint)
    model = built.model.eval()
    remember(
        model,
        source=origin,
        preprocessing=built.preprocessing.to_json(),
        class_names=built.class_names,
        trusted=typed(spec, built.spec or spec),
    )
    return Source(model, spec, built.preprocessing, built.class_names, origin, built.task)


def rebuild(origin: Mapping[str, Any], *, trust: Trust = None) -> nn.Module:
    """The same BatchNorm model as ``origin`` tells of, without its weights and without a network.

    Args:
        origin: a record, of which nothing is believed.
        trust: the ``python:`` and ``hf-hub:`` sources that the user has typed.

    Raises:
        ConsentError: the record names code that the user has not consented to.
        SpecError: the record is malformed, or the model can no longer be built.
    """
    spec, classes, arguments = _checked(origin, trust)
    family, name = _family(spec)
    request = Request(
        spec, name, filled_later=True, num_classes=classes, arguments=arguments, recorded=True
    )
    model: nn.Module = family(request).model
    return model.eval()


def _checked(origin: Mapping[str, Any], trust: Trust) -> tuple[str, int | None, dict[str, Any]]:
    """Spec, number of classes and arguments of a record that may be built."""
    spec, classes = origin.get("spec"), origin.get("num_classes")
    arguments = origin.get("arguments", {})
    if not isinstance(spec, str) or not isinstance(arguments, Mapping):
        raise _bad_record("spec and arguments")
    if classes is not None and (type(classes) is not int or classes < 1):
        raise _bad_record("num_classes")
    check_consent(spec, trusted(trust))
    check_recorded(spec, arguments)
    return spec, classes, dict(arguments)


def _bad_record(what: str) -> SpecError:
    return SpecError(
        "source",
        got=f"a record with a bad {what}",
        need="a record made by normswap",
        hint="saving again",
    )


def original(origin: Mapping[str, Any], *, trust: Trust = None) -> nn.Module:
    """The BatchNorm model with the weights it had when it was loaded, proven by their SHA-256.

    Args:
        origin: a record, of which nothing is believed.
        trust: the ``python:`` and ``hf-hub:`` sources that the user has typed.

    Raises:
        ConsentError: the record names code that the user has not consented to.
        SpecError, CheckpointError: they cannot be had again, or are not the same.
    """
    if origin.get("weights") not in ("pretrained", "checkpoint"):
        raise SpecError(
            str(origin.get("spec")),
            got="a model that started from random weights",
            need="one from pretrained weights or a checkpoint",
            hint="naming the original explicitly",
        )
    spec, classes, arguments = _checked(origin, trust)
    checkpoint = origin.get("checkpoint")
    if not isinstance(checkpoint, str | type(None)):
        raise _bad_record("checkpoint")
    if checkpoint is not None:
        checkpoint = str(find_checkpoint(str(origin.get("sha256")), checkpoint))
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise CheckpointError(
            checkpoint,
            got="no such file here",
            need="the checkpoint that the original's weights came from",
            hint="working in the folder that holds it, or giving that file with --teacher",
        )
    prefix, ignore_head = origin.get("checkpoint_prefix"), origin.get("ignore_head", False)
    if not isinstance(prefix, str | type(None)) or not isinstance(ignore_head, bool):
        raise _bad_record("checkpoint_prefix or ignore_head")
    channels = _recorded_channels(arguments)
    source = build(
        spec,
        checkpoint=checkpoint,
        num_classes=classes,
        in_chans=channels,
        checkpoint_prefix=prefix,
        ignore_head=ignore_head,
        recorded=True,
    )
    if source.origin is None or source.origin["sha256"] != origin.get("sha256"):
        raise CheckpointError(
            str(origin.get("checkpoint") or origin["spec"]),
            got="other weights than those the model was converted from",
            need=f"SHA-256 {str(origin.get('sha256'))[:12]}…",
            hint="the original file",
        )
    return source.model


def _recorded_channels(arguments: Mapping[str, Any]) -> int | None:
    """Channels that a build was asked for; its table of arguments has checked the number."""
    found = {**arguments, **arguments.get("options", {})}.get("in_chans")
    return int(found) if found is not None else None


def original_of(model: nn.Module) -> nn.Module:
    """The BatchNorm network that a model of known source was made from, with its weights.

    Args:
        model: from ``load_model`` or ``load``, converted or not; it is not changed.

    Raises:
        ConsentError: its record names code that the user has not consented to.
        SpecError, CheckpointError: its source is not known, or the weights cannot be had again.
    """
    record = provenance_of(model)
    return original(_known(record.source), trust=record.trusted)


def architecture_of(model: nn.Module) -> nn.Module:
    """As ``original_of``, with whatever weights: nothing is read or downloaded for them."""
    record = provenance_of(model)
    return rebuild(_known(record.source), trust=record.trusted).to(running.device_of(model))


def _known(origin: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if origin is None:
        raise SpecError(
            "the model",
            got="a model whose source is not known",
            need="one from load_model or load",
            hint="the BatchNorm original itself, or the spec that the model was made from",
        )
    return origin


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's state."""
    return files.weights_digest(model.state_dict())


def resize_head(
    model: nn.Module, num_classes: int, class_names: Sequence[str] | None = None
) -> list[str]:
    """Give a model (converted or not) a fresh head of another size, and record it.

    The layers are those whose shapes change when its source is built with ``num_classes``, so
    auxiliary and detection heads are included.

    Returns:
        The names of the replaced layers; empty if the head had that size already.

    Raises:
        SpecError: the model's source is unknown or takes no ``num_classes``.
    """
    origin = provenance_of(model).source
    if origin is None:
        raise SpecError(
            "num_classes",
            got="a model of unknown source",
            need="one from load_model",
            hint="replacing its last layer before, or load_model('python:module:factory')",
        )
    origin = {**origin, "num_classes": num_classes}
    fresh = rebuild(origin, trust=provenance_of(model).trusted)
    names = graft_head(model, fresh)
    if hasattr(model, "num_classes"):
        setattr(model, "num_classes", num_classes)  # noqa: B010  (nn.Module has no such field)
    names_tuple = None if class_names is None else tuple(class_names)
    remember(model, source=origin, class_names=names_tuple)
    return names


def fit_head(source: Source, classes: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Make a model's classes those of some data: keep its head where it can, else make a fresh one.

    Args:
        source: the model; changed in place where its classes do not cover those of the data.
        classes: the data's.

    Returns:
        The model's classes in the order of its outputs, and whether its head is fresh.

    Raises:
        SpecError: it needs another head, and its source takes no ``num_classes``.
    """
    found, known = tuple(classes), provenance_of(source.model).class_names
    if known is not None and set(found) <= set(known):
        return known, False
    replaced: list[str] = []
    if (_outputs(source) if known is None else len(known)) != len(found):
        replaced = resize_head(source.model, len(found), found)
        if replaced:
            _log.info("new head for %d classes: %s", len(found), ", ".join(replaced))
    elif known is not None:
        _log.info("the head keeps its weights and takes other names: %s", ", ".join(found))
    remember(source.model, class_names=found)
    return found, bool(replaced)


@torch.no_grad()
def _outputs(source: Source) -> int | None:
    """Number of classes: of logits (N, K) or (N, K, H, W), alone or as ``out``, or of boxes."""
    numbers = detector_classes(source.model)
    if source.task == "detection" or numbers is not None:
        return None if numbers is None else numbers.stop
    with running.evaluating(source.model):
        logits = running.call(source.model, source.example_inputs())
    logits = logits.get("out") if isinstance(logits, Mapping) else logits
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 4):
        return None
    return logits.shape[1]


def list_models(pattern: str | None = None) -> list[str]:
    """Names of timm's and torchvision's models, without building or downloading anything.

    Args:
        pattern: shell pattern over the whole name (``"timm/resnet*"``) or over what follows the
            slash (``"resnet50.*"``), or a part of it (``"resnet"``). With a dot in it, timm's
            weight tags are listed too.

    Example:
        >>> list_models("torchvision/resnet5*")
        ['torchvision/resnet50']
    """
    timm = library("timm")
    names = [f"timm/{name}" for name in timm.list_models()]
    if pattern and "." in pattern:
        names += [f"timm/{name}" for name in timm.list_pretrained()]
    names += [f"torchvision/{name}" for name in library("torchvision.models").list_models()]
    if not pattern:
        return names
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    elif "/" not in pattern:
        pattern = f"*/{pattern}"
    return fnmatch.filter(names, pattern)


def count_batchnorms(spec: str) -> int:
    """How many BatchNorm modules a model has; nothing is downloaded or computed.

    Raises:
        SpecError: unknown model.
    """
    family, name = _family(spec)
    model = _without_values(family, Request(spec, name, filled_later=True))
    kind = nn.modules.batchnorm._BatchNorm
    return sum(isinstance(module, kind) for module in model.modules())
