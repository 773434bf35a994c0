"""Unlabelled images: training batches, augmented, and a held-out part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.calibration.tuning import Tuning
from normswap.drift import Pair, batches
from normswap.errors import CalibrationError
from normswap.running import entries, leaves, moved

FEWEST = 8
_NUMBERS = 30_000_000
"""Input values of one round: what lanes keep is a multiple of them."""


class Pool:
    """Training batches for distillation, and a held-out part that decides which state is best."""

    def __init__(
        self, images: Tensor | Iterable[Any], size: int, device: torch.device, seed: int
    ) -> None:
        found = joined(batches(images, size))
        if isinstance(found, Tensor) and found.is_inference():
            found = found.clone()
        _check_finite(found)
        self.images: Tensor | list[Any] = found
        self.size, self.device = size, device
        self._draw = torch.Generator().manual_seed(seed)
        self.dice = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        units = len(found)
        few = units < 16  # too few to set any aside
        self.aside = not few
        self._held = list(range(0, units, 1 if few else 8))
        self._used = [i for i in range(units) if few or i % 8]
        self._wide = units

    @property
    def count(self) -> int:
        """Number of images."""
        if isinstance(self.images, Tensor):
            return len(self.images)
        return sum(entries(batch) for batch in self.images)

    def _at(self, indices: list[int]) -> Any:
        if isinstance(self.images, Tensor):
            return self.images[indices].to(self.device)
        return moved(self.images[indices[0]], self.device)

    def held_out(self) -> Iterator[Any]:
        """The images that decide which state is best, in batches."""
        step = self.size if isinstance(self.images, Tensor) else 1
        for start in range(0, len(self._held), step):
            yield self._at(self._held[start : start + step])

    def limit(self, *, held: int, wide: int) -> None:
        """Hold out at most ``held`` images, eight at least, and ``wide`` for the closed form."""
        per_unit = 1 if isinstance(self.images, Tensor) else max(1, self.count // len(self.images))
        self._held = self._held[: max(1, max(held, FEWEST) // per_unit)]
        self._wide = max(wide, FEWEST)

    def widest(self, numbers: int = 20_000_000) -> Any:
        """As many images in one batch as fit ``numbers`` input values."""
        if not isinstance(self.images, Tensor):
            return self._at(self._used[:1])
        fitting = max(FEWEST, numbers // max(self.images[0].numel(), 1))
        return self._at(self._used[: min(fitting, self._wide)])

    def first(self) -> Any:
        """One image, or one batch where they come in batches."""
        return self._at([0])

    def rounds(self, count: int) -> Iterator[list[Any]]:
        """All images, in rounds of about ``count``; a round is a list of batches, four at least."""
        order = torch.randperm(len(self._used), generator=self.dice).tolist()
        used = [self._used[i] for i in order]
        if not isinstance(self.images, Tensor):
            step = max(2, count // max(1, self.count // len(self.images)))
            yield from ([self._at([i]) for i in part] for part in _parts(used, step))
            return
        fitting = max(FEWEST, _NUMBERS // max(self.images[0].numel(), 1))
        for part in _parts(used, max(FEWEST, min(count, fitting))):
            yield [self._at(chosen) for chosen in _lanes(part, self.size)]

    def draw(self, tuning: Tuning) -> Any:
        """The next training batch, augmented where it is a tensor of images."""
        step = self.size if isinstance(self.images, Tensor) else 1
        if len(self._order) < min(step, len(self._used)):
            shuffled = torch.randperm(len(self._used), generator=self._draw).tolist()
            self._order = [self._used[i] for i in shuffled]
        chosen, self._order = self._order[:step], self._order[step:]
        batch = self._at(chosen)
        return self._augmented(batch, tuning) if isinstance(batch, Tensor) else batch

    def choose(self, pairs: tuple[Pair, ...], share: float) -> tuple[Pair, ...]:
        """A random share of the sites, at least one."""
        count = max(1, round(share * len(pairs)))
        chosen = torch.randperm(len(pairs), generator=self._draw)[:count].tolist()
        return tuple(pairs[i] for i in sorted(chosen))

    def _augmented(self, x: Tensor, tuning: Tuning) -> Tensor:
        if x.dim() < 3 or not x.is_floating_point():
            return x
        count, column = len(x), (-1, *[1] * (x.dim() - 1))
        rolls = torch.rand(3, count, generator=self._draw)
        partner = torch.randperm(count, generator=self._draw).to(x.device)
        noise = torch.randn(2, *x.shape[:2], *[1] * (x.dim() - 2), generator=self._draw)
        x = torch.where((rolls[0] < 0.5).view(column).to(x.device), x.flip(-1), x)
        if x.dim() == 4:
            x = self._warped(x, tuning)
        strength = 0.5 * rolls[1] * (rolls[2] < tuning.mix)
        x = torch.lerp(x, x[partner], strength.view(column).to(x))
        noise = (tuning.jitter * noise).to(x)
        return x * (1 + noise[0]) + noise[1]

    def _warped(self, x: Tensor, tuning: Tuning) -> Tensor:
        """Zoomed and shifted at random, mirrored at the border."""
        rolls = 2 * torch.rand(len(x), 4, generator=self._draw) - 1
        matrix = torch.zeros(len(x), 2, 3)
        matrix[:, 0, 0], matrix[:, 1, 1] = (1 + tuning.warp * rolls[:, :2]).unbind(1)
        matrix[:, :, 2] = tuning.warp * rolls[:, 2:]
        grid = F.affine_grid(matrix.to(x), list(x.shape), align_corners=False)
        warped: Tensor = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        return warped


def _check_finite(images: Tensor | list[Any]) -> None:
    """One NaN among the images would end the search before its first step."""
    if isinstance(images, Tensor):
        images = list(images)
    for at, item in enumerate(images):
        if not all(leaf.isfinite().all() for leaf in leaves(item)):
            raise CalibrationError(
                "images",
                got=f"values that are not finite, first at index {at}",
                need="finite numbers",
                hint="looking at how the images are made",
            )


def joined(found: list[Any]) -> Tensor | list[Any]:
    """One tensor if all batches are tensors of one image size, else the batches themselves."""
    tensors = [batch for batch in found if isinstance(batch, Tensor) and batch.dim() > 1]
    alike = len({batch.shape[1:] for batch in tensors}) == 1
    return torch.cat(tensors) if alike and len(tensors) == len(found) else found


def _parts(items: list[int], most: int) -> list[list[int]]:
    """Parts of nearly one length, none longer than ``most``."""
    count = max(1, -(-len(items) // most))
    return [items[i::count] for i in range(count)]


def _lanes(items: list[int], size: int) -> list[list[int]]:
    return _parts(items, max(1, min(size, -(-len(items) // 4))))
