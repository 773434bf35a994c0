"""Training and validation data, in whatever form they come, as batches in a known order.

The order of an epoch depends on the seed and the epoch's number alone, and so does everything that
is drawn at random while a sample is read. A run that is resumed in the middle of an epoch therefore
sees the samples it would have seen, whatever the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from normswap.children import safe_path
from normswap.data.images import check_on_broken
from normswap.errors import DataError, TrainingError, some
from normswap.training.samples import (
    Batch,
    PlainReader,
    SeededReader,
    as_plain,
    checked,
    collate,
    ignore_interrupts,
    load_rng_state,
    mixed,
    rng_kept,
    rng_state,
)


class Share(NamedTuple):
    """Which process this is, and of how many."""

    rank: int = 0
    world: int = 1


class Batches:
    """Batches of one process, epoch by epoch.

    Attributes:
        samples: size of the data set, over all processes.
        batch_size: samples in a full batch of this process.
        count: batches of this process in one epoch.
    """

    samples: int
    batch_size: int
    count: int

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of one epoch from number ``start`` on."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to find the place again."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """A permutation that depends on nothing but its arguments."""
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    return torch.randperm(samples, generator=generator)


def slices(samples: int, batch_size: int, share: Share) -> list[tuple[int, int]]:
    """Where in an epoch's order the batches of one process begin and end.

    Consecutive stretches of ``batch_size · world`` samples are dealt out to the processes. What is
    left at the end makes one smaller batch for each of them; if that would be a single sample where
    a batch holds several, it is dropped (BN cannot normalise one sample on a 1×1 map, and the next
    epoch's order leaves out another one).
    """
    stride = batch_size * share.world
    found = [
        (start + share.rank * batch_size, start + (share.rank + 1) * batch_size)
        for start in range(0, samples - stride + 1, stride)
    ]
    rest = (samples % stride) // share.world
    if rest >= min(2, batch_size) or (rest and not found):
        start = samples - samples % stride + share.rank * rest
        found.append((start, start + rest))
    return found


def samples_per_epoch(samples: int, batch_size: int) -> int:
    """How many of its samples one process sees in an epoch.

    Example:
        >>> samples_per_epoch(9, 3), samples_per_epoch(9, 4)
        (9, 8)
    """
    return sum(end - begin for begin, end in slices(samples, batch_size, Share()))


class TensorBatches(Batches):
    """Batches of a pair of tensors that are in memory."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, seed: int, share: Share
    ) -> None:
        self.images, self.labels = images, labels
        self.samples, self.batch_size, self.seed = len(images), batch_size, seed
        self.slices = slices(self.samples, batch_size, share)
        self.count = len(self.slices)

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of one epoch from number ``start`` on."""
        order = epoch_order(self.samples, self.seed, number)
        for begin, end in self.slices[start:]:
            chosen = order[begin:end]
            yield Batch(self.images[chosen], self.labels[chosen])


class DatasetBatches(Batches):
    """Batches of a map-style data set."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        share: Share,
        *,
        workers: int,
        on_broken: str,
        pin_memory: bool,
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.samples = _length(dataset)
        self.workers, self.on_broken, self.pin_memory = workers, on_broken, pin_memory
        self.slices = slices(self.samples, batch_size, share)
        self.count = len(self.slices)

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of one epoch from number ``start`` on."""
        order = epoch_order(self.samples, self.seed, number)
        loader = DataLoader(
            SeededReader(self.dataset, self.samples, self.seed, number, self.on_broken),
            batch_sampler=[order[begin:end].tolist() for begin, end in self.slices[start:]],
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(0),  # the global one stays untouched
        )
        with safe_path():  # the workers start here
            batches = map(checked, loader)
        yield from batches


class LoaderBatches(Batches):
    """Batches of a loader that the caller made; its order is its own.

    A resumed epoch is found again by putting the random generators back to where they were when the
    epoch began and reading the loader up to the place.
    """

    def __init__(self, loader: Any, share: Share, prepared: Any) -> None:
        self.loader = prepared
        self.generators = _generators(loader)
        self.batch_size = _batch_size(loader)
        self.count = _loader_length(prepared)
        # a sampler may draw fewer samples than the data set holds, or more
        regular = getattr(loader, "batch_size", None) is not None
        drawn = getattr(loader, "sampler", None) if regular else None
        lengths = (_length_or_none(item) for item in (drawn, getattr(loader, "dataset", None)))
        estimate = self.count * self.batch_size * share.world
        self.samples = next((length for length in lengths if length is not None), estimate)
        if share.world == 1 and self._ends_with_one():
            self.count -= 1
        self._before_epoch: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None

    def _ends_with_one(self) -> bool:
        regular = getattr(self.loader, "batch_size", None) is not None
        dropped = getattr(self.loader, "drop_last", False)
        return (
            regular
            and not dropped
            and self.count > 1
            and self.batch_size > 1
            and self.samples % self.batch_size == 1
        )

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """The batches of one epoch from number ``start`` on."""
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        batches = self._found_again(start) if start else self._fresh()
        for batch in itertools.islice(batches, self.count - start):
            yield _as_batch(batch)

    def _fresh(self) -> Iterator[Any]:
        self._before_epoch = {"rng": rng_state(), "generators": self._generator_states()}
        return iter(self.loader)

    def _found_again(self, start: int) -> Iterator[Any]:
        state = self._resumed or self._before_epoch
        with rng_kept():
            load_rng_state(state["rng"])
            self._set_generators(state["generators"])
            self._before_epoch = state
            batches: Iterator[Any] = iter(self.loader)
            for _ in range(start):
                next(batches)
        return batches

    def _generator_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to find the place again."""
        return self._before_epoch | {"generators_now": self._generator_states()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self._resumed = state
        self._set_generators(state["generators_now"])


def training_batches(
    data: Any,
    *,
    batch_size: int,
    seed: int,
    share: Share,
    accelerator: Any,
    workers: int = 0,
    on_broken: str = "error",
) -> Batches:
    """The batches of this process from any form of training data.

    Args:
        data: a ``Dataset`` of (tensor, class), an (images, labels) pair of tensors, or a
            ``DataLoader`` (which is used as it is: its order, its batch size, its workers).
        batch_size: samples per batch; a loader has its own.
        seed: of the order.
        share: this process and the number of processes.
        accelerator: prepares a loader where there are several processes.
        workers: loading processes of a data set.
        on_broken: ``"error"`` or ``"skip"``.

    Raises:
        DataError: no samples, or a form that is none of these.
    """
    pair = in_memory(data)
    if pair is not None:
        return _non_empty(TensorBatches(*pair, batch_size, seed, share))
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size, num_workers=workers)
    if _is_loader(data):
        prepared = accelerator.prepare_data_loader(data) if share.world > 1 else data
        return _non_empty(LoaderBatches(data, share, prepared))
    if _is_indexed(data):
        pin_memory = accelerator.device.type == "cuda"
        batches = DatasetBatches(
            data,
            batch_size,
            seed,
            share,
            workers=workers,
            on_broken=on_broken,
            pin_memory=pin_memory,
        )
        return _non_empty(batches)
    raise _unusable(data)


