"""An ONNX file as a torch module, so that whatever evaluates a model can evaluate the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.children import SECONDS
from normswap.errors import ExportError, ParityError
from normswap.onnx.file.detections import detects
from normswap.onnx.file.metadata import read_metadata
from normswap.onnx.file.parsing import read_onnx
from normswap.onnx.file.session import (
    Failed,
    Session,
    check_timeout,
    open_apart,
    open_here,
    resolve_provider,
)
from normswap.onnx.subject import as_array


class OnnxModel(nn.Module):
    """Runs an ONNX file with onnxruntime; tensors in, tensors out. It has no parameters.

    Args:
        path: the file.
        session: the opened file.
        preprocessing: as recorded in the file (JSON form of ``data.Preprocessing``), or None.
        class_names: as recorded in the file, or None.

    Shape:
        As the file's inputs and outputs; a file of one output gives one tensor, of several a dict
        by name. A detector takes a list of images and gives a list of dicts, as torchvision's do.
    """

    def __init__(
        self,
        path: Path,
        session: Session,
        *,
        preprocessing: dict[str, Any] | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.preprocessing = preprocessing
        self.class_names = class_names
        self._session = session
        self._dtypes = [_numpy_dtype(value.type) for value in session.inputs]
        self.input_names = tuple(value.name for value in session.inputs)
        self.output_names = tuple(value.name for value in session.outputs)
        self.detector = len(self.input_names) == 1 and detects(self.output_names)
        self.batch_size = None if self.detector else _fixed(session.inputs[0].shape)

    def forward(self, *inputs: Any) -> Any:
        """Run the file; a detector's once for each image."""
        if not self.detector:
            return self._run(*inputs)
        rank = len(self._session.inputs[0].shape)
        images = inputs[0] if len(inputs) == 1 else inputs
        return [
            self._run(image.reshape((1,) * (rank - image.ndim) + image.shape)) for image in images
        ]

    def _run(self, *inputs: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if len(inputs) != len(self.input_names):
            raise ExportError(
                str(self.path),
                got=f"{len(inputs)} inputs",
                need=f"{len(self.input_names)}: {', '.join(self.input_names)}",
                hint="as many tensors",
            )
        arrays = [as_array(x).astype(t) for x, t in zip(inputs, self._dtypes, strict=True)]
        found = self._session.run(arrays)
        if isinstance(found, Failed):
            raise ExportError(
                str(self.path),
                got=found.message,
                need="inputs that the file takes",
                hint=f"a batch of {self.batch_size}" if self.batch_size else "another image size",
            )
        tensors = [torch.from_numpy(array.copy()).to(inputs[0].device) for array in found]
        if len(tensors) == 1:
            return tensors[0]
        return dict(zip(self.output_names, tensors, strict=True))


def load_onnx(
    path: str | Path, *, provider: str | None = None, timeout: float | None = SECONDS
) -> OnnxModel:
    """Open an ONNX file as a torch module, for ``evaluate`` and the like.

    Args:
        path: the file; one that normswap did not make is fine, an edited one is not.
        provider: onnxruntime execution provider, for example ``"cuda"``; CPU by default.
        timeout: seconds that opening the file, and each batch, may take in a process of its own
            that may take 8 GiB; None runs it in this process, without limits.

    Raises:
        ParityError: the file was edited after its proof.
        ExportError: a file that is no ONNX model, or that onnxruntime cannot open.
    """
    check_timeout(timeout)
    file = read_onnx(path)
    metadata = read_metadata(file)
    if metadata is not None and metadata.problem is not None:
        raise ParityError(
            str(path), got=metadata.problem, need="the file as it was proven", hint="another copy"
        )
    fields = metadata.fields if metadata is not None else {}
    names, preprocessing = fields.get("class_names"), fields.get("preprocessing")
    device = resolve_provider(provider)
    session: Session | Failed = (
        open_here(file.path, "all", device)
        if timeout is None
        else open_apart(file.path, "all", device, timeout)
    )
    if isinstance(session, Failed) or not session.inputs:
        raise ExportError(
            str(path),
            got=session.message if isinstance(session, Failed) else "a graph without inputs",
            need="a model that onnxruntime can run",
            hint="exporting it again",
        )
    return OnnxModel(
        file.path,
        session,
        preprocessing=preprocessing if isinstance(preprocessing, dict) else None,
        class_names=tuple(str(name) for name in names) if isinstance(names, list) else None,
    )


def _numpy_dtype(kind: str) -> str:
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _fixed(shape: Sequence[Any]) -> int | None:
    return shape[0] if shape and isinstance(shape[0], int) else None
