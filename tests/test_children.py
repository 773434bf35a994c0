"""The current folder is no code: what lies beside a file under test never runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.data import Dataset

from normswap import children
from normswap.onnx.file.session import Apart, Failed
from normswap.training.batches import Share, evaluation_batches

SHADOWS = (
    *("json", "numpy", "onnxruntime", "onnx", "resource", "pathlib", "typing", "runpy", "random"),
    *("sitecustomize", "usercustomize", "normswap", "torch", "tempfile", "zipfile", "pickle"),
    *("multiprocessing", "signal", "threading", "logging", "ast", "inspect", "dataclasses"),
)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """The current folder: each module in it would leave a file."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in SHADOWS:
        canary = folder / f"ran-{name}"
        text = f"from builtins import open\nopen({str(canary)!r}, 'w').close()\n"
        (folder / f"{name}.py").write_text(text)
    (folder / "startup.py").write_text("open('ran-startup', 'w').close()")
    monkeypatch.chdir(folder)
    return folder


def ran(folder):
    return sorted(path.name for path in folder.glob("ran-*"))


@pytest.fixture
def identity(tmp_path):
    info = onnx.helper.make_tensor_value_info
    shape = ("x", onnx.TensorProto.FLOAT, [1, 3])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [info(*shape)],
        [info("y", *shape[1:])],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save(model, tmp_path / "identity.onnx")
    return tmp_path / "identity.onnx"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PYTHONPATH": ""},
        {"PYTHONPATH": f"{os.pathsep}."},
        {"PYTHONSTARTUP": "startup.py"},
        {"PYTHONWARNINGS": "error::json.Canary"},
        {"PYTHONBREAKPOINT": "json.breakpoint"},
        {"LD_LIBRARY_PATH": ":.:/nowhere"},
    ],
    ids=str,
)
def test_the_worker_runs_nothing_of_the_current_folder(hostile, identity, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", ["", ".", str(hostile), *sys.path])
    x = np.arange(3, dtype=np.float32)[None]
    ((found,),) = Apart(seconds=60).run(identity, ["off"], [[x]])
    assert not isinstance(found, Failed), found
    assert (found[0] == x).all()
    assert ran(hostile) == []


def test_a_child_imports_what_its_parent_does_in_the_parents_order(tmp_path, monkeypatch):
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "only_there.py").write_text("value = 3")
    (extra / "json.py").write_text("raise SystemError('behind the standard library')")
    monkeypatch.setattr(sys, "path", [str(extra), *sys.path])
    (extra / "child.py").write_text(
        "import json, sys, only_there, normswap\n"
        "print(json.dumps([sys.argv[1:], only_there.value, normswap.__file__]))"
    )
    line = children.command("child", "a b", "c")
    done = subprocess.run(line, env=children.environment(), capture_output=True, check=True)
    package = str(children.ROOT / "normswap" / "__init__.py")
    assert json.loads(done.stdout) == [["a b", "c"], 3, package]


def test_a_clean_environment_keeps_what_a_child_needs_and_no_relative_folder(monkeypatch):
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    for name, value in {
        "PATH": f"/bin{os.pathsep}.{os.pathsep}{os.pathsep}/usr/bin",
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": "/somewhere",
        "PYTHONWARNINGS": "error::evil.Warning",
        "HF_TOKEN": "secret",
        "LD_PRELOAD": "./evil.so",
    }.items():
        monkeypatch.setenv(name, value)
    path = f"/bin{os.pathsep}/usr/bin"
    wanted = {"PATH": path, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    assert children.environment() == wanted


class Safe(Dataset):
    """What the environment of a loading process says."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.tensor(float(os.environ.get("PYTHONSAFEPATH") == "1")), index


def test_processes_that_load_data_have_a_safe_path(monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    batches, _ = evaluation_batches(Safe(), batch_size=2, workers=1, share=Share())
    assert next(iter(batches)).images.tolist() == [1.0, 1.0]
    assert "PYTHONSAFEPATH" not in os.environ


def test_the_whole_command_runs_nothing_of_the_current_folder(hostile, identity):
    """As the installed script is started: Python puts the script's folder on the path, not this."""
    script = hostile.parent / "bin" / "normswap"
    script.parent.mkdir()
    root = str(Path(children.ROOT))
    script.write_text(
        f"import sys\nsys.path.append({root!r})\nfrom normswap.cli import main\nmain()"
    )
    environment = {**children.environment(), "PYTHONPATH": root}
    line = [sys.executable, str(script), "verify", str(identity)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 3), done.stderr
    assert "Unexpected" not in done.stderr
    assert ran(hostile) == []
