"""What the ranks of a mesh hold of a tensor that is cut along its dimensions: one rectangle each, all ranks at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import and_, mul, or_

import torch
from torch import Tensor

from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import Cell

Interval = tuple[Tensor, Tensor]
"""First and one past the last index, of each rank: int64 tensors that broadcast to the shape of the mesh."""


@dataclass(frozen=True, eq=False)
class Rectangles:
    """The rectangles of the ranks of a mesh.

    Attributes:
        shape: of the tensor.
        mesh: its sizes; ranks are counted along the last dimension first.
        cuts: for each dimension of the mesh the one of the tensor that it cuts; ``None`` where it has replicas.
        axes: for each dimension of the tensor the mesh dimensions (of more than one rank) that cut it.
        intervals: for each dimension of the tensor the indices that each rank holds.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    cuts: tuple[int | None, ...]
    axes: tuple[tuple[int, ...], ...]
    intervals: tuple[Interval, ...]

    def lengths(self) -> list[Tensor]:
        """The length of each dimension of the rectangle of each rank."""
        return [self._of_each_rank(stop - start) for start, stop in self.intervals]

    def boxes(self) -> list[tuple[Box, ...]]:
        """What each rank holds."""
        ends = [[self._of_each_rank(side).tolist() for side in interval] for interval in self.intervals]
        starts, stops = (list(zip(*(each[k] for each in ends), strict=True)) for k in (0, 1))
        boxes = [Box(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return [(box,) if box.numel else () for box in boxes]

    def numel(self) -> Tensor:
        """How many elements each rank holds."""
        return product(self.lengths())

    def stored(self, cells: Cell) -> Tensor:
        """How many entries of an accumulator each rank touches."""
        sides = [touched_cells(interval, c) for interval, c in zip(self.intervals, cells, strict=True)]
        return product([self._of_each_rank(stop - start) for start, stop in sides])

    def peers(self, cells: Cell) -> tuple[int, ...]:
        """The mesh dimensions over which an accumulator is a maximum: those that cut what it does not tell apart."""
        return tuple(sorted(axis for axes, c in zip(self.axes, cells, strict=True) if c != 1 for axis in axes))

    def shared(self, cells: Cell) -> tuple[Tensor, Tensor]:
        """How many entries of an accumulator each rank sends, and whether all that it stores is in one region of them.

        Along a dimension that peers cut, an entry is in the intervals of some of them. It is shared unless it is in
        that of one alone in every dimension. (With whole slices peers store the same entries, even a rank that holds no
        element of the tensor.)
        """
        peers = self.peers(cells)
        if not peers:
            return torch.zeros(math.prod(self.mesh), dtype=torch.int64, device="cpu"), torch.tensor(
                False, dtype=torch.bool, device="cpu"
            )
        if 0 in cells:
            return self.stored(cells), torch.tensor(True, dtype=torch.bool, device="cpu")
        sides = [touched_cells(interval, c) for interval, c in zip(self.intervals, cells, strict=True)]
        total, alone = torch.ones(1, dtype=torch.int64, device="cpu"), torch.ones(1, dtype=torch.int64, device="cpu")
        all_shared, none_shared, whole = [], [], []
        for (start, stop), axes, n, c in zip(sides, self.axes, self.shape, cells, strict=True):
            if not set(axes) & set(peers):
                total, alone = total * (stop - start), alone * (stop - start)
                continue
            holders = _coverage(start, stop, -(-n // c))
            total, alone = total * (holders > 0).sum(), alone * (holders == 1).sum()
            before = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), (holders > 1).cumsum(0)])
            all_shared.append(before[stop] - before[start] == stop - start)
            none_shared.append(before[stop] == before[start])
            whole.append(bool((holders != 1).all()))
        inside = self._in_one_region(all_shared, none_shared, whole)
        return self._of_each_rank(total - alone), self._of_each_rank(inside)

    def beside(self, cells: Cell) -> tuple[Tensor, Tensor]:
        """How many entries of an accumulator the state of each rank holds beside those that the rank works on.

        With block covers the state is cut as PyTorch cuts the grid. Where that is not what each rank needs, it works on
        a copy, and sends what states of peers hold and they do not need.

        Returns:
            how many the state holds, and how many of what it needs the rank sends to them; 0 where there is no copy.
        """
        nothing = torch.zeros(math.prod(self.mesh), dtype=torch.int64, device="cpu")
        if 0 in cells:
            return nothing, nothing
        grid = tuple(-(-n // c) for n, c in zip(self.shape, cells, strict=True))
        needed = [touched_cells(interval, c) for interval, c in zip(self.intervals, cells, strict=True)]
        chunks = rectangles(grid, self.mesh, self.cuts)
        if self._same(chunks.intervals, needed):
            return nothing, nothing
        plain = any(len(axes) > 1 and c != 1 for axes, c in zip(self.axes, cells, strict=True))
        chunks = rectangles(grid, self.mesh, self.cuts, plain) if plain else chunks
        peers = self.peers(cells)
        all_of_it, needed_there = [], []
        for (start, stop), (low, high), axes, n in zip(needed, chunks.intervals, self.axes, grid, strict=True):
            low, high = torch.maximum(start, low), torch.minimum(stop, high)
            common = (high - low).clamp(min=0)
            if not set(axes) & set(peers):
                all_of_it.append(common)
                needed_there.append(common)
                continue
            covered = _coverage(low, low + common, n)  # by those peers whose states hold what they need
            before = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), covered.cumsum(0)])
            all_of_it.append(stop - start)
            needed_there.append(before[stop] - before[start])
        return chunks.numel(), self._of_each_rank(product(all_of_it) - product(needed_there))

    def _same(self, some: Sequence[Interval], others: Sequence[Interval]) -> bool:
        """Whether each rank has the same in both, or nothing in either."""
        equal = [(a == b) & (c == d) for (a, c), (b, d) in zip(some, others, strict=True)]
        empty = [reduce(or_, [start == stop for start, stop in sides]) for sides in (some, others)]
        return bool((reduce(and_, equal) | reduce(and_, empty)).all())

    @staticmethod
    def _in_one_region(all_shared: list[Tensor], none_shared: list[Tensor], whole: list[bool]) -> Tensor:
        """Whether regions, which are joined along the last dimension first, leave what a rank stores in one piece."""
        inside = all_shared[0]
        for k in range(1, len(all_shared)):
            aside = reduce(and_, none_shared[:k])
            inside = inside | (all_shared[k] if whole[k] else all_shared[k] & aside)
        return inside

    def _of_each_rank(self, value: Tensor) -> Tensor:
        return value.expand(self.mesh).reshape(-1)


