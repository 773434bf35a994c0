"""What a file says about itself: where it comes from, how it was made, how well it was proven."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

import normswap
from normswap.onnx.file.parity import Parity
from normswap.onnx.file.selftest import SelfTest
from normswap.onnx.subject import Signature
from normswap.onnx.writing.draft import Options
from normswap.provenance import portable, provenance_of, versions

_PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


def record_of(
    model: nn.Module, options: Options, signature: Signature, parity: Parity, test: SelfTest
) -> dict[str, Any]:
    """Origin, preprocessing, versions, how it was exported, its proof, and how to check it."""
    record = provenance_of(model)
    names = list(record.class_names) if record.class_names is not None else None
    return {
        "source": portable(record.source),
        "plans": list(record.plans),
        "preprocessing": _preprocessing(record.preprocessing, signature, options),
        "class_names": names,
        "history": list(record.history),
        "versions": {"normswap": normswap.__version__, **versions(*_PACKAGES)},
        "export": asdict(options),
        "proof": _digest(parity),
        "self_test": test.to_json(),
    }


def _preprocessing(
    recorded: dict[str, Any] | None, signature: Signature, options: Options
) -> dict[str, Any] | None:
    """What the model wants of its input, at the one size that the file takes."""
    sizes = [list(item.shape[1:]) for item in signature.inputs if item.axes]
    if signature.batch is None:  # a detector, with one image
        sizes = [list(item.shape[-3:]) for item in signature.inputs if len(item.shape) >= 3]
    if recorded is None or options.dynamic_size or len(sizes) != 1:
        return recorded
    usual = {name: value for name, value in recorded.items() if not name.startswith("test_")}
    return {**usual, "input_size": sizes[0]}


def _digest(parity: Parity) -> dict[str, Any]:
    plain = parity.to_json()
    worst = max((case for case in parity.cases), key=lambda case: case.error, default=None)
    return {
        "passed": parity.passed,
        "max_relative_error": plain["max_relative_error"],
        "top1_agreement": parity.top1_agreement,
        "cases": len(parity.cases),
        "worst": worst.describe() if worst is not None else None,
        "failure": parity.failure,
    }
