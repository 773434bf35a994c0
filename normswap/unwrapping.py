"""Out again: weights and a short Python file that need torch and the model's own library alone.

What differs from the BatchNorm original is found by comparing the two, module by module, and
written as constructor calls. Layers that are BatchNorm in eval mode (``brn``, ``cbn``, ``frozen``)
are left to be BatchNorm, whose keys they have. The file is run once before it gets its name: its
model must give what this one gives.
"""

from __future__ import annotations

import ast
import inspect
import json
import runpy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap import __version__, standalone
from normswap.checkpoints import save_checkpoint
from normswap.copying import copied
from normswap.errors import ArtifactError, in_short
from normswap.files import contents, draft_folder
from normswap.graph.norms import is_batchnorm
from normswap.layers import ThresholdedLinearUnit, fold_weights
from normswap.provenance import Provenance, provenance_of
from normswap.recipes import recipe_of
from normswap.room import room_for
from normswap.running import call, evaluating, leaves
from normswap.sources import rebuild
from normswap.swap.relu_removal import edited_methods

MODEL, WEIGHTS = "model.py", "model.pth"

_TOLERANCE = 1e-4  # of the output's scale; two forms of one formula


@dataclass
class _Found:
    """What differs from the original.

    Attributes:
        layers: the constructor call for each name; parents before what they hold.
        aliases: further names of those layers.
        blocks: by name, the class whose methods lost calls.
        batchnorms: what each layer that is written as BatchNorm was here, by name.
    """

    layers: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, type[nn.Module]] = field(default_factory=dict)
    batchnorms: dict[str, str] = field(default_factory=dict)


def unwrap(
    model: nn.Module, folder: str | Path, *, example_inputs: Any = None, force: bool = False
) -> Path:
    """Write a model so that it loads without normswap.

    Args:
        model: converted or not, of known source (``load_model``, ``load``); not changed.
        folder: to be made; gets ``model.py``, whose ``build()`` returns the model in eval mode, and
            ``model.pth``, its state dict. What is known of its images and its classes stands in
            ``model.py`` as ``PREPROCESSING`` and ``CLASS_NAMES``.
        example_inputs: what the written model is compared on with this one; None compares keys
            and shapes alone. See :func:`normswap.graph.call`.
        force: replace the two files in a folder that exists.

    Returns:
        The folder.

    Raises:
        ArtifactError: the source is not known, a layer cannot be written plainly, the folder is in
            use, or the written model is not this one.

    Example:
        >>> import tempfile, normswap
        >>> source = normswap.load_model("timm/test_resnet", pretrained=False)
        >>> x = source.example_inputs()
        >>> _ = normswap.convert(source.model, "gn", example_inputs=x)
        >>> with tempfile.TemporaryDirectory() as home:
        ...     folder = unwrap(source.model, home + "/plain", example_inputs=x)
        ...     sorted(path.name for path in folder.iterdir())
        ['model.pth', 'model.py']
    """
    target = Path(folder)
    _check_target(target, force)
    origin = provenance_of(model).source
    if origin is None:
        raise ArtifactError(
            str(target),
            got="a model whose source is not known",
            need="a model that load_model built, or an artefact saved with its source",
            hint="save(model, directory, source='python:package.module:factory')",
        )
    plain = fold_weights(copied(model))
    # what is written below is code made of the record: rebuild refuses a record that is not plain
    original = rebuild(origin, trust=provenance_of(model).trusted)
    found = _differences(original, plain)
    text = _text(origin, found, plain, provenance_of(model))
    with room_for(target, ArtifactError), draft_folder(target, (WEIGHTS, MODEL)) as draft:
        _check_target(target, force)  # again: somebody may have been there meanwhile
        save_checkpoint(_plain_state(plain), draft / WEIGHTS)
        (draft / MODEL).write_text(text, encoding="utf-8")
        _check(draft / MODEL, model, example_inputs, str(target))
    return target


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ArtifactError(str(target), got="a file", need="a folder", hint="another name")
    if contents(target) and not force:
        raise ArtifactError(
            str(target),
            got="a folder that is not empty",
            need="a new or empty one",
            hint="another name, or --force (force=True)",
        )


def _plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _differences(original: nn.Module, model: nn.Module) -> _Found:
    found = _Found()
    mine = dict(model.named_modules(remove_duplicate=False))
    first: dict[nn.Module, str] = {}
    for name, old in original.named_modules(remove_duplicate=False):
        new = mine.get(name)
        if new is None or type(new) is type(old):
            continue
        if new in first and name not in found.aliases:
            found.aliases[name] = first[new]
            continue
        first[new] = name
        _note(found, name, old, new)
    return found


