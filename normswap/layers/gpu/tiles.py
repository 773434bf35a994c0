"""How a batch of maps is cut into tiles, one per program of a kernel.

A tile is some channels of one sample times some positions. Where a channel's positions fit into
one tile, a program holds them in registers and reads memory once. Longer rows are cut into parts:
one kernel sums each part, a second puts the sums together and reads again.
"""

from __future__ import annotations

from typing import NamedTuple

WHOLE = 16384  # elements that 16 warps hold in registers
_PIECE = 4096  # of a longer row, at a time
_SMALL = 2048
_FEWEST = 1024  # elements worth a program
_PROGRAMS = 1024  # eight for each processor of a large card
_MOST_PARTS = 128  # every program adds them up
_LINE = 128  # bytes that memory is best read by
_NARROW = 16  # channels side by side, below which whole sectors of memory would be read in vain


class Tiles(NamedTuple):
    """The cut.

    Attributes:
        channels: of a tile, a power of two.
        positions: of a tile, a power of two.
        parts: into how many a row is cut; 1 if a tile holds it whole.
        length: positions of a part, a multiple of ``positions`` if there are several.
        programs: tiles across the batch, times the parts.
        warps: of a program.
    """

    channels: int
    positions: int
    parts: int
    length: int
    programs: int
    warps: int


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def cut(samples: int, channels: int, positions: int, dense_channels: bool, itemsize: int) -> Tiles:
    """Choose the tiles of a batch.

    Args:
        samples: N.
        channels: C.
        positions: elements of one channel of one sample.
        dense_channels: whether neighbours in memory are channels rather than positions.
        itemsize: bytes of an element.
    """
    reach = power_of_two(positions)
    fewest, most = (_NARROW, _LINE // itemsize) if dense_channels else (1, max(1, _SMALL // reach))
    present = power_of_two(channels)
    fewest, width = min(fewest, present), min(most, present)
    if fewest * reach > WHOLE:
        return _in_parts(samples, channels, positions, width)
    while width > fewest and (
        width * reach > WHOLE
        or (width * reach > _FEWEST and samples * -(-channels // width) < _PROGRAMS // 4)
    ):
        width //= 2
    programs = samples * -(-channels // width)
    return Tiles(width, reach, 1, positions, programs, _warps(width * reach))


def _in_parts(samples: int, channels: int, positions: int, width: int) -> Tiles:
    piece = _PIECE // width
    tiles = samples * -(-channels // width)
    pieces = -(-positions // piece)
    parts = max(2, min(pieces, _MOST_PARTS, -(-_PROGRAMS // tiles)))
    length = -(-pieces // parts) * piece
    parts = -(-positions // length)
    return Tiles(width, piece, parts, length, tiles * parts, _warps(_PIECE))


def _warps(elements: int) -> int:
    return max(min(4, max(1, elements // 256)), min(16, elements // 512))