@lru_cache(maxsize=4096)
def rectangles(
    shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[int | None, ...], plain: bool = False
) -> Rectangles:
    """Cut a tensor as ``torch.chunk`` does, by the last dimension of the mesh first.

    Args:
        shape: of the tensor.
        mesh: its sizes.
        cuts: for each dimension of the mesh the one of the tensor that it cuts; ``None`` where it has replicas.
        plain: by the first dimension of the mesh first.

    Example:
        >>> rectangles((5, 6), (2, 2), (0, 1)).numel()
        tensor([9, 9, 6, 6])
    """
    intervals: list[Interval] = [
        (torch.tensor(0, dtype=torch.int64, device="cpu"), torch.tensor(n, dtype=torch.int64, device="cpu"))
        for n in shape
    ]
    axes: list[tuple[int, ...]] = [() for _ in shape]
    for axis in range(len(mesh)) if plain else reversed(range(len(mesh))):
        d = cuts[axis]
        if d is None:
            continue
        start, stop = intervals[d]
        index = torch.arange(mesh[axis], dtype=torch.int64, device="cpu").view(
            [-1 if a == axis else 1 for a in range(len(mesh))]
        )
        chunk = -((start - stop) // mesh[axis])
        start = torch.minimum(start + index * chunk, stop)
        intervals[d] = start, torch.minimum(start + chunk, stop)
        axes[d] += (axis,) if mesh[axis] > 1 else ()
    return Rectangles(shape, mesh, cuts, tuple(axes), tuple(intervals))


def touched_cells(interval: Interval, c: int) -> Interval:
    """The cells of length ``c`` that an interval touches; as :func:`sm3_dist.layout.cover.touched` has it."""
    start, stop = interval
    if c == 0:
        return torch.zeros_like(start), torch.ones_like(stop)
    return start // c, torch.where(start < stop, -(-stop // c), start // c)


def _coverage(start: Tensor, stop: Tensor, cells: int) -> Tensor:
    """In how many intervals each of the cells is."""
    change = torch.zeros(cells + 1, dtype=torch.int64, device="cpu")
    for edge, by in ((start, 1), (stop, -1)):
        edge = edge.reshape(-1)
        change.index_add_(0, edge, torch.full_like(edge, by))
    return change.cumsum(0)[:-1]


def product(factors: Sequence[Tensor]) -> Tensor:
    """Of each rank's factors."""
    return reduce(mul, factors)
