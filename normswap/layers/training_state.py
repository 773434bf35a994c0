"""The part of training that lives in layers but not in a model's state dict.

Iteration counters of schedules and CBN's history: a training checkpoint saves them so that a
resumed run is the same run; a model that is shipped does not carry them.
"""

from __future__ import annotations

from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.batch_statistics import TracksBatches

State = dict[str, dict[str, Tensor | int]]


def training_state(model: nn.Module) -> State:
    """Collect counters and history of every layer in ``model`` that keeps any: BRN and CBN.

    Args:
        model: any module.

    Returns:
        Qualified name to plain data; ``torch.save`` takes it, also for ``weights_only=True``.

    Example:
        >>> from normswap.layers import BatchRenorm1d
        >>> training_state(nn.Sequential(BatchRenorm1d(2)))
        {'0': {'iteration': 0}}
    """
    return {name: layer.training_state() for name, layer in _stateful(model).items()}


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
        layer.load_training_state(state[name])


def _stateful(model: nn.Module) -> dict[str, TracksBatches]:
    return {n: module for n, module in model.named_modules() if isinstance(module, TracksBatches)}
