"""Child processes of normswap: the same packages as here, and nothing else of where they start.

``python -m`` puts the current folder before Python's own library, so that a ``json.py`` beside a
file under test would run. A child gets the folders that this process imports from, behind Python's
own and without the current one, and of the environment only what names no code. No torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the package: a checkout or ``site-packages``."""

_KEPT = {
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHASHSEED", "PYTHONUTF8"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUSERBASE"),
    *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "PATHEXT", "USERPROFILE", "APPDATA", "LOCALAPPDATA"),
    *("NUMBER_OF_PROCESSORS", "PROCESSOR_ARCHITECTURE"),
}
_KEPT_FAMILIES = ("LC_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "CUDA", "NVIDIA_", "ORT_")
_PATHS = {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}

_START = (
    "import sys; "
    "at = next((i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)); "
    "sys.path[at:at] = [p for p in {folders!r} if p not in sys.path]; "
    "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours in a child process.

    Args:
        module: for example ``"normswap.onnx.file.worker"``.
        arguments: its ``sys.argv[1:]``.
    """
    start = _START.format(folders=_importable(), module=module)
    return [sys.executable, "-P", "-c", start, *arguments]


def _importable() -> list[str]:
    """Where this process imports from, without the current folder unless the package lies there."""
    folders = [Path(entry) for entry in sys.path if entry and Path(entry).is_absolute()]
    here = Path.cwd()
    kept = [str(ROOT), *(str(f) for f in folders if f.exists() and f.resolve() != here)]
    return list(dict.fromkeys(kept))


def environment() -> dict[str, str]:
    """What of this process's environment a child may see: no variable that names code to run."""
    found = {}
    for name, value in os.environ.items():
        if name.upper() not in _KEPT and not name.upper().startswith(_KEPT_FAMILIES):
            continue
        if name.upper() in _PATHS:  # an empty or relative entry means the current folder
            value = os.pathsep.join(p for p in value.split(os.pathsep) if Path(p).is_absolute())
        found[name] = value
    return found


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Meanwhile children that other libraries start get no current folder on their path either."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before
