"""Can a model be the reference of a proof at all? One that computes NaN equals nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from normswap.graph.numbers import impossible_statistics
from normswap.onnx.proving.trials import Trial
from normswap.onnx.subject import Subject, flat_tensors


def unsound(subject: Subject, trials: Sequence[Trial]) -> str | None:
    """Why a proof against a model would prove nothing; None if nothing speaks against it.

    NaN inside counts also where no output shows it: an ``argmax`` of NaN is a number.

    Args:
        subject: the model, in its own precision.
        trials: inputs of the proof; of those that are cut from one pool the first is run.
    """
    impossible = next(_impossible(subject.model), None)
    if impossible is not None:
        return impossible
    pooled = [trial for trial in trials if trial.rows is not None]
    for trial in [*pooled[:1], *(trial for trial in trials if trial.rows is None)]:
        where = _first_nan(subject, trial)
        if where is not None:
            return f"{where} on {trial.name}"
    return None


def _impossible(model: nn.Module) -> Iterator[str]:
    """Stored numbers that no arithmetic survives."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.isnan().any():
            yield f"{name} holds NaN"
    for name, what in impossible_statistics(model).items():
        yield f"{name} holds {what}"


def _first_nan(subject: Subject, trial: Trial) -> str | None:
    """The first module that gives NaN, or an output that is not finite."""
    seen: list[str] = []

    def watch(name: str, output: object) -> None:
        if not seen and any(
            tensor.is_floating_point() and bool(tensor.isnan().any())
            for tensor in flat_tensors(output)
        ):
            seen.append(f"{name or 'the model'} gives NaN")

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: watch(name, output))
        for name, module in subject.model.named_modules()
    ]
    try:
        outputs = subject.run(trial.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, output in zip(subject.outputs, outputs, strict=True):
        if not seen and output.dtype.kind == "f" and not torch.from_numpy(output).isfinite().all():
            seen.append(f"output {name!r} is not finite")
    return seen[0] if seen else None
