"""What writing makes, and what both of torch's exporters need: options, silence, labels."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass

import onnx
import torch

from normswap.onnx.file.parsing import OnnxFile

MODULES_KEY = "normswap.modules"
MIN_OPSET, MAX_OPSET = 18, 23


@dataclass(frozen=True)
class Options:
    """What shapes the graph.

    Attributes:
        opset: version of the default operator set.
        static_batch: the batch axis has the size of the example inputs.
        dynamic_size: height and width may vary as well.
        half: weights and activations in float16, norms in float32.
        staged: the means of norms are taken in stages, which is slower and more exact.
    """

    opset: int = 20
    static_batch: bool = False
    dynamic_size: bool = False
    half: bool = False
    staged: bool = False


@dataclass(frozen=True)
class Draft:
    """A file that has not been proven.

    Attributes:
        file: the file.
        program: what torch.export made of the model on the way, which can be run; None where
            the file was traced.
        options: how it was written.
        staged: norms whose means are taken in stages.
    """

    file: OnnxFile
    program: torch.export.ExportedProgram | None
    options: Options
    staged: int = 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter: it prints to stdout, logs, and warns of its own internals."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def label(node: onnx.NodeProto, modules: Container[str], scope: str) -> None:
    """Say in a node which modules it computes, in place of all else that it says of itself.

    Args:
        node: of a fresh graph.
        modules: the names of the model's.
        scope: the module in whose forward it was made.
    """
    owners = [name.rpartition(".")[0] for name in node.input if "." in name]
    names = dict.fromkeys([owner for owner in owners if owner and owner in modules] + [scope])
    del node.metadata_props[:]
    node.metadata_props.add(key=MODULES_KEY, value=",".join(names))


def modules_of(node: onnx.NodeProto) -> tuple[str, ...]:
    """The modules that a node computes, the convolution before the BN folded into it."""
    for entry in node.metadata_props:
        if entry.key == MODULES_KEY:
            return tuple(entry.value.split(","))
    return ()
