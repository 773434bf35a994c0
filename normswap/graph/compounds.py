"""What a module is, decided by what it runs: one operation, or several that count by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normswap.graph.norms import is_batchnorm
from normswap.graph.trace import Call, Trace
from normswap.graph.vocabulary import (
    ACTIVATION_FUNCTIONS,
    PRODUCER_OPS,
    activation_module_op,
    is_plain,
    producer_module_op,
)


@dataclass(frozen=True)
class Role:
    """What a module claims to be.

    Attributes:
        op: canonical name of its operation.
        whole: it is that operation and nothing else, whatever it runs to do it.
    """

    op: str
    whole: bool


@dataclass(eq=False)
class Frame:
    """A module that runs at the moment.

    Attributes:
        module: the module.
        call: what to record of it if it is one operation.
        before: its tensors and their versions when it was called.
        start: how many calls were recorded by then.
    """

    module: nn.Module
    call: Call
    before: list[tuple[Tensor, int]]
    start: int


def role_of(module: nn.Module) -> Role | None:
    """What a module claims to be by its class; None: nothing in particular."""
    if is_batchnorm(module):
        return Role("batch_norm", whole=True)
    op = producer_module_op(module) or activation_module_op(module)
    return None if op is None else Role(op, is_plain(module))


def one_operation(frame: Frame, trace: Trace, made: int, output: Any) -> str | None:
    """Canonical name of the one operation that a module turned out to be; None: it is several.

    Args:
        frame: the module's.
        trace: all calls so far; those since ``frame.start`` ran inside the module.
        made: number of the value that it returned.
        output: what it returned.
    """
    inner = trace.calls[frame.start :]
    if any(call.op == "batch_norm" and not call.on_weights for call in inner):
        return None
    producers = [call for call in inner if call.op in PRODUCER_OPS]
    if frame.call.op in PRODUCER_OPS:
        return _producer(frame, producers, inner, trace.made.get(made))
    return None if producers else _activation(frame, inner, output)


def _producer(
    frame: Frame, producers: list[Call], inner: list[Call], last: Call | None
) -> str | None:
    if not inner:
        return frame.call.op  # code that cannot be looked into
    active = any(call.op in ACTIVATION_FUNCTIONS and not call.on_weights for call in inner)
    if len(producers) != 1 or active:
        return None
    frame.call.own_weight = producers[0].own_weight and last is producers[0]
    return producers[0].op


def _activation(frame: Frame, inner: list[Call], output: Any) -> str | None:
    claimed = frame.call.op
    if len(inner) == 1 and inner[0].op in ACTIVATION_FUNCTIONS:
        # only torch's own ReLU module may be taken out whole
        apart = inner[0].op == "relu" and claimed != "relu"
        return None if apart else inner[0].op
    if inner and claimed == "relu":
        return None
    same = isinstance(output, Tensor) and tuple(output.shape) == frame.call.shape
    return claimed if same or claimed == "glu" or not frame.call.shape else None
