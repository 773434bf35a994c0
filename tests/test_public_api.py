"""The public surface, frozen: a change here is a change for users and belongs in the changelog."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import normswap

PUBLIC = [
    "BatchNorm",
    "BatchRenorm",
    "Calibration",
    "Conversion",
    "CrossIterationBatchNorm",
    "FilterResponseNorm",
    "FineTune",
    "FrozenBatchNorm",
    "Graph",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "NormSwapError",
    "Parity",
    "Plan",
    "Site",
    "SyncBatchNorm",
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
    "measure_drift",
    "plan",
    "save",
    "verify_onnx",
    "walk",
]


def test_names_are_frozen():
    assert sorted(normswap.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
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
    for name in set(PUBLIC) - {"layers", "__version__"}:
        assert not inspect.ismodule(getattr(normswap, name)), name
    assert not set(PUBLIC) - {"layers"} & {m.name for m in pkgutil.iter_modules(normswap.__path__)}


def test_import_is_free_of_torch():
    code = "import normswap, sys; assert 'torch' not in sys.modules; print(normswap.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
