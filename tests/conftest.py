"""Settings for every test."""

from __future__ import annotations

import os
import tempfile

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads on top of them would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"


# What this machine remembers of checkpoints is no business of the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="normswap-cache-")


def pytest_collectstart(collector):
    """What a file makes as it is imported does not hang on what else was collected."""
    if isinstance(collector, pytest.Module):
        import torch

        torch.manual_seed(0)
