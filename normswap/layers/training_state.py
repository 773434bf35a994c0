"""The part of training that lives in layers but not in a model's state dict.

Iteration counters of schedules and CBN's history: a training checkpoint saves them so that a
resumed run is the same run; a model that is shipped does not carry them.
"""

from __future__ import annotations

from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.batch_renorm import _BatchRenorm
from normswap.layers.cross_iteration_batch_norm import _CrossIterationBatchNorm

State = dict[str, dict[str, Tensor | int]]


def training_state(model: nn.Module) -> State:
    """Collect counters and history of every BatchRenorm and CrossIterationBatchNorm in ``model``.

    Args:
        model: any module.

    Returns:
        Qualified name to plain data; ``torch.save`` takes it, also for ``weights_only=True``.

    Example:
        >>> from normswap.layers import BatchRenorm1d
        >>> training_state(nn.Sequential(BatchRenorm1d(2)))
        {'0': {'iteration': 0}}
    """
    return {name: _state_of(layer) for name, layer in _stateful(model).items()}


def load_training_state(model: nn.Module, state: State) -> None:
    """Restore what :func:`training_state` collected; checks all names before it changes anything.

    Args:
        model: the model, converted the same way.
        state: what was collected.

    Raises:
        LayerError: the names in ``state`` and in ``model`` differ.
    """
    layers = _stateful(model)
    if layers.keys() != state.keys():
        differing = sorted(layers.keys() ^ state.keys())
        raise LayerError(
            "load_training_state",
            got=f"{len(state)} layers, of which these differ: {', '.join(differing[:5])}",
            need=f"the {len(layers)} BatchRenorm and CrossIterationBatchNorm layers of the model",
            hint="the model as it was when the checkpoint was written",
        )
    for name, layer in layers.items():
        layer.iteration = int(state[name]["iteration"])
        if isinstance(layer, _CrossIterationBatchNorm):
            layer._history.load(state[name])


def _stateful(model: nn.Module) -> dict[str, _BatchRenorm | _CrossIterationBatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchRenorm | _CrossIterationBatchNorm)
    }


def _state_of(layer: _BatchRenorm | _CrossIterationBatchNorm) -> dict[str, Tensor | int]:
    state: dict[str, Tensor | int] = {"iteration": layer.iteration}
    if isinstance(layer, _CrossIterationBatchNorm):
        state.update(layer._history.state())
    return state
