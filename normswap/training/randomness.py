"""The state of every global random generator, as plain data that a checkpoint can hold."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def rng_state(*, accelerators: bool = True) -> dict[str, Any]:
    """The state of Python's, numpy's, torch's and the GPUs' generators."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python": (version, words, gauss),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).copy()),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
    }
    if accelerators and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    """Put every generator to a state that ``rng_state`` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's, torch's and the GPUs' generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextlib.contextmanager
def rng_kept(*, accelerators: bool = True) -> Iterator[None]:
    """Leave the generators as they were, whatever happens inside."""
    state = rng_state(accelerators=accelerators)
    try:
        yield
    finally:
        load_rng_state(state)