def _note(found: _Found, name: str, old: nn.Module, new: nn.Module) -> None:
    recipe = recipe_of(new)
    written = None if recipe is None else recipe.standalone(new)
    if written is not None:
        found.layers[name] = written
    elif recipe is not None and not recipe.per_sample:
        found.batchnorms[name] = recipe.target
    elif isinstance(new, ThresholdedLinearUnit):
        found.layers[name] = f"ThresholdedLinearUnit({new.num_features})"
    elif type(new) is nn.Identity:
        found.layers[name] = "nn.Identity()"
    elif isinstance(new, type(old)) and edited_methods(type(new)):
        found.blocks[name] = type(new)
    elif recipe is not None or not is_batchnorm(old):
        raise ArtifactError(
            name or "the model",
            got=f"a {type(new).__name__} in the place of a {type(old).__name__}",
            need="a layer that torch, or a few lines, can stand in for",
            hint="normswap.load, which needs normswap",
        )


def _text(origin: Mapping[str, Any], found: _Found, model: nn.Module, record: Provenance) -> str:
    if "" in found.layers:
        raise ArtifactError(
            "the model",
            got="a model that is one normaliser and nothing else",
            need="a model that holds its normalisers",
            hint="its state dict alone",
        )
    imports, building = _constructor(origin)
    blocks = list(_blocks(found))
    used = " ".join([*found.layers.values()])
    parts = [
        "\n".join(
            [
                _docstring(origin, found),
                "",
                "from pathlib import Path",
                "",
                *sorted({*imports, "import torch", *_homes(found)}),
                "from torch import Tensor, nn",
                *_globals(found),
            ]
        ),
        _constants(record),
        *(inspect.getsource(kind).rstrip() for kind in _kinds(used)),
        *([_put()] if found.layers else []),
        *blocks,
        _layers(found),
        _build(building, found, model),
    ]
    return "\n\n\n".join(part for part in parts if part) + "\n"


def _docstring(origin: Mapping[str, Any], found: _Found) -> str:
    lines = [
        f'"""{origin["spec"]}, converted with normswap {__version__}, which it needs no more.',
        "",
        "    from model import build",
        "",
        "    model = build()  # in eval mode, with the weights of model.pth",
    ]
    for target in sorted(set(found.batchnorms.values())):
        names = [name for name, kind in found.batchnorms.items() if kind == target]
        lines += [
            "",
            f"{len(names)} layers were {target} and are BatchNorm here, which is the same in eval",
            "mode. Before training further put these in eval mode, or replace them again:"
            if target == "frozen"
            else "mode; trained further, they are BatchNorm:",
            *(f"    {name}" for name in names),
        ]
    return "\n".join([*lines, '"""'])


