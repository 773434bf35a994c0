"""Write an ONNX file under its final name only when it is proven equal to the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.errors import ExportError, ParityError
from normswap.files import put_files_in_place, scratch_folder
from normswap.onnx.file.metadata import sign
from normswap.onnx.file.parity import Parity, check_tolerance
from normswap.onnx.file.parsing import avoid_data_of, data_of
from normswap.onnx.proving.proof import asked_of, prove_fastest
from normswap.onnx.subject import subject_of
from normswap.onnx.writing.draft import MAX_OPSET, MIN_OPSET, Options
from normswap.onnx.writing.record import record_of
from normswap.passage import refuse_crossing
from normswap.room import room_for

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger("normswap")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any,
    opset: int = 20,
    static_batch: bool = False,
    dynamic_size: bool = False,
    half: bool = False,
    tolerance: float | None = None,
    allow_mismatch: bool = False,
    images: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Parity:
    """Export a model to ONNX and prove the file equal to it before it gets its name.

    ``error = max|onnxruntime − float64| / max|float64|`` must stay within
    ``max(1e-4, 3·error(torch))``, never above 1e-3, at batch sizes 1, 2 and 5, with onnxruntime's
    optimisations off, basic and all, for the model and for a copy with randomised statistics.
    ``error(torch)`` is the largest that torch itself makes on any of these inputs.

    A detector of torchvision's form (a list of images in; boxes, labels and scores out) becomes a
    file for one image, written by torch's older exporter. Its detections are compared as sets, with
    the same tolerances for boxes and scores, on images on which rounding changes none of them; only
    those whose score lies within the tolerance of the threshold are free. Where it finds nothing,
    its threshold is moved in a copy of the file; its last layers are compared value by value.

    Args:
        model: any module; it is copied, never changed, and exported in eval mode.
        path: the file; written beside itself first and renamed when proven.
        example_inputs: a tensor or list is one positional argument, a tuple the positional
            arguments, a dict the keyword arguments.
        opset: of the default operator set, 18 to 23; of a detector up to 20. From 21 on torch
            writes ``GroupNormalization``, for which onnxruntime's CPU provider has no kernel.
        static_batch: fix the batch axis at the size of the example; else it is named ``batch``. A
            detector's file takes one image either way.
        dynamic_size: let height and width vary as well.
        half: weights and activations in float16, norms, inputs and outputs in float32; the
            tolerance is then ``max(1e-2, 3·error(torch))``, never above 5e-2.
        tolerance: largest error that passes, in place of the rule; the file's self-test allows it
            too, up to 5e-2.
        allow_mismatch: write the file even if the proof fails, marked so in its metadata.
        images: preprocessed images for the proof, beside random inputs.
        input_names: names of the file's inputs; by default ``image`` where images are all that the
            model takes, else the names of its arguments.
        output_names: names of the file's outputs; by default ``logits`` where the model gives one
            row per image, the keys of a dict, ``boxes``, ``labels``, ``scores`` and what else a
            detector gives, and ``output`` otherwise.

    Returns:
        The proof.

    Raises:
        ParityError: the proof failed; ``error.parity`` is the report.
        ExportError: torch cannot export the model, the destination cannot be written, or
            ``tolerance`` is not between 0 and 1.
    """
    check_tolerance(tolerance)
    refuse_crossing(model, str(path))
    target = _destination(Path(path), opset)
    options = Options(opset, static_batch, dynamic_size, half)
    subject = subject_of(model, example_inputs).named(input_names, output_names)
    if opset >= 21:
        _LOG.warning("opset %d: GroupNormalization has no CPU kernel in onnxruntime", opset)
    with _staging(target) as folder:
        asked = asked_of(subject, options, images=images, tolerance=tolerance)
        draft, parity = prove_fastest(asked, folder / target.name, options)
        if not parity.passed and not allow_mismatch:
            raise _failure(target, parity)
        test = asked.self_test(draft.file, parity)
        record = record_of(model, draft.options, subject.signature, parity, test)
        avoid_data_of(target, draft.file)
        sign(draft.file, record)
        put_files_in_place(folder, target, gone=data_of(target))
    return parity


def _destination(path: Path, opset: int) -> Path:
    if path.is_dir() or not path.name:
        raise ExportError(str(path), got="a directory", need="a file name", hint="model.onnx in it")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(
            "opset",
            got=str(opset),
            need=f"{MIN_OPSET} to {MAX_OPSET}",
            hint="--opset 20 (opset=20)",
        )
    return path


def _unwritable(path: Path, error: OSError) -> ExportError:
    return ExportError(
        str(path),
        got=error.strerror or str(error),
        need="a place where a file can be written",
        hint="another path",
    )


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target, on the same disk, gone afterwards whatever happens."""
    with room_for(target, ExportError), contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(target))
        except OSError as error:
            raise _unwritable(target, error) from error
        yield folder


def _failure(target: Path, parity: Parity) -> ParityError:
    need, hint = "a file that computes what the model computes", "the report"
    if parity.stage == "model":
        need, hint = "a model that gives numbers", "looking at that layer's weights and statistics"
    elif parity.cause == "network":
        need, hint = "a network that is exact enough in its own precision", "another target"
    error = ParityError(
        str(target),
        got=parity.failure or "a failed proof",
        need=need,
        hint=f"{hint}; --allow-mismatch (allow_mismatch=True) writes the file all the same",
    )
    error.parity = parity
    return error
