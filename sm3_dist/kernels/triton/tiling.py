"""How a box of a tensor is cut into the tiles that the programs of a GPU kernel take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sm3_dist.kernels.fused import DIMS

TILE = 2048
"""Elements of a tile. Of tensors of three dimensions and more it has fewer under block covers, or registers run out."""
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
        side_by_side: rows and columns side by side of which the first stands for all, as far as blocks go.
    """

    lead: int
    tall: int
    wide: int
    tiles: int
    side_by_side: tuple[int, int] = (1, 1)


def cut(
    start: Sequence[int],
    shape: Sequence[int],
    extent_start: Sequence[int],
    strides: Sequence[Sequence[int]],
    offsets: Sequence[int],
    block: int,
) -> tuple[Tiling, list[int]]:
    """Cut a box into tiles.

    Args:
        start: where the box begins; dimensions here are in memory order.
        shape: its shape.
        extent_start: where what this rank holds begins.
        strides: of weight, gradient and momentum.
        offsets: where the box begins in their memory.
        block: indices per block of the covers; 0: covers are whole slices.

    Returns:
        The tiling, and the fields of the box from ``BOX_ROWS`` on.
    """
    shape, offsets = list(shape), list(offsets)
    at = [a - b for a, b in zip(start, extent_start, strict=True)]
    if block == 0:
        lead = _leading(shape, strides)
        rows, columns = math.prod(shape[:lead]), math.prod(shape[lead:])
        wide = min(TILE, max(16, 1 << (columns - 1).bit_length())) if lead == 0 else _width(columns)
        tall = TILE // wide if lead else 1
        side_by_side, bounds, in_blocks = (1, 1), [0, 0, 0], [0] * len(shape)
    else:
        # Columns are one dimension. Tiles, and so groups of indices side by side, begin at multiples of the size of a
        # group, which divides the block: so a group lies in one block. The box then begins within its first group.
        lead = len(shape) - 1
        in_blocks = [a - b // block * block for a, b in zip(start, extent_start, strict=True)]
        tile = TILE if lead == 1 else TILE // 4 if lead < 4 else TILE // 16
        wide = min(tile, _width(shape[lead]))
        tall = tile // wide
        even = block & -block
        groups = min(even, tall), min(even, wide)
        if lead > 1:  # filling up the last of several dimensions that count rows must not make many more of them
            few = (g for g in _halved(groups[0]) if 4 * _filled(start, shape, lead - 1, g) <= 5 * shape[lead - 1])
            groups = next(few, 1), groups[1]
        side_by_side = groups
        first = [start[lead - 1] % groups[0], start[lead] % groups[1]]
        bounds = [first[1], first[0], first[0] + shape[lead - 1]]
        for dim, before in zip((lead - 1, lead), first, strict=True):
            at[dim], in_blocks[dim] = at[dim] - before, in_blocks[dim] - before
        # (The stride along columns is 1, whatever PyTorch says of a single one.)
        offsets = [a - first[0] * each[lead - 1] - first[1] for a, each in zip(offsets, strides, strict=True)]
        rows, columns = (
            math.prod(shape[: lead - 1]) * _filled(start, shape, lead - 1, groups[0]),
            first[1] + shape[lead],
        )
        shape = [*shape[: lead - 1], _filled(start, shape, lead - 1, groups[0]), columns]
    fields = [rows, columns, *offsets, *bounds, *padded(shape), *padded(at), *padded(in_blocks)]
    fields += [stride for each in strides for stride in padded(each)]
    return Tiling(lead, tall, wide, -(-rows // tall) * -(-columns // wide), side_by_side), fields


def _filled(start: Sequence[int], shape: Sequence[int], dim: int, group: int) -> int:
    """Length of a dimension of a box, filled up to whole groups of indices."""
    return -(-(start[dim] % group + shape[dim]) // group) * group


def _halved(power: int) -> Iterator[int]:
    while power:
        yield power
        power //= 2


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


def _width(columns: int) -> int:
    """Columns of a tile: few for short rows, else so many that a warp reads whole cache lines."""
    return min(256, max(8, 1 << (columns - 1).bit_length()))
