"""A refused proof says whether it is the file or the network; NaN proves nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_support import edit_tensor
from torch import nn

from normswap.errors import ParityError
from normswap.onnx import export_onnx, verify_onnx
from normswap.onnx.file.parsing import save
from normswap.onnx.proving import proof
from normswap.onnx.writing.program import write_program


@pytest.fixture(autouse=True)
def one_export(monkeypatch):
    monkeypatch.setattr(proof, "_randomised_cases", lambda *_: [])


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Class(Tiny):
    """Its output is a number whatever happens inside."""

    def forward(self, x):
        return super().forward(x).argmax(1)


class Hidden(Tiny):
    def forward(self, x):
        inner = torch.nan_to_num(torch.relu(self.norm(self.conv(x))))
        return self.head(inner.mean((2, 3)))


class Sensitive(Tiny):
    """A small difference of large numbers: float32 keeps two of its digits."""

    def forward(self, x):
        y = super().forward(x)
        return (y + 3e4) - 3e4


IMPOSSIBLE = {
    "norm.running_var holds a negative variance": lambda m: m.norm.running_var[:1].neg_(),
    "norm.running_var holds NaN": lambda m: m.norm.running_var[0].fill_(torch.nan),
    "norm.running_var holds numbers that are not finite": lambda m: m.norm.running_var.fill_(
        torch.inf
    ),
    "norm.running_mean holds numbers that are not finite": lambda m: m.norm.running_mean[1].fill_(
        -torch.inf
    ),
    "conv.weight holds NaN": lambda m: m.conv.weight[0].fill_(torch.nan),
    "gives NaN on random inputs, batch 1": lambda m: m.conv.weight.fill_(3e38),
}


def inputs():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", [Tiny, Class, Hidden])
@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_proof_against_nan_is_no_proof(what, model, tmp_path):
    made = model().eval()
    with torch.no_grad():
        IMPOSSIBLE[what](made)
    with pytest.raises(ParityError) as caught:
        export_onnx(made, tmp_path / "m.onnx", example_inputs=inputs())
    assert what in str(caught.value)
    assert "a proof against that is no proof; need a model that gives numbers" in str(caught.value)
    parity = caught.value.parity
    assert (parity.stage, parity.cause, parity.divergence) == ("model", "network", None)
    assert list(tmp_path.iterdir()) == []


def test_a_good_file_is_not_verified_against_nan(tmp_path):
    model, path = Class().eval(), tmp_path / "m.onnx"
    assert export_onnx(model, path, example_inputs=inputs()).cause is None
    with torch.no_grad():
        model.norm.running_var.neg_()
    parity = verify_onnx(path, model, example_inputs=inputs())
    assert not parity.passed
    assert "a negative variance" in parity.failure
    assert parity.cause == "network"


def test_masks_of_infinities_are_no_nan(tmp_path):
    class Masked(Tiny):
        def forward(self, x):
            y = super().forward(x)
            return torch.softmax(y.masked_fill(y < 0, -torch.inf), 1).nan_to_num()

    with torch.no_grad():
        model = Masked().eval()
        model.head.bias.add_(1)
    assert export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs()).passed


def test_a_network_that_float32_cannot_compute_is_to_blame_itself(tmp_path):
    with pytest.raises(ParityError, match="this is the network and not the file") as caught:
        export_onnx(Sensitive(), tmp_path / "m.onnx", example_inputs=inputs())
    assert "need a network that is exact enough in its own precision" in str(caught.value)
    parity = caught.value.parity
    assert parity.cause == "network"
    assert parity.divergence is None
    assert parity.to_json()["cause"] == "network"


def test_a_wrong_file_of_a_sensitive_network_is_to_blame_itself(tmp_path, monkeypatch):
    def wrong(subject, path, options):
        draft = write_program(subject, path, options)
        edit_tensor(draft.file.proto, "head.weight", lambda w: w * np.float32(2))
        save(draft.file)
        return draft

    monkeypatch.setattr(proof, "write_program", wrong)
    with pytest.raises(ParityError, match="first divergent module: head") as caught:
        export_onnx(Sensitive(), tmp_path / "m.onnx", example_inputs=inputs())
    assert caught.value.parity.cause == "file"
