"""Whether Triton's kernels can run, and how they are launched with little Python in between.

A training step at batch 2 waits for the host, so a launch must cost microseconds. Triton looks at
every argument of every call to see which compiled kernel fits; here that is asked once per plan,
and a plan is looked up by all that the answer depends on.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

log = logging.getLogger("normswap")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)
_LARGEST = 2**31 - 1  # elements of a sample and of a channel, which are counted in 32 bits
PLANS = 4096  # that are remembered, of each sort
_WIDEST = 16  # elements of one access, at most; what Triton looks for itself
_SAME_DEVICE: AbstractContextManager[Any] = nullcontext()
_failed = False


Kinds = tuple[tuple[Any, ...] | None, ...]
"""What :func:`kind` says of several vectors."""


class Layout(NamedTuple):
    """Where the elements of a batch lie, as kernels are told it.

    Attributes:
        units: the positions of one channel of one sample, divided by ``step``.
        stride_n: from one sample to the next, divided by ``step``.
        stride_c: from one channel to the next, likewise.
        stride_s: from one position to the next.
        step: what divides them, as far as it helps; the kernel knows it as it is compiled.
    """

    units: int
    stride_n: int
    stride_c: int
    stride_s: int
    step: int


class CannotLaunchError(Exception):
    """Triton could not build or start a kernel here; the eager form goes on."""


class Launch:
    """A kernel with its grid and its constants."""

    __slots__ = ("_constants", "_grid", "_kernel", "_run", "_warps")

    def __init__(self, kernel: Any, programs: int, constants: tuple[Any, ...], warps: int) -> None:
        self._kernel, self._constants, self._warps = kernel, constants, warps
        self._grid = (programs, 1, 1)
        self._run: Any = None

    def __call__(self, *arguments: Any) -> None:
        """Launch with the kernel's first arguments; the constants are its last."""
        if self._run is None:
            self._first(arguments)
        else:
            self._run(*arguments, *self._constants)

    def _first(self, arguments: tuple[Any, ...]) -> None:
        try:
            compiled = self._kernel[self._grid](*arguments, *self._constants, num_warps=self._warps)
            if compiled is not None:  # Triton's interpreter compiles nothing
                self._run = compiled[self._grid]
        except Exception as error:
            global _failed
            _failed = True
            log.warning("Triton kernels: got %r; torch's own operations take their place.", error)
            raise CannotLaunchError from error


def can_launch(x: Tensor) -> bool:
    """Whether kernels may take ``x``: an ordinary tensor on an NVIDIA GPU that Triton knows."""
    return x.is_cuda and type(x) in _PLAIN and not _failed and _is_supported(x.get_device())


@lru_cache(maxsize=64)
def _is_supported(device: int) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    # Triton, and only now: most installations have no GPU
    from normswap.layers.gpu import language

    return language.tl is not None


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make that the device of ``x``."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(x.get_device())


def kind(vector: Tensor | None) -> tuple[Any, ...] | None:
    """All that a launch depends on in a (C,) argument."""
    if vector is None:
        return None
    return vector.dtype, vector.get_device(), vector.stride(), type(vector) in _PLAIN


def is_aligned(x: Tensor) -> bool:
    """Whether wide accesses may begin at the first element of a batch.

    A kernel is compiled for either; of (C,) vectors it assumes nothing.
    """
    return x.data_ptr() % 16 == 0


def as_batch(grad: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A gradient as kernels count on it: in the format of its batch, and aligned."""
    grad = grad.contiguous(memory_format=memory_format)
    return grad if is_aligned(grad) else grad.clone()  # new memory is aligned


def are_usual(kinds: Kinds, device: int) -> bool:
    """Whether vectors of these ``kinds`` are dense, real, and on the ``device``."""
    return all(
        one is None or (one[0] in DTYPES and one[1] == device and one[2] == (1,) and one[3])
        for one in kinds
    )


def memory_format_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.memory_format | None:
    """The format in which a batch of maps lies in memory without gaps, or None."""
    like = torch.empty_strided(shape, stride, device="meta")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for candidate in (torch.contiguous_format, formats.get(len(shape))):
        if candidate is not None and like.is_contiguous(memory_format=candidate):
            return candidate
    return None


def layout_of(shape: tuple[int, ...], memory_format: torch.memory_format) -> Layout:
    """The layout of a batch in this format."""
    channels, positions = shape[1], positions_of(shape)
    if memory_format != torch.contiguous_format:
        return Layout(positions, channels * positions, 1, channels, 1)
    step = math.gcd(positions, _WIDEST)
    return Layout(positions // step, channels * positions // step, positions // step, 1, step)


def positions_of(shape: tuple[int, ...]) -> int:
    """Elements of one channel of one sample."""
    positions = 1
    for extent in shape[2:]:
        positions *= extent
    return positions


def takes(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether kernels can work on batches of this shape and dtype."""
    if dtype not in DTYPES or len(shape) <= 2:
        return False
    return 0 < max(shape[0], shape[1]) * positions_of(shape) <= _LARGEST