def evaluation_batches(
    data: Any, *, batch_size: int, workers: int = 0, on_broken: str = "error", share: Share
) -> tuple[Iterator[Batch], bool]:
    """Every sample once and in order, and whether they are this process's share only."""
    check_on_broken(on_broken)
    if batch_size < 1:
        raise DataError("batch_size", got=str(batch_size), need="at least 1", hint="batch_size=32")
    pair = in_memory(data)
    if pair is not None:
        data = TensorDataset(*pair)
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size, num_workers=workers)
    if _is_loader(data):
        return map(_as_batch, _quietly(data)), False
    if not _is_indexed(data):
        raise _unusable(data)
    mine = range(share.rank, _length(data), share.world)
    loader = DataLoader(
        PlainReader(data, on_broken),
        batch_sampler=[list(mine[at : at + batch_size]) for at in range(0, len(mine), batch_size)],
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator().manual_seed(0),
    )
    with safe_path():  # the workers start here
        return map(checked, loader), True


def samples_of(data: Any) -> int | None:
    """How many samples there are, where the data know it."""
    pair = in_memory(data)
    if pair is not None:
        return len(pair[0])
    source = data.dataset if _is_loader(data) else data
    return _length(source) if _is_indexed(source) else None


def named_samples(data: Any, indices: Iterable[int]) -> str:
    """Samples by their files, where the data set knows them, else by their numbers."""
    listed = getattr(data, "listed", None)
    # of an image and its mask, the mask
    files = getattr(data, "samples", None) if listed is None else [p[::-1] for p, _ in listed()]
    known = isinstance(files, list) and all(isinstance(item, tuple) for item in files)
    names = [str(files[index][0]) if known and files else str(index) for index in sorted(indices)]
    return some(names, 10)


