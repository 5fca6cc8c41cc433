"""The cover of a tensor: which accumulator entries speak for which of its elements.

SM3 keeps, for a tensor of shape ``(n_1, …, n_k)``, one accumulator per dimension. Entry ``r`` of accumulator ``i``
covers the elements ``{j : j_i = r}`` (a row of a matrix for ``i = 0``, a column for ``i = 1``).

With block covers the tensor counts as a matrix: the first dimensions make its rows and the others its columns, split
where the shorter side is longest (:func:`split`). A convolution ``(n, c, h, w)`` is one of ``n`` rows and ``c h w``
columns, stacked experts ``(e, n, m)`` one of ``e n`` rows and ``m`` columns. Both sides are cut into blocks of up to
``B`` indices (:func:`blocks`). An entry of accumulator 0 covers one block of a row, one of accumulator 1 one block of a
column, and one of accumulator 2 a tile, a block of either. (That of the tile bounds the others, so that the minimum of
all is what it is without; ``cover_product`` needs it.)

Either way the sets that an accumulator covers are boxes of one shape, side by side: its *cells*. Seen as an array over
its cells, an accumulator has ``k`` dimensions: its *grid*. A box of the tensor touches a rectangle of every grid, and
that rectangle is all that a rank which holds the box needs to store.

All of this depends on the shape of the tensor alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor
from torch.nn.functional import pad

from sm3_dist.layout.box import Box

Cell = tuple[int, ...]
"""Length of a cell in each dimension; 0 for all of a dimension."""


def split(shape: Sequence[int]) -> int:
    """How many dimensions make the rows of a tensor that counts as a matrix: the shorter side is then longest.

    Example:
        >>> split((512, 256, 3, 3)), split((8, 4096, 14336)), split((5, 5)), split((5,))
        (1, 2, 1, 0)
    """
    shape = tuple(shape)
    sides = [min(math.prod(shape[:s]), math.prod(shape[s:])) for s in range(1, len(shape))]
    return sides.index(max(sides)) + 1 if sides else 0


def blocks(shape: Sequence[int], block: int) -> Cell:
    """How many indices of each dimension a block spans: those of a side multiply to ``B`` at most, the last come first.

    Args:
        shape: shape of the tensor.
        block: ``B``.

    Example:
        >>> blocks((512, 256, 3, 3), 64), blocks((8, 4096, 14336), 64), blocks((5, 6), 4), blocks((9,), 4)
        ((64, 7, 3, 3), (1, 64, 64), (4, 4), (1,))
    """
    shape, s = tuple(shape), split(shape)
    if s == 0:
        return (1,) * len(shape)
    lengths: list[int] = []
    for side in (shape[s:], shape[:s]):
        room = block
        for n in reversed(side):
            lengths.insert(0, max(1, min(n, room)))
            room //= lengths[0]
    return tuple(lengths)


@lru_cache(maxsize=4096)
def cell(shape: tuple[int, ...], i: int, block: int | None) -> Cell:
    """The cells of accumulator ``i``.

    Args:
        shape: shape of the tensor.
        i: number of the accumulator.
        block: ``B``, or ``None`` for covers that are whole slices.

    Example:
        >>> cell((8, 9), 1, None)
        (0, 1)
        >>> [cell((512, 256, 3, 3), i, 64) for i in range(3)]
        [(1, 7, 3, 3), (64, 1, 1, 1), (64, 7, 3, 3)]
    """
    if block is None:
        return tuple(int(d == i) for d in range(len(shape)))
    s = split(shape)
    told_apart = (range(s), range(s, len(shape)), ())[i]
    return tuple(1 if d in told_apart else length for d, length in enumerate(blocks(shape, block)))


def accumulator_count(shape: Sequence[int], block: int | None) -> int:
    """How many accumulators a tensor has.

    Example:
        >>> accumulator_count((4, 5, 6, 7), None), accumulator_count((4, 5, 6, 7), 2), accumulator_count((4,), 2)
        (4, 3, 1)
    """
    return len(shape) if block is None else 3 if len(shape) > 1 else 1


def grid(shape: Sequence[int], i: int, block: int | None = None) -> tuple[int, ...]:
    """Shape of accumulator ``i`` as an array over its cells.

    Args:
        shape: shape of the tensor.
        i: number of the accumulator.
        block: ``B``, or ``None`` for covers that are whole slices.

    Example:
        >>> grid((4, 5, 6), 1)
        (1, 5, 1)
        >>> grid((4, 5), 0, block=2), grid((4, 5), 1, block=2), grid((4, 5), 2, block=2)
        ((4, 3), (2, 5), (2, 3))
    """
    return touched(Box.whole(shape), cell(tuple(shape), i, block)).stop


def touched(box: Box, cells: Cell) -> Box:
    """The rectangle of the grid of an accumulator that holds the cells of the elements of ``box``.

    Example:
        >>> touched(Box((2, 0), (4, 5)), (1, 0))
        Box(start=(2, 0), stop=(4, 1))
        >>> touched(Box((2, 1), (4, 5)), (1, 2))
        Box(start=(2, 0), stop=(4, 3))
    """
    sides = [
        (0, 1) if c == 0 else (a // c, -(-b // c) if a < b else a // c)
        for c, a, b in zip(cells, box.start, box.stop, strict=True)
    ]
    return Box(tuple(a for a, _ in sides), tuple(b for _, b in sides))


def spread(cover: Tensor, box: Box, cells: Cell) -> Tensor:
    """The entry that covers each element of ``box``: of the shape of the box, or one that broadcasts to it.

    Args:
        cover: the entries that the box touches, of shape ``touched(box, cells).shape``.
        box: the elements.
        cells: those of the accumulator.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1.0, 2.0]]), Box((0, 1), (1, 4)), (1, 2))
        tensor([[1., 2., 2.]])
    """
    for d, (c, a, b) in enumerate(zip(cells, box.start, box.stop, strict=True)):
        if c > 1 and cover.shape[d] > 1:  # one entry broadcasts as it is
            repeated = cover.unsqueeze(d + 1).expand(*cover.shape[: d + 1], c, *cover.shape[d + 1 :])
            cover = repeated.flatten(d, d + 1).narrow(d, a % c, b - a)
    return cover


def maxima(values: Tensor, box: Box, cells: Cell) -> Tensor:
    """The largest value in each cell: of shape ``touched(box, cells).shape``.

    Args:
        values: non-negative, one for each element of ``box`` and of its shape.
        box: the elements.
        cells: those of the accumulator.

    Example:
        >>> import torch
        >>> maxima(torch.tensor([[1.0, 3.0, 2.0]]), Box((0, 1), (1, 4)), (1, 2))
        tensor([[1., 3.]])
    """
    counts = touched(box, cells).shape
    whole = [d for d, c in enumerate(cells) if c != 1 and counts[d] == 1]
    if whole:
        values = values.amax(whole, keepdim=True)
    for d, c in enumerate(cells):
        if c > 1 and d not in whole:
            before, after = box.start[d] % c, -box.stop[d] % c
            if before or after:  # 0 is the identity of MAX
                values = pad(values, (0, 0) * (values.dim() - 1 - d) + (before, after))
            values = values.unflatten(d, (-1, c)).amax(d + 1)
    return values
