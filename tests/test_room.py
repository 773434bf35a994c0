"""A full disk is called one, in one line, wherever it is met; nothing half-written stays."""

import errno
import io
import os
from types import SimpleNamespace

import pytest
import torch
from onnx_support import Net, live

import normswap
from normswap import files
from normswap.checkpoints import save_checkpoint
from normswap.cli.boundary import describe
from normswap.errors import ArtifactError, ExportError, TrainingError
from normswap.room import full, room_for
from normswap.training.checkpoints import write_checkpoint
from normswap.training.records import MetricsLog

NUMBERS = pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
WORDS = {errno.ENOSPC: "a full disk", errno.EDQUOT: "a full quota"}


def failing(number, wrapped):
    """A call that fails as the system does, bare or as others pass it on."""

    def call(*_args, **_kwargs):
        error = OSError(number, os.strerror(number))
        if not wrapped:
            raise error
        try:
            raise error
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - as torch does

    return call


class FullFile(io.RawIOBase):
    def writable(self):
        return True

    def write(self, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "wrapped", "number"),
    [
        ("torch.onnx.ONNXProgram.save", False, errno.EDQUOT),
        ("torch.onnx.ONNXProgram.save", True, errno.ENOSPC),
        ("normswap.onnx.export.sign", False, errno.ENOSPC),
        ("normswap.files.flush", False, errno.ENOSPC),
    ],
)
def test_export(place, wrapped, number, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = live(Net()), torch.randn(2, 3, 16, 16)
    (tmp_path / "model.onnx").write_bytes(b"old")
    monkeypatch.setattr(place, failing(number, wrapped))
    with pytest.raises(ExportError, match=f"got {WORDS[number]}") as caught:
        normswap.export_onnx(model, tmp_path / "model.onnx", example_inputs=x)
    assert str(tmp_path / "model.onnx") in str(caught.value)
    assert "exporter" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


def test_what_torch_cannot_export_is_no_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx.ONNXProgram.save", failing(errno.EIO, wrapped=True))
    with pytest.raises(ExportError, match="torch's own exporter"):
        normswap.export_onnx(live(Net()), tmp_path / "m", example_inputs=torch.ones(2, 3, 16, 16))


@NUMBERS
@pytest.mark.parametrize("place", ["torch.save", "normswap.files.flush"])
def test_unwrap(place, number, tmp_path, monkeypatch):
    source = normswap.load_model("timm/test_resnet", pretrained=False)
    monkeypatch.setattr(place, failing(number, wrapped=True))
    with pytest.raises(ArtifactError, match=f"got {WORDS[number]}"):
        normswap.unwrap(source.model, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_torchs_writer_hides_it():
    """It fails over positions in the archive; behind that is what Python's file said."""
    with pytest.raises((RuntimeError, OSError)) as caught:
        save_checkpoint({"x": torch.zeros(1000)}, SimpleNamespace(open=lambda _mode: FullFile()))
    assert full(caught.value) == "a full disk (No space left on device)"


@NUMBERS
def test_checkpoint(number, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.save", failing(number, wrapped=True))
    with pytest.raises(TrainingError, match=f"last.pt: got {WORDS[number]}") as caught:
        write_checkpoint(tmp_path / "last.pt", {"format": 1})
    assert "written before" not in str(caught.value)  # there is none
    assert list(tmp_path.iterdir()) == []


def test_metrics(tmp_path):
    log = MetricsLog(tmp_path, step=0, tensorboard=False)
    log._file.close()
    log._file = SimpleNamespace(name="metrics.jsonl", write=failing(errno.ENOSPC, False))
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: got a full disk"):
        log.write("train", {"step": 1})


@NUMBERS
def test_save(number, tmp_path, monkeypatch):
    source = normswap.load_model("timm/test_resnet", pretrained=False)
    monkeypatch.setattr("normswap.artifact.writing.save_file", failing(number, wrapped=False))
    with pytest.raises(ArtifactError, match=WORDS[number]):
        normswap.save(source.model, tmp_path / "out")


def test_a_single_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "flush", failing(errno.ENOSPC, wrapped=False))
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_whole(tmp_path / "drift.json", "{}")
    code, text = describe(caught.value)
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert text.startswith(f"{tmp_path / 'drift.json'}: got a full disk")


def test_safetensors_and_the_boundary():
    assert full(ValueError("I/O error: No space left on device (os error 28)"))
    assert full(ValueError("I/O error: No such file or directory (os error 2)")) is None
    code, text = describe(RuntimeError("no space").with_traceback(None))
    assert "Unexpected" in text
    try:
        failing(errno.ENOSPC, wrapped=True)()
    except RuntimeError as error:
        code, text = describe(error)
    assert code == 1
    assert text.startswith("file system: got a full disk (No space left on device); need space")


def test_other_errors_pass_and_chains_may_be_cyclic():
    with pytest.raises(KeyError), room_for("x", ExportError):
        raise KeyError("x")
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert full(one) is None
