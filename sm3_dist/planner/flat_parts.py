"""What ranks hold of a tensor that lies flattened and is cut into ranges: some ranks in a row, all of them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from sm3_dist.layout.box import Box, flat_boxes, overlaps
from sm3_dist.layout.cover import Cell
from sm3_dist.planner.rectangles import Interval, product, touched_cells


@dataclass(frozen=True)
class FlatParts:
    """The ranges of a flattened tensor.

    Attributes:
        shape: of the tensor.
        ranks: how many there are.
        first: the first of them that holds elements.
        ends: where the ranges of that one and of those after it end, the first one's start before them all.
    """

    shape: tuple[int, ...]
    ranks: int
    first: int
    ends: tuple[int, ...]

    def lengths(self) -> list[Tensor]:
        """The length of each dimension of the smallest box around what each rank holds."""
        return [self._of_each_rank(stop - start) for start, stop in _extents(self.shape, self.ends)]

    def boxes(self) -> list[tuple[Box, ...]]:
        """What each rank holds."""
        held: list[tuple[Box, ...]] = [()] * self.ranks
        for rank, (start, stop) in enumerate(pairwise(self.ends), self.first):
            held[rank] = tuple(flat_boxes(self.shape, start, stop))
        return held

    def numel(self) -> Tensor:
        """How many elements each rank holds."""
        return self._of_each_rank(torch.tensor(self.ends, dtype=torch.int64, device="cpu").diff())

    def stored(self, cells: Cell) -> Tensor:
        """How many entries of an accumulator each rank touches."""
        return self._of_each_rank(product([stop - start for start, stop in _sides(self.shape, self.ends, cells)]))

    def peers(self, cells: Cell) -> tuple[int, ...]:
        """All ranks share what is shared."""
        return (0,)

    def shared(self, cells: Cell) -> tuple[Tensor, Tensor]:
        """How many entries of an accumulator each rank sends, and whether all that it stores is in one region of them.

        All ranks send the same, and 0 for what they do not hold.
        """
        numel, inside = _shared(self.shape, self.ends, cells)
        return torch.full((self.ranks,), numel, dtype=torch.int64, device="cpu"), self._of_each_rank(inside)

    def beside(self, cells: Cell) -> tuple[Tensor, Tensor]:
        """States hold what ranks work on."""
        nothing = torch.zeros(self.ranks, dtype=torch.int64, device="cpu")
        return nothing, nothing

    def _of_each_rank(self, value: Tensor) -> Tensor:
        result = value.new_zeros(self.ranks)
        result[self.first : self.first + len(self.ends) - 1] = value
        return result


@lru_cache(maxsize=4096)
def _extents(shape: tuple[int, ...], ends: tuple[int, ...]) -> list[Interval]:
    """The smallest boxes around ranges.

    A range within one row is the same question one dimension lower; one of several rows has all columns in it.
    """
    edges = torch.tensor(ends, dtype=torch.int64, device="cpu")
    first, last = edges[:-1], edges[1:] - 1
    inside = first <= last  # in one row of the dimensions before, and not empty
    result = []
    row = math.prod(shape)
    for n in shape:
        row //= max(1, n)
        start, stop = first // max(1, row), last // max(1, row) + 1
        several = (first <= last) * n
        result.append((torch.where(inside, start, 0), torch.where(inside, stop, several)))
        inside = inside & (stop - start == 1)
        first, last = torch.where(inside, first - start * row, first), torch.where(inside, last - start * row, last)
    return result


@lru_cache(maxsize=4096)
def _sides(shape: tuple[int, ...], ends: tuple[int, ...], cells: Cell) -> list[Interval]:
    """What the extents touch of an accumulator; nothing where they are empty."""
    held = torch.tensor(ends, dtype=torch.int64, device="cpu").diff() > 0
    sides = [touched_cells(interval, c) for interval, c in zip(_extents(shape, ends), cells, strict=True)]
    return [(torch.where(held, start, 0), torch.where(held, stop, 0)) for start, stop in sides]


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...], ends: tuple[int, ...], cells: Cell) -> tuple[int, Tensor]:
    """How many entries of an accumulator several ranges touch, and which ranges touch those of one region alone."""
    sides = _sides(shape, ends, cells)
    starts = torch.stack([start for start, _ in sides], 1)
    stops = torch.stack([stop for _, stop in sides], 1)
    boxes = [Box(tuple(start), tuple(stop)) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    regions = overlaps(boxes)
    inside = torch.zeros(len(boxes), dtype=torch.bool, device="cpu")
    for region in regions:
        start, stop = torch.tensor([region.start, region.stop], dtype=torch.int64, device="cpu")
        inside |= (starts >= start).all(1) & (stops <= stop).all(1)
    return sum(region.numel for region in regions), inside
