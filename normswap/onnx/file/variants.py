"""A file with other score thresholds, or with inner values among its outputs. Free of torch.

At its own threshold a detector may give nothing on the images at hand, and two files that give
nothing are equal in nothing that matters. So the one constant that decides is changed, in a copy.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from normswap.onnx.file.parsing import OnnxFile, is_external


def with_threshold(
    proto: onnx.ModelProto, own: Sequence[float], other: float
) -> onnx.ModelProto | None:
    """A copy in which scores are held against another threshold.

    Args:
        proto: a detector.
        own: the thresholds that it has.
        other: the one that the copy has.

    Returns:
        The copy; None if not every one of ``own`` is a constant of some ``score > constant``.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    constants = {t.name: t for t in copy.graph.initializer if not is_external(t)}
    wanted = {np.float32(value) for value in own}
    seen: set[np.float32] = set()
    for node in copy.graph.node:
        constant = constants.get(node.input[1]) if _compares(node) else None
        if constant is None or math.prod(constant.dims) != 1:
            continue
        try:
            values = numpy_helper.to_array(constant)
        except (ValueError, TypeError, KeyError):  # a stranger's constant that holds no number
            continue
        if (
            values.size == 1
            and values.dtype.kind == "f"
            and np.float32(values.reshape(-1)[0]) in wanted
        ):
            seen.add(np.float32(values.reshape(-1)[0]))
            name = f"{node.output[0]}.threshold"
            fresh = np.full(values.shape, other, values.dtype)
            copy.graph.initializer.append(numpy_helper.from_array(fresh, name))
            node.input[1] = name
    return copy if wanted and seen == wanted else None


def _compares(node: onnx.NodeProto) -> bool:
    return node.op_type == "Greater" and len(node.input) == 2 and len(node.output) == 1


def with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that gives inner values too, after its own outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name in names:
        copy.graph.output.add().name = name
    return copy


@contextlib.contextmanager
def written(file: OnnxFile, proto: onnx.ModelProto) -> Iterator[Path]:
    """A variant of a file where it can be run, gone afterwards.

    It lies beside the file only where it must: with its data outside. The file's own graph is no
    variant, and lies there already.
    """
    if proto is file.proto:
        yield file.path
        return
    with tempfile.TemporaryDirectory(prefix="normswap-") as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "variant.onnx"
        if file.reaches_out:
            stream = stack.enter_context(
                tempfile.NamedTemporaryFile(
                    dir=file.folder, prefix=f".{file.path.name}.", suffix=".onnx"
                )
            )
            path = Path(stream.name)
        path.write_bytes(proto.SerializeToString())
        yield path
