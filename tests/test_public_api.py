"""The public surface, frozen: a change here is a change for users and belongs in the changelog."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import normswap

PUBLIC = [
    "ArtifactError",
    "BusyError",
    "Calibration",
    "CalibrationError",
    "Case",
    "CheckpointError",
    "Conversion",
    "DataError",
    "Drift",
    "Epoch",
    "ExportError",
    "FineTune",
    "Graph",
    "History",
    "ImpossibleNumbersError",
    "InstallationError",
    "LayerError",
    "Metrics",
    "NormSwapError",
    "OnnxModel",
    "Option",
    "Parity",
    "ParityError",
    "Passage",
    "Plan",
    "PlanEntry",
    "PlanError",
    "Progress",
    "Push",
    "Recommendation",
    "Site",
    "SiteDrift",
    "Source",
    "SpecError",
    "SwapError",
    "Sweep",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingProgress",
    "WalkError",
    "__version__",
    "apply_plan",
    "calibrate",
    "convert",
    "evaluate",
    "export_onnx",
    "finetune",
    "layers",
    "load",
    "load_model",
    "load_onnx",
    "measure_drift",
    "plan",
    "push_to_hub",
    "recipes",
    "recommend",
    "register_batchnorm",
    "save",
    "sweep",
    "unwrap",
    "verify_onnx",
    "walk",
]
OLD = [  # recipes under their names of version 0.1
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "SyncBatchNorm",
]


def test_names_are_frozen():
    assert sorted(normswap.__all__) == PUBLIC


@pytest.mark.parametrize("name", [*PUBLIC, *OLD])
def test_every_name_can_be_had_and_is_documented(name):
    found = getattr(normswap, name)
    if callable(found):
        assert inspect.getdoc(found), f"{name} has no docstring"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'konvert'"):
        normswap.konvert  # noqa: B018


def test_no_submodule_hides_a_public_function():
    """Importing a submodule makes it an attribute of the package, over a function's if it may."""
    for module in pkgutil.walk_packages(normswap.__path__, "normswap."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in set(PUBLIC) - {"layers", "recipes", "__version__"}:
        assert not inspect.ismodule(getattr(normswap, name)), name
    assert not set(PUBLIC) - {"layers", "recipes"} & {
        m.name for m in pkgutil.iter_modules(normswap.__path__)
    }


def test_import_is_free_of_torch():
    code = "import normswap, sys; assert 'torch' not in sys.modules; print(normswap.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WRONG = {  # what a user may mistype, and what mypy has to say of it
    "normswap.convrt(1)": "attr-defined",
    "normswap.FineTune(batchsize=2)": "call-arg",
    "normswap.GroupNorm(group=4)": "call-arg",
    "normswap.recipes.GroupNorm(channels=4)": "call-arg",
    "normswap.load_model(3)": "arg-type",
    "normswap.layers.FilterResponseNorm3": "attr-defined",
    "normswap.walk('a model', 1).sights": "attr-defined",
}


def test_a_type_checker_sees_wrong_calls(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "wrong.py"
    right = "import normswap\nplan: normswap.Plan\nmetrics: normswap.Metrics\n"
    file.write_text(right + "\n".join(WRONG) + "\n")
    settings = tmp_path / "mypy.ini"  # torch's own types take mypy 15 s and say nothing here
    settings.write_text(
        "[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n"
        + "".join(
            f"[mypy-{library}.*]\nfollow_imports = skip\n"
            for library in ("torch", "numpy", "timm", "onnx", "PIL", "rich")
        )
    )
    root = Path(normswap.__file__).parent.parent
    options = ["--no-error-summary", f"--config-file={settings}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, f"--cache-dir={tmp_path}", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ({} if root.name == "site-packages" else {"MYPYPATH": str(root)}),
    )
    lines = done.stdout.splitlines()
    for number, (code, kind) in enumerate(WRONG.items(), start=4):
        assert any(f":{number}:" in line and f"[{kind}]" in line for line in lines), (code, lines)
    assert len(lines) <= 2 * len(WRONG)  # the right lines draw no word


def test_warnings_of_the_package_are_errors_and_those_of_others_are_not():
    warnings.warn_explicit("tomorrow", DeprecationWarning, "torch.py", 1, module="torch.somewhere")
    for module in ("normswap", "normswap.graph.walker"):
        with pytest.raises(DeprecationWarning):
            warnings.warn_explicit("ours", DeprecationWarning, "x.py", 1, module=module)
    warnings.warn_explicit("not ours", UserWarning, "x.py", 1, module="normswapper")
