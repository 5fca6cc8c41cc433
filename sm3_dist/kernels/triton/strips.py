"""How matrices are cut into the strips that the programs of the kernel of matrices take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sm3_dist.kernels.matrices import ENDLESS, Matrix, Run, matrices, sides
from sm3_dist.layout.shard import LocalShard

WIDE = 128
"""Most columns of a strip."""
TALL = 64
"""Rows of a strip where covers are whole slices."""
FARTHEST = 1 << 30
"""No element of a strip may lie farther from its beginning, in elements: offsets are in 32 bits."""


@dataclass(frozen=True)
class Strips:
    """The strips of one matrix.

    Attributes:
        matrix: the matrix.
        vector: whether it can be read so many elements at a time, as far as it tells itself; else 1.
        side: columns of a group.
        groups: groups side by side.
        length: columns of a block, as the kernel counts them.
        blocked: whether covers are blocks.
        aside: whether other programs know of its entries.
        fields: int32 of shape ``(strips, 6)``: the fields of a strip but the first.
    """

    matrix: Matrix
    vector: int
    side: int
    groups: int
    length: int
    blocked: bool
    aside: bool
    fields: Tensor


def strips_of(shard: LocalShard, operands: Sequence[Sequence[Tensor]], vector: int) -> list[Strips] | None:
    """The strips of what a rank holds of a tensor; ``None`` where the general kernel is to take it.

    Args:
        shard: what the rank holds.
        operands: for each of weight, gradient and momentum the boxes as views.
        vector: how many elements at a time are wanted.
    """
    if len(shard.shape) < 2:
        return None
    if shard.cover_block is not None:
        found = [m for m in matrices(shard, operands) if m.rows.count and m.columns.count]
        # (Between several boxes lie entries of which this rank knows nothing, and which become 0.)
        together = len(shard.boxes) > 1 or not _apart(found)
    else:
        found = list(_slices(shard, operands))
        together = True
        if len(shard.shape) != 2 or any(_farthest(m, TALL) > FARTHEST for m in found):
            return None
        if any(n > 1 and s != 1 for each in operands for view in each for n, s in [(view.shape[1], view.stride(1))]):
            return None
    return [_cut(matrix, shard, vector, together) for matrix in found]


def too_far(shard: LocalShard, operands: Sequence[Sequence[Tensor]]) -> bool:
    """Whether a tensor with block covers has rows that are too far apart."""
    return any(_farthest(matrix) > FARTHEST for matrix in matrices(shard, operands))


def lines(shard: LocalShard) -> tuple[int, int]:
    """Entries in a row of the accumulators of rows (and tiles), and of columns."""
    if shard.cover_block is None:
        return 1, 0
    _, columns = sides(shard)
    return columns.outer * columns.blocks, columns.outer * columns.length


def _cut(matrix: Matrix, shard: LocalShard, vector: int, together: bool) -> Strips:
    rows, columns = matrix.rows, matrix.columns
    blocked = shard.cover_block is not None
    long = min(columns.length, columns.count + columns.phase) if blocked else WIDE
    side = min(WIDE, max(8, 1 << (long - 1).bit_length()))
    fits = (
        matrix.table is None
        and side == min(long, WIDE)
        and not any(n % vector for n in (columns.count, columns.phase, long, *matrix.strides))
        and len(set(matrix.strides)) == 1
    )
    across = _across(columns, long, side) if blocked else _across_slices(columns)
    down = _down(rows) if blocked else [(a, min(TALL, rows.count - a), 0) for a in range(0, rows.count, TALL)]
    grid = itertools.product(down, across)
    fields = torch.tensor([(*a, *b) for a, b in grid], dtype=torch.int32, device="cpu").view(-1, 6)
    aside = together or long > WIDE
    return Strips(matrix, vector if fits else 1, side, WIDE // side, min(long, side), blocked, aside, fields)


def _across_slices(columns: Run) -> list[tuple[int, int, int]]:
    return [(start, columns.count, 0) for start in range(0, columns.count, WIDE)]


def _across(columns: Run, long: int, side: int) -> list[tuple[int, int, int]]:
    """First column, end of the columns and first block of each strip of a row of blocks."""
    if long <= WIDE:
        step = WIDE // side
        blocks = -(-(columns.count + columns.phase) // long)
        return [(b * long - columns.phase, columns.count, columns.block + b) for b in range(0, blocks, step)]
    found = []
    for b, start in enumerate(range(-columns.phase, columns.count, long)):
        stop = min(columns.count, start + long)
        found += [(a, min(stop, a + WIDE), columns.block + b) for a in range(max(0, start), stop, WIDE)]
    return found


def _down(rows: Run) -> list[tuple[int, int, int]]:
    """First row, number of rows and block of each row of blocks."""
    found = []
    for b, start in enumerate(range(-rows.phase, rows.count, min(rows.length, rows.count + rows.phase))):
        first, stop = max(0, start), min(rows.count, start + rows.length)
        found.append((first, stop - first, rows.block + b))
    return found


def _apart(found: Sequence[Matrix]) -> bool:
    """Whether no two matrices have an entry in common."""
    rectangles = [(*_blocks(m.rows), *_blocks(m.columns)) for m in found]
    if len(rectangles) > 64 and len({m.columns for m in found}) == 1:  # one under another
        ranges = sorted({r[:2] for r in rectangles})
        return len(ranges) == len(rectangles) and all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    return not any(
        a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for a, b in itertools.combinations(rectangles, 2)
    )


def _blocks(run: Run) -> tuple[int, int]:
    """The first block of a run, and the end of its blocks."""
    return run.block, run.block - (-(run.count + run.phase) // run.length)


def _farthest(matrix: Matrix, tall: int = ENDLESS) -> int:
    """How far a strip's last element lies from its first."""
    wide = matrix.columns.count if matrix.table is None else int(matrix.table.max()) + 1
    return min(tall, matrix.rows.length, matrix.rows.count) * max(matrix.strides) + wide


def _slices(shard: LocalShard, operands: Sequence[Sequence[Tensor]]) -> Iterator[Matrix]:
    """The boxes of a tensor of two dimensions whose covers are whole rows and columns."""
    for b, box in enumerate(shard.boxes):
        if len(box.shape) != 2 or not box.numel:
            continue
        runs = [
            Run(n, a - first, 0, ENDLESS, 0, a, (0,), range(d, d + 1))
            for d, (n, a, first) in enumerate(zip(box.shape, box.start, shard.extent.start, strict=True))
        ]
        steps = tuple(views[b].stride(0) if box.shape[0] > 1 else 0 for views in operands)
        yield Matrix(b, runs[0], runs[1], (0,) * len(operands), steps, None)
