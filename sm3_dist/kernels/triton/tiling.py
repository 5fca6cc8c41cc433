"""How a box of a tensor is cut into the tiles that the programs of the general kernel take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sm3_dist.kernels.fused import DIMS

TILE = 2048
"""Elements of a tile."""
RANDOM_TILE = 512
"""Of one whose elements need a random number each, which takes registers."""
VECTOR = 1024
"""Elements of a tile of a vector, at most."""
LONG_ROW = 8192
"""Trailing dimensions are joined to rows of at most this length."""


@dataclass(frozen=True)
class Tiling:
    """How a box is cut into tiles.

    Attributes:
        lead: number of leading dimensions, which count rows; the others count columns.
        tall: rows of a tile.
        wide: columns of a tile.
        tiles: number of tiles.
        rows: of the box.
        columns: of the box.
    """

    lead: int
    tall: int
    wide: int
    tiles: int
    rows: int
    columns: int


def cut(shape: Sequence[int], strides: Sequence[Sequence[int]], tile: int) -> Tiling:
    """Cut a box into tiles.

    Args:
        shape: shape of the box; dimensions here are in memory order.
        strides: of weight, gradient and momentum.
        tile: elements of a tile.

    Example:
        >>> cut((300, 3, 3), [(9, 3, 1)] * 3, 2048)
        Tiling(lead=1, tall=128, wide=16, tiles=3, rows=300, columns=9)
    """
    lead = _leading(shape, strides)
    rows, columns = math.prod(shape[:lead]), math.prod(shape[lead:])
    if lead == 0:  # of one length for all vectors, whose tiles are then launched together
        tall, wide = 1, min(tile, VECTOR)
    else:  # few columns for short rows, else so many that a warp reads whole cache lines
        wide = min(256, max(8, 1 << (columns - 1).bit_length()))
        tall = tile // wide
    return Tiling(lead, tall, wide, -(-rows // tall) * -(-columns // wide), rows, columns)


def padded(numbers: Sequence[int], length: int = DIMS) -> list[int]:
    """Zeros behind, up to the length that tables have room for."""
    return [*numbers, *[0] * (length - len(numbers))]


def _leading(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """Number of leading dimensions that count rows; the others form the row, as many as make it long enough."""

    def contiguous(d: int) -> bool:
        expected = [math.prod(shape[i + 1 :]) for i in range(d, len(shape))]
        return all(n == 1 or s == e for each in strides for n, s, e in zip(shape[d:], each[d:], expected, strict=True))

    d = len(shape) - 1
    while d > 1 and math.prod(shape[d - 1 :]) <= LONG_ROW and contiguous(d - 1):
        d -= 1
    return d
