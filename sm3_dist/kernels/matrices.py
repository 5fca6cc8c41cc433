"""Tensors as matrices: what a kernel for block covers walks through, whatever the dimensions and the memory.

The first dimensions of a tensor make its rows and the others its columns (:func:`sm3_dist.layout.cover.split`). A block
of rows or columns is a run of them, but it ends where a dimension outside of it ends. What a rank stores of the
accumulators are three matrices: of rows by blocks of columns, of blocks of rows by columns, and of blocks by blocks.
What it holds of the weight is a list of matrices: a box is one if it is as long as the tensor in all but the first
dimension of either side, which nearly all boxes are, and else several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from sm3_dist.layout.box import Box, place
from sm3_dist.layout.cover import blocks, split
from sm3_dist.layout.shard import LocalShard

ENDLESS = 1 << 40
"""Length of a block that does not end within a matrix."""


@dataclass(frozen=True)
class Side:
    """The rows, or the columns, of what a rank stores of the accumulators.

    Attributes:
        outer: how many times the pattern of blocks repeats, for each index of the dimensions that blocks do not span.
        length: rows of one pattern.
        blocks: blocks of one pattern.
        block: rows of a block, but that the first and the last may be cut.
        phase: how many rows of the first block come before those stored.
    """

    outer: int
    length: int
    blocks: int
    block: int
    phase: int


@dataclass(frozen=True)
class Run:
    """The rows, or the columns, of a matrix: consecutive ones, of the rank's and of the original tensor.

    Attributes:
        count: how many.
        first: number of the first among those stored.
        block: number of its block among those stored.
        length: rows of a block.
        phase: how many rows of the block come before.
        place: number of the first in the original tensor.
        index: of the first, in the box: for each dimension of the side.
        dims: the dimensions that the run goes through.
    """

    count: int
    first: int
    block: int
    length: int
    phase: int
    place: int
    index: tuple[int, ...]
    dims: range


@dataclass(frozen=True)
class Matrix:
    """A part of a box in which rows, and columns, are consecutive.

    Attributes:
        box: number of the box.
        rows: which.
        columns: which.
        offsets: where its first element lies in the memory of each operand, from the first element of its view of the
            box.
        strides: from row to row.
        table: where its columns lie in a row of each operand, int64 of shape ``(operands, columns)``; ``None``: side by
            side.
    """

    box: int
    rows: Run
    columns: Run
    offsets: tuple[int, ...]
    strides: tuple[int, ...]
    table: Tensor | None


def sides(shard: LocalShard) -> tuple[Side, Side]:
    """The rows and the columns of the accumulators of a shard with block covers, of two dimensions or more."""
    assert shard.cover_block is not None
    s, lengths, extent = split(shard.shape), blocks(shard.shape, shard.cover_block), shard.extent
    return _side(range(s), lengths, extent), _side(range(s, len(shard.shape)), lengths, extent)


def matrices(shard: LocalShard, operands: Sequence[Sequence[Tensor]]) -> Iterator[Matrix]:
    """The matrices of a shard with block covers, of two dimensions or more, in the order of their rows.

    Args:
        shard: what the rank holds.
        operands: for each of weight, gradient and momentum the boxes as views.
    """
    assert shard.cover_block is not None
    s, k, lengths = split(shard.shape), len(shard.shape), blocks(shard.shape, shard.cover_block)
    found = []
    for b, box in enumerate(shard.boxes):
        strides = [views[b].stride() for views in operands]
        columns = list(_runs(range(s, k), lengths, box, shard, None))
        if not columns:  # it has no elements
            continue
        tables = _table(columns[0].dims, box.shape, strides)
        for rows, column in product(_runs(range(s), lengths, box, shard, strides), columns):
            index = (*rows.index, *column.index)
            offsets = tuple(sum(i * n for i, n in zip(index, stride, strict=True)) for stride in strides)
            steps = tuple(_step(rows.dims, box.shape, stride) or 0 for stride in strides)
            found.append(Matrix(b, rows, column, offsets, steps, tables))
    yield from sorted(found, key=lambda m: (m.rows.first, m.rows.count))


def _spanned(dims: range, lengths: Sequence[int]) -> int:
    """The first of the dimensions of a side that a block spans more than an index of: behind it, it spans all."""
    return next((d for d in dims if lengths[d] > 1), dims[-1])


def _side(dims: range, lengths: Sequence[int], extent: Box) -> Side:
    d, (start, shape) = _spanned(dims, lengths), (extent.start, extent.shape)
    inner = math.prod(shape[d + 1 : dims.stop])
    count = -(-(start[d] + shape[d]) // lengths[d]) - start[d] // lengths[d] if shape[d] else 0
    outer = math.prod(shape[dims.start : d])
    return Side(outer, shape[d] * inner, count, lengths[d] * inner, start[d] % lengths[d] * inner)


def _runs(
    dims: range, lengths: Sequence[int], box: Box, shard: LocalShard, strides: Sequence[Sequence[int]] | None
) -> Iterator[Run]:
    """Cut a side of a box into runs; ``strides``: so that from one to the next it is equally far in memory."""
    spanned, extent, shape = _spanned(dims, lengths), shard.extent, shard.shape
    d = dims[-1]
    while d > spanned and box.shape[d] == shape[d]:
        d -= 1
    while strides and any(_step(range(d, dims.stop), box.shape, stride) is None for stride in strides):
        d += 1
    inner = math.prod(shape[d + 1 : dims.stop])
    for outer in product(*(range(n) for n in box.shape[dims.start : d])):
        index = (*outer, *[0] * (dims.stop - d))
        at = [box.start[e] + i for e, i in zip(dims, index, strict=True)]
        first = [a - extent.start[e] for e, a in zip(dims, at, strict=True)]
        block = [a // lengths[e] - extent.start[e] // lengths[e] for e, a in zip(dims, at, strict=True)]
        counts = [-(-extent.stop[e] // lengths[e]) - extent.start[e] // lengths[e] for e in dims]
        yield Run(
            box.shape[d] * inner,
            place(first, extent.shape[dims.start : dims.stop]),
            place(block, counts),
            lengths[d] * inner if d == spanned else ENDLESS,
            box.start[d] % lengths[d] * inner if d == spanned else 0,
            place(at, shape[dims.start : dims.stop]),
            index,
            range(d, dims.stop),
        )


def _step(dims: range, shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """How far it is in memory from one place in these dimensions to the next; ``None`` if it differs."""
    long = [d for d in dims if shape[d] != 1]
    if any(strides[a] != strides[b] * shape[b] for a, b in pairwise(long)):
        return None
    return strides[long[-1]] if long else 1


def _table(dims: range, shape: Sequence[int], strides: Sequence[Sequence[int]]) -> Tensor | None:
    if all(_step(dims, shape, stride) == 1 for stride in strides):
        return None
    rows = []
    for stride in strides:
        places = torch.zeros((), dtype=torch.int64, device="cpu")
        for d in dims:
            places = places.unsqueeze(-1) + torch.arange(shape[d], dtype=torch.int64, device="cpu") * stride[d]
        rows.append(places.flatten())
    return torch.stack(rows)
