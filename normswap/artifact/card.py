"""The model card: ``normswap.json`` as a page to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def model_card(document: Mapping[str, Any], name: str, *, where: str | None = None) -> str:
    """The README of an artefact.

    Args:
        document: the content of ``normswap.json``.
        name: of the directory.
        where: the spec under which it can be loaded, if it is not a directory.

    Example:
        >>> print(model_card({"model": "ResNet", "plans": []}, "out").splitlines()[0])
        # out
    """
    parts = [
        f"# {name}",
        _facts(document),
        _swaps(document.get("plans") or []),
        _history(document.get("history") or []),
        _classes(document.get("class_names") or []),
        _loading(document, name if where is None else where),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(document: Mapping[str, Any]) -> str:
    source = document.get("source") or {}
    wanted = document.get("preprocessing") or {}
    classes = document.get("class_names")
    versions = document.get("versions") or {}
    rows = [
        ("model", document.get("model")),
        ("source", source.get("spec") or "not known"),
        ("weights it started from", source.get("weights")),
        ("parameters", document.get("parameters")),
        ("type", document.get("dtype")),
        ("input", " × ".join(str(edge) for edge in wanted.get("input_size") or ())),
        ("mean, std", _pair(wanted.get("mean"), wanted.get("std"))),
        ("classes", None if classes is None else len(classes)),
        *_scores(document.get("history") or []),
        ("made with", ", ".join(f"{key} {value}" for key, value in versions.items())),
        ("SHA-256 of the weights", document.get("sha256")),
    ]
    return _table(("", ""), [(label, value) for label, value in rows if value not in (None, "")])


_SCORES = (
    ("val", "score on the validation images"),
    ("original", "score of the BatchNorm original there"),
    ("start", "score before fine-tuning there"),
)


def _scores(history: Sequence[Any]) -> list[tuple[str, str | None]]:
    """What the last fine-tune measured: of what it left, of the original and of its start."""
    steps = [entry for entry in history if isinstance(entry, Mapping)]
    measured = [entry for entry in steps if entry.get("step") == "fine-tuned"]
    if not measured:
        return []
    return [(label, _score(measured[-1], which)) for which, label in _SCORES]


def _score(facts: Mapping[str, Any], which: str) -> str | None:
    metric, top1 = facts.get(f"{which}_metric"), facts.get(f"{which}_top1")
    if isinstance(metric, int | float):  # mean IoU, mAP, or one's own, of any scale
        return f"{metric:.4g}"
    return f"top-1 {100 * top1:.1f} %" if isinstance(top1, int | float) else None


def _pair(mean: Any, std: Any) -> str:
    return f"{mean}, {std}" if mean and std else ""


def _swaps(plans: Sequence[Mapping[str, Any]]) -> str:
    if not plans:
        return "## What was swapped\n\nNothing: this is the BatchNorm original."
    sections = ["## What was swapped"]
    for plan in plans:
        entries = [entry for entry in plan.get("entries") or [] if isinstance(entry, Mapping)]
        counts = Counter((entry.get("kind"), entry.get("becomes")) for entry in entries)
        target = _cell(plan.get("target")).replace("`", "'")
        sections.append(f"Target `{target}`, {len(entries)} layers.")
        sections.append(
            _table(
                ("from", "to", "layers"),
                [(before, after, number) for (before, after), number in counts.items()],
            )
        )
        details = [
            (
                ", ".join(f"`{name}`" for name in entry.get("names") or ()),
                entry.get("becomes"),
                _options(entry.get("recipe")),
                entry.get("init"),
                entry.get("reason"),
            )
            for entry in entries
        ]
        table = _table(("layer", "to", "options", "init", "why"), details)
        sections.append(f"<details><summary>Every layer</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(sections)


def _options(recipe: Any) -> str:
    if not isinstance(recipe, Mapping):
        return ""
    return ", ".join(
        f"{key}={value}" for key, value in recipe.items() if value is not None and key != "target"
    )


def _history(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    rows = [
        (entry.get("step"), _options({k: v for k, v in entry.items() if k != "step"}))
        for entry in history
    ]
    return "## History\n\n" + _table(("step", "facts"), rows)


_MANY = 1000


def _classes(names: Sequence[Any]) -> str:
    if not names:
        return ""
    listed = "\n".join(f"{number}. {_cell(name)}" for number, name in enumerate(names[:_MANY]))
    return f"<details><summary>{len(names)} classes</summary>\n\n{listed}\n\n</details>"


def _loading(document: Mapping[str, Any], name: str) -> str:
    into = "" if document.get("source") else ", into=your_freshly_built_batchnorm_model"
    call = (
        f'normswap.load_model("{name}").model'
        if name.startswith("hf-hub:")
        else f'normswap.load("{name}"{into})'
    )
    return (
        f"## How to load it\n\n```python\nimport normswap\n\nmodel = {call}\n```\n\n"
        f"```sh\nnormswap export {name} -o model.onnx   # ONNX, with its proof\n"
        f"normswap unwrap {name} -o plain        # weights and a file that do without normswap\n```"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Text and neither table, link nor HTML: some of it comes from files."""
    text = " ".join(("" if value is None else str(value)).split())
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "] (")
