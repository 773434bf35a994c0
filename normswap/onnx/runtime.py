"""An ONNX file as a torch module, so that whatever evaluates a model can evaluate the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import ExportError, ParityError, in_short
from normswap.onnx.file.metadata import read_metadata
from normswap.onnx.file.parsing import read_onnx
from normswap.onnx.file.session import open_session, resolve_provider
from normswap.onnx.writing.subject import as_array


class OnnxModel(nn.Module):
    """Runs an ONNX file with onnxruntime; tensors in, tensors out. It has no parameters.

    Args:
        path: the file.
        provider: onnxruntime execution provider.
        preprocessing: as recorded in the file (JSON form of ``data.Preprocessing``), or None.
        class_names: as recorded in the file, or None.

    Shape:
        As the file's inputs and outputs; a file of one output gives one tensor, of several a dict
        by name.
    """

    def __init__(
        self,
        path: Path,
        provider: str,
        *,
        preprocessing: dict[str, Any] | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.preprocessing = preprocessing
        self.class_names = class_names
        self._session = open_session(path, "all", provider)
        self._dtypes = [_numpy_dtype(item.type) for item in self._session.get_inputs()]
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        self.batch_size = _fixed(self._session.get_inputs()[0].shape)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Run the file."""
        if len(inputs) != len(self.input_names):
            raise ExportError(
                str(self.path),
                got=f"{len(inputs)} inputs",
                need=f"{len(self.input_names)}: {', '.join(self.input_names)}",
                hint="as many tensors",
            )
        arrays = [as_array(x).astype(t) for x, t in zip(inputs, self._dtypes, strict=True)]
        try:
            found = self._session.run(None, dict(zip(self.input_names, arrays, strict=True)))
        except Exception as error:
            raise ExportError(
                str(self.path),
                got=in_short(error),
                need="inputs that the file takes",
                hint=f"a batch of {self.batch_size}" if self.batch_size else "another image size",
            ) from error
        tensors = [torch.from_numpy(array.copy()).to(inputs[0].device) for array in found]
        if len(tensors) == 1:
            return tensors[0]
        return dict(zip(self.output_names, tensors, strict=True))


def load_onnx(path: str | Path, *, provider: str | None = None) -> OnnxModel:
    """Open an ONNX file as a torch module, for ``evaluate`` and the like.

    Args:
        path: the file; one that normswap did not make is fine, an edited one is not.
        provider: onnxruntime execution provider, for example ``"cuda"``; CPU by default.

    Raises:
        ParityError: the file was edited after its proof.
        ExportError: a file that is no ONNX model, or that onnxruntime cannot open.
    """
    file = read_onnx(path)
    metadata = read_metadata(file)
    if metadata is not None and metadata.problem is not None:
        raise ParityError(
            str(path), got=metadata.problem, need="the file as it was proven", hint="another copy"
        )
    fields = metadata.fields if metadata is not None else {}
    names, preprocessing = fields.get("class_names"), fields.get("preprocessing")
    device = resolve_provider(provider)
    try:
        return OnnxModel(
            file.path,
            device,
            preprocessing=preprocessing if isinstance(preprocessing, dict) else None,
            class_names=tuple(str(name) for name in names) if isinstance(names, list) else None,
        )
    except Exception as error:
        raise ExportError(
            str(path),
            got=f"an error from onnxruntime: {in_short(error)}",
            need="a model that onnxruntime can run",
            hint="exporting it again",
        ) from error


def _numpy_dtype(kind: str) -> str:
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _fixed(shape: list[Any]) -> int | None:
    return shape[0] if shape and isinstance(shape[0], int) else None