def _constructor(origin: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The imports and the lines that build the BatchNorm original without weights."""
    family, _, name = str(origin["spec"]).partition("/")
    arguments = dict(origin.get("arguments") or {})
    classes = origin.get("num_classes")
    if family == "torchvision":
        return ["import torchvision"], _torchvision(name, arguments, classes)
    if "architecture" in arguments:
        options = dict(arguments.get("options") or {})
        if classes is not None:
            options["num_classes"] = classes
        called = f"timm.create_model({_call(arguments['architecture'], options)})"
        return ["import timm"], [f"model = {called}"]
    module, _, factory = str(origin["spec"]).removeprefix("python:").partition(":")
    options = {**arguments, **({} if classes is None else {"num_classes": classes})}
    return [f"import {module}"], [f"model = {module}.{factory}({_call(None, options)})"]


def _torchvision(name: str, arguments: dict[str, Any], classes: int | None) -> list[str]:
    options: dict[str, Any] = {"weights": None}
    name = name.partition(":")[0]
    builder = __import__("torchvision").models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    eps = arguments.pop("frozen_eps", None)
    if "transform_input" in arguments:
        options["init_weights"] = False
    options |= arguments
    if classes is not None:
        options["num_classes"] = classes
    lines = [f"model = torchvision.models.get_model({_call(name, options)})"]
    if eps is not None:
        lines += [
            'for module in getattr(model, "backbone", model).modules():',
            "    if isinstance(module, nn.BatchNorm2d):",
            f"        module.eps = {float(eps)!r}",
        ]
    return lines


def _call(first: Any, options: Mapping[str, Any]) -> str:
    words = [] if first is None else [_literal(first)]
    return ", ".join([*words, *(f"{key}={_literal(value)}" for key, value in options.items())])


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    text = repr(value)
    ast.literal_eval(text)  # what is not a literal has no place in the file
    return text


def _kinds(used: str) -> Iterator[type[nn.Module]]:
    for kind in vars(standalone).values():
        own = isinstance(kind, type) and kind.__module__ == standalone.__name__
        if own and f"{kind.__name__}(" in used:
            yield kind


def _put() -> str:
    lines = inspect.getsource(standalone.put).rstrip().splitlines()
    return "\n".join(line.partition("  # type:")[0] for line in lines)


_COMMENT = (
    "# What the images have to be: values from 0 to 1; resized so that the crop is crop_pct of the",
    "# shorter edge (crop_mode center; squash and border keep all of the image), cropped to",
    "# input_size (channels, height, width), less the mean, over the std.",
)


def _constants(record: Provenance) -> str:
    """What is known of images and classes, as plain values."""
    parts = []
    if record.preprocessing:
        lines = [f"    {_literal(k)}: {_literal(v)}," for k, v in record.preprocessing.items()]
        parts.append("\n".join([*_COMMENT, "PREPROCESSING = {", *lines, "}"]))
    if record.class_names:
        lines = [f"    {name!r}," for name in map(str, record.class_names)]
        names = ["# In the order of the model's outputs.", "CLASS_NAMES = [", *lines, "]"]
        parts.append("\n".join(names))
    return "\n\n".join(parts)


def _homes(found: _Found) -> set[str]:
    return {f"import {_base(kind).__module__}" for kind in found.blocks.values()}


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    base: type[nn.Module] = vars(kind)["_normswap_base"]
    return base


def _globals(found: _Found) -> Iterator[str]:
    """What the methods of edited blocks take from the modules that they came from."""
    homes: dict[str, Any] = {}
    for kind in dict.fromkeys(found.blocks.values()):
        module = inspect.getmodule(_base(kind))
        for method in edited_methods(kind).values():
            for name in _names_read(method):
                if module is None or not hasattr(module, name):
                    continue
                value = getattr(module, name)
                if homes.setdefault(name, value) is not value:
                    raise ArtifactError(
                        f"{module.__name__}.{name}",
                        got="two things of one name behind functional activations",
                        need="blocks whose methods can stand in one file",
                        hint="converting with FilterResponseNorm(tlu=False)",
                    )
                if name not in ("torch", "nn", "Tensor", "Path"):
                    yield f"{name} = {module.__name__}.{name}"


def _names_read(text: str) -> Iterable[str]:
    return sorted({n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)})


def _blocks(found: _Found) -> Iterator[str]:
    """One class per edited block class."""
    for number, kind in enumerate(dict.fromkeys(found.blocks.values())):
        base = _base(kind)
        methods = "\n\n".join(edited_methods(kind).values())
        body = "\n".join(f"    {line}" if line else "" for line in methods.splitlines())
        yield (
            f"class {base.__name__}{number}({base.__module__}.{base.__qualname__}):\n"
            f'    """{base.__name__} without the calls whose place a normaliser took."""\n\n{body}'
        )


def _layers(found: _Found) -> str:
    if not found.layers:
        return ""
    lines = [f"        {json.dumps(name)}: {made}," for name, made in found.layers.items()]
    return "\n".join(
        [
            "def layers():",
            '    """What stands in the place of each BatchNorm."""',
            "    return {",
            *lines,
            "    }",
        ]
    )


def _build(building: list[str], found: _Found, model: nn.Module) -> str:
    lines = [
        "def build():",
        '    """The model in eval mode, with its weights."""',
        *(f"    {line}" for line in building),
    ]
    if found.layers:
        lines += ["    for name, new in layers().items():", "        put(model, name, new)"]
    for alias, name in found.aliases.items():
        if name in found.layers:
            names = f"{json.dumps(alias)}, model.get_submodule({json.dumps(name)})"
            lines.append(f"    put(model, {names})")
    order = list(dict.fromkeys(found.blocks.values()))
    for name, kind in found.blocks.items():
        block = f"{_base(kind).__name__}{order.index(kind)}"
        lines.append(f"    model.get_submodule({json.dumps(name)}).__class__ = {block}")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        lines.append(f"    model.to({dtypes.pop()})")
    file = f'Path(__file__).with_name("{WEIGHTS}")'
    lines += [
        f'    weights = torch.load({file}, map_location="cpu", weights_only=True)',
        "    model.load_state_dict(weights)",
        "    return model.eval()",
    ]
    return "\n".join(lines)


def _check(file: Path, model: nn.Module, example_inputs: Any, where: str) -> None:
    """Run the file and compare its model with this one."""
    try:
        plain = runpy.run_path(str(file))["build"]()
        worst = 0.0 if example_inputs is None else _distance(plain, model, example_inputs)
    except Exception as error:
        raise ArtifactError(
            where,
            got=f"a file that does not build this model ({in_short(error)})",
            need="a model that its library can build",
            hint="normswap.load, which needs normswap",
        ) from error
    if not worst <= _TOLERANCE:
        raise ArtifactError(
            where,
            got=f"outputs {worst:.1e} of their scale away",
            need=f"the same model to {_TOLERANCE:.0e}",
            hint="normswap.load, which needs normswap",
        )


def _distance(plain: nn.Module, model: nn.Module, example_inputs: Any) -> float:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model, plain), torch.no_grad():
        pairs = zip(
            leaves(call(plain.to(device), example_inputs)),
            leaves(call(model, example_inputs)),
            strict=True,
        )
        return max(
            (
                float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
                for a, b in pairs
                if b.numel()
            ),
            default=0.0,
        )
