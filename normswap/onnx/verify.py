"""Check a file again: what it is, and what it computes. Free of torch unless a model is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.children import SECONDS
from normswap.errors import ExportError
from normswap.onnx.file.metadata import read_metadata
from normswap.onnx.file.parity import Parity, check_tolerance
from normswap.onnx.file.parsing import read_onnx
from normswap.onnx.file.session import Apart, Here, check_timeout, resolve_provider
from normswap.onnx.file.verifying import verify_alone

if TYPE_CHECKING:
    from torch import nn


def verify_onnx(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    example_inputs: Any = None,
    provider: str | None = None,
    images: Any = None,
    tolerance: float | None = None,
    timeout: float | None = SECONDS,
) -> Parity:
    """Check that an ONNX file is the one that was proven, and that it computes what it should.

    Identity: the SHA-256 over nodes, attributes and initializers, and the one over the metadata.
    Function: without ``model`` the file's own self-test, on any machine with numpy, onnx and
    onnxruntime; with it the proof of ``export_onnx`` against the model.

    Args:
        path: the file.
        model: the model that the file should equal; needs torch.
        example_inputs: inputs for ``model``: a tensor or list is one positional argument, a tuple
            the positional arguments, a dict the keyword arguments.
        provider: onnxruntime execution provider, for example ``"cuda"``; CPU by default.
        images: preprocessed images for the proof, beside random inputs.
        tolerance: largest error that passes, in place of the rule's.
        timeout: seconds that the file may run in all, in a process of its own that may take 8 GiB;
            None runs it in this process, without limits.

    Returns:
        The verdict; a mismatch is ``passed=False`` with ``failure`` in words, never an exception.

    Raises:
        ExportError: a file that is no ONNX model, that is not safe to open, or that carries
            nothing to check it by while no model is given.
    """
    check_tolerance(tolerance)
    check_timeout(timeout)
    if model is None and any(given is not None for given in (tolerance, images, example_inputs)):
        raise ExportError(
            "tolerance, images or example_inputs",
            got="one of them without a model",
            need="the model to prove the file against; the self-test brings its own",
            hint="--model MODEL (model=…)",
        )
    file = read_onnx(path)
    metadata = read_metadata(file)
    device = resolve_provider(provider)
    if model is None:
        return verify_alone(file, metadata, device, timeout)
    from normswap.onnx.proving.proof import prove_file

    return prove_file(
        file,
        model,
        example_inputs,
        metadata,
        runner=Here(device) if timeout is None else Apart(device, timeout),
        images=images,
        tolerance=tolerance,
    )
