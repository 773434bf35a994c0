"""Settings for every test."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads on top of them would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
