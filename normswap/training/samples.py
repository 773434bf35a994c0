"""Samples read one by one, and the randomness they are read with."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from normswap.errors import DataError, NormSwapError


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


_UNREADABLE = (OSError, SyntaxError, ValueError, NormSwapError)
_PATIENCE = 100


class Batch(NamedTuple):
    """Samples of one forward.

    Attributes:
        images: a tensor; a detector's are a list, each of its own size.
        labels: a tensor; a detector's are a list of mappings.
        broken: indices of samples that could not be read for it.
        samples: the indices of its own, where they are known.
    """

    images: Tensor | list[Tensor]
    labels: Tensor | list[Any]
    broken: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()


class Trouble(NamedTuple):
    """Why a sample could not be read; errors do not travel well out of worker processes."""

    sample: int
    reason: str
    said: tuple[str, str, str, str] | None = None
    """Where, got, need and hint of an error that names the file itself."""


class PlainReader(Dataset[Any]):
    """Reads a sample and says what went wrong instead of raising."""

    def __init__(self, dataset: Dataset[Any], on_broken: str) -> None:
        self.dataset, self.on_broken = dataset, on_broken

    def __getitem__(self, index: int) -> Any:
        found = _read(self.dataset, index)
        if isinstance(found, Trouble):
            return (None, None, (index,), index) if self.on_broken == "skip" else found
        return (*found, (), index)


class SeededReader(Dataset[Any]):
    """Reads a sample with random generators that depend on seed, epoch and index alone."""

    def __init__(
        self, dataset: Dataset[Any], samples: int, seed: int, epoch: int, on_broken: str
    ) -> None:
        self.dataset, self.samples, self.seed, self.epoch = dataset, samples, seed, epoch
        self.on_broken = on_broken

    def __getitem__(self, index: int) -> Any:
        with _seeded(mixed(self.seed, self.epoch, index)):
            found = _read(self.dataset, index)
        if isinstance(found, Trouble):
            return self._next_readable(found) if self.on_broken == "skip" else found
        return (*found, (), index)

    def _next_readable(self, trouble: Trouble) -> Any:
        """The first sample after a broken one, so that every batch keeps its size."""
        broken = [trouble.sample]
        for step in range(1, min(_PATIENCE, self.samples)):
            index = (trouble.sample + step) % self.samples
            with _seeded(mixed(self.seed, self.epoch, index)):
                found = _read(self.dataset, index)
            if not isinstance(found, Trouble):
                return (*found, tuple(broken), index)
            broken.append(index)
        reason = f"{len(broken)} broken in a row; {trouble.reason}"
        return trouble._replace(reason=reason, said=None)


def _read(dataset: Any, index: int) -> tuple[Any, Any] | Trouble:
    try:
        image, label = dataset[index]
    except DataError as error:  # it names the file and what to do
        said = (error.where, error.got, error.need, error.hint)
        return Trouble(index, f"DataError: {error}", said)
    except _UNREADABLE as error:
        return Trouble(index, f"{type(error).__name__}: {error}")
    if not isinstance(image, Tensor):
        return Trouble(index, f"an image of type {type(image).__name__}; a tensor is needed")
    if not isinstance(label, (int, float, np.number, Tensor, Mapping)):
        return Trouble(index, f"a label of type {type(label).__name__}; a class number is needed")
    return image, label


def collate(samples: Sequence[Any]) -> Any:
    """One batch of samples, or the first trouble among them."""
    for sample in samples:
        if isinstance(sample, Trouble):
            return sample
    broken = tuple(itertools.chain.from_iterable(sample[2] for sample in samples))
    pairs = [(image, label) for image, label, *_ in samples if image is not None]
    numbers = tuple(sample[3] for sample in samples if sample[0] is not None)
    if any(isinstance(label, Mapping) for _, label in pairs):  # a detector's
        images, labels = zip(*pairs, strict=True)
        return [as_plain(image) for image in images], list(labels), broken, numbers
    if len({image.shape for image, _ in pairs}) > 1:
        shapes = sorted({tuple(image.shape) for image, _ in pairs})
        return Trouble(-1, f"images of different shapes in one batch: {shapes}")
    return (*(default_collate(pairs) if pairs else (None, None)), broken, numbers)


def as_plain(image: Tensor) -> Tensor:
    """Without torchvision's ``tv_tensors.Image``, or another class, around it."""
    return image if type(image) is Tensor else image.as_subclass(Tensor)


def checked(collated: Any) -> Batch:
    """What ``collate`` gave as a batch.

    Raises:
        DataError: it was trouble.
    """
    if isinstance(collated, Trouble) and collated.said is not None:
        where, got, need, hint = collated.said
        raise DataError(where, got=got, need=need, hint=hint)
    if isinstance(collated, Trouble):
        where = "data" if collated.sample < 0 else f"sample {collated.sample}"
        raise DataError(
            where,
            got=collated.reason,
            need="(tensor, class) pairs of one shape that can be read",
            hint="repairing or removing it, or --skip-broken (on_broken='skip')",
        )
    images, labels, broken, numbers = collated
    if images is None:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), broken)
    return Batch(images, labels, broken, numbers)


def ignore_interrupts(_worker: int) -> None:
    """Let Ctrl-C pass by a worker process."""
    # Ctrl-C reaches every process of the terminal; the main one finishes its step and needs these
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with rng_kept(accelerators=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (timm's transforms draw from the global one)
        torch.default_generator.manual_seed(seed)
        yield