def _as_batch(batch: Any) -> Batch:
    try:
        images, labels = batch[0], batch[1]
    except (KeyError, IndexError, TypeError):
        images, labels = None, None
    if _is_list_of(Mapping, labels) and (isinstance(images, Tensor) or _is_list_of(Tensor, images)):
        return Batch([as_plain(image) for image in images], list(labels))
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise DataError(
            "data",
            got=f"a batch of type {type(batch).__name__}",
            need="(images, labels), both tensors, or a detector's lists of images and of targets",
            hint="a collate_fn that returns such a pair",
        )
    return Batch(images, labels)


def _is_list_of(kind: type, items: Any) -> bool:
    fits = isinstance(items, (list, tuple)) and len(items) > 0
    return fits and all(isinstance(item, kind) for item in items)


def check_evaluation_data(data: Any) -> None:
    """Refuse before a training what could not be evaluated after it.

    Raises:
        DataError: no samples, labels that are no classes, something that is gone after one reading,
            or a form that is no data at all.
    """
    pair = in_memory(data)
    if pair is None and not isinstance(data, IterableDataset):
        if not (_is_indexed(data) or _is_loader(data)):
            raise _unusable(data)
        if isinstance(data, Iterator):
            raise DataError(
                "val_data",
                got=f"{type(data).__name__}, which can be read only once",
                need="data that can be read after every epoch",
                hint="a list, a Dataset or a DataLoader",
            )
    samples = _length_or_none(data if pair is None else pair[0])
    if samples == 0:
        raise DataError("val_data", got="no samples", need="at least one", hint="val_data=None")


def in_memory(data: Any) -> tuple[Tensor, Tensor] | None:
    """(images, labels) where the data are a pair of tensors in memory, else None.

    Raises:
        DataError: tensors or arrays, but no such pair.
    """
    if type(data) is TensorDataset:  # a subclass may augment
        data = data.tensors
    if not (isinstance(data, (tuple, list)) and data and hasattr(data[0], "shape")):
        return None
    if len(data) != 2 or not isinstance(data[0], Tensor):
        raise DataError(
            "data",
            got=f"a {type(data).__name__} of {len(data)} × {type(data[0]).__name__}",
            need="a pair of tensors, (images, labels)",
            hint="(torch.as_tensor(images), torch.as_tensor(labels))",
        )
    images, labels = data[0], torch.as_tensor(data[1])
    if not labels.ndim or len(labels) != len(images):
        raise DataError(
            "data",
            got=f"images {tuple(images.shape)} and labels {tuple(labels.shape)}",
            need="as many labels as images, one class number each",
            hint="labels of shape (N,)",
        )
    return images, labels


def _is_indexed(data: Any) -> bool:
    has_both = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return has_both and not isinstance(data, (str, bytes))


def _is_loader(data: Any) -> bool:
    return isinstance(data, DataLoader) or (
        hasattr(data, "__iter__") and not hasattr(data, "__getitem__")
    )


def _quietly(loader: Any) -> Iterator[Any]:
    """Start a loader without taking from the global random generator."""
    with rng_kept():
        batches: Iterator[Any] = iter(loader)
    return batches


def _length(dataset: Any) -> int:
    return len(dataset)


def _length_or_none(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _generators(loader: Any) -> list[torch.Generator]:
    """Every generator that a loader's order comes from."""
    batched = getattr(loader, "batch_sampler", None)
    places = (loader, getattr(loader, "sampler", None), batched, getattr(batched, "sampler", None))
    found = {id(g): g for g in (getattr(place, "generator", None) for place in places) if g}
    return list(found.values())


def _batch_size(loader: Any) -> int:
    """Samples in a full batch; where no attribute says so, those of the first batch."""
    for place in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(place, "batch_size", None)
        if isinstance(size, int):
            return size
    generators = _generators(loader)
    states = [generator.get_state() for generator in generators]
    first = next(_quietly(loader), None)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return 1 if first is None else len(_as_batch(first).labels)


def _loader_length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise TrainingError(
            "train_data",
            got="a loader without a length",
            need="one, so that warm-up, decay and time left can be worked out",
            hint="a __len__ on its data set",
        ) from error


def _non_empty(batches: Batches) -> Batches:
    if batches.count == 0:
        raise DataError(
            "train_data",
            got=f"{batches.samples} samples",
            need="at least one per process",
            hint="more data or fewer processes",
        )
    return batches


def _unusable(data: Any) -> DataError:
    return DataError(
        "data",
        got=type(data).__name__,
        need="a Dataset of (tensor, class), a DataLoader, or a pair of tensors (images, labels)",
        hint="normswap.data.labelled_dataset for a folder",
    )
