"""The one door to torchvision, timm and other packages that are imported late.

Late, because they are slow to import and because a torchvision that was built for another torch
fails at import with a message that helps nobody. This room turns that into one that does.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from normswap.errors import InstallationError, in_short

_BUILT_ON_TORCH = ("torchvision", "timm")


def library(name: str) -> ModuleType:
    """Import a package, or say what to install.

    Args:
        name: module to import, for example ``"timm"`` or ``"torchvision.models"``.

    Raises:
        InstallationError: the package is missing, or does not fit the installed torch.

    Example:
        >>> library("json").__name__
        'json'
    """
    package = name.partition(".")[0]
    try:
        if package == "timm":  # timm imports torchvision: let the message name the culprit
            library("torchvision")
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise InstallationError(
            package,
            got=f"no package named {missing}",
            need=f"{missing} to be installed",
            hint=f"`pip install {missing}`",
        ) from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # "operator torchvision::nms does not exist", missing symbols, and on a second try the
        # AttributeError of a half-imported module
        if package not in _BUILT_ON_TORCH:
            raise
        raise _misfit(package, error) from error


def _misfit(package: str, error: Exception) -> InstallationError:
    import torch

    reason = in_short(error)
    return InstallationError(
        package,
        got=f"a build that does not fit torch {torch.__version__} ({reason})",
        need="torch and torchvision builds that belong together",
        hint="`pip install --force-reinstall torch torchvision`",
    )
