"""How a batch of maps is cut into tiles for the programs of a kernel.

A tile is some channels of one sample times some positions. Where statistics are of each sample and
a channel's positions fit into one tile, a program holds them in registers and reads memory once.
Longer rows, and the whole batch of a channel, are cut into parts: one kernel sums each part, a
second puts the sums together and reads again.
"""

from __future__ import annotations

from typing import NamedTuple

WHOLE = 16384  # elements that 16 warps hold in registers
_PIECE = 4096  # of a longer row, at a time
_SMALL = 2048
_FEWEST = 1024  # elements worth a program
_PROGRAMS = 1024  # eight for each processor of a large card
_MOST_PARTS = 128  # every program adds them up
_WIDE = 32  # channels side by side, where neighbours in memory are channels
_NARROW = 16  # fewer would read whole sectors of memory in vain


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


def cut(samples: int, channels: int, positions: int, dense_channels: bool) -> Tiles:
    """Choose the tiles of a batch.

    Args:
        samples: N.
        channels: C.
        positions: elements of one channel of one sample.
        dense_channels: whether neighbours in memory are channels rather than positions.
    """
    reach = power_of_two(positions)
    fewest, most = (_NARROW, _WIDE) if dense_channels else (1, max(1, _SMALL // reach))
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


class Shares(NamedTuple):
    """The cut of a batch whose statistics are of all samples.

    Attributes:
        channels: of a tile, a power of two.
        positions: of a tile, a power of two.
        samples: of a part.
        length: positions of a part.
        row_parts: into how many a row is cut.
        parts: how many a channel has, over all samples.
        programs: parts times the tiles across the channels.
        warps: of a program.
    """

    channels: int
    positions: int
    samples: int
    length: int
    row_parts: int
    parts: int
    programs: int
    warps: int


def share(samples: int, channels: int, positions: int, dense_channels: bool) -> Shares:
    """Cut a batch into parts with about as many programs as a large card runs at once.

    Args:
        samples: N; 1 if samples follow each other in memory as positions do.
        channels: C.
        positions: elements of one channel of one sample.
        dense_channels: whether neighbours in memory are channels rather than positions.
    """
    present, reach = power_of_two(channels), power_of_two(positions)
    if dense_channels:
        width = min(_WIDE, present)
        piece = min(reach, _PIECE // width)
    else:
        piece = min(reach, _PIECE)
        width = min(present, max(1, _SMALL // piece))
    while width * piece > _FEWEST:
        across, pieces = -(-channels // width), -(-positions // piece)
        if across * samples * pieces >= _PROGRAMS // 4:
            break
        width, piece = (width, piece // 2) if dense_channels or width == 1 else (width // 2, piece)
    across, pieces = -(-channels // width), -(-positions // piece)
    wanted = min(_MOST_PARTS, -(-_PROGRAMS // across))
    each = -(-samples // min(samples, wanted))
    sample_parts = -(-samples // each)
    length = -(-pieces // max(1, min(pieces, wanted // sample_parts))) * piece
    row_parts = -(-positions // length)
    parts = row_parts * sample_parts
    warps = 8 if width * max(piece, parts) >= _SMALL else 4
    return Shares(width, piece, each, length, row_parts, parts, parts * across, warps)


def _warps(elements: int) -> int:
    return max(min(8, max(1, elements // 256)), min(16, elements // 512))
