"""Boxes: half-open rectangles of a tensor's index space, and the boxes that a flat range consists of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True)
class Box:
    """The index set ``{j : start[d] <= j[d] < stop[d] for every dimension d}``.

    Args:
        start: first index of each dimension.
        stop: one past the last index of each dimension; ``stop[d] >= start[d]``.

    A box of a 0-dimensional tensor is ``Box((), ())`` and holds one element.

    Example:
        >>> box = Box((1, 0), (3, 4))
        >>> box.shape, box.numel
        ((2, 4), 8)
        >>> box & Box((2, 2), (9, 9))
        Box(start=(2, 2), stop=(3, 4))
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __and__(self, other: Box) -> Box:
        """The elements that lie in both boxes (an empty box where there are none)."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Box(start, stop)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices of this box in a tensor that holds exactly ``outer``."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))

    def along(self, dim: int, start: int, stop: int) -> Box:
        """The part of this box with indices ``start <= j[dim] < stop``."""
        lo = min(max(self.start[dim], start), self.stop[dim])
        hi = max(lo, min(self.stop[dim], stop))
        return Box(
            (*self.start[:dim], lo, *self.start[dim + 1 :]),
            (*self.stop[:dim], hi, *self.stop[dim + 1 :]),
        )

    def without(self, other: Box) -> list[Box]:
        """Disjoint boxes that together hold the elements of this box that are not in ``other``.

        Example:
            >>> Box((0, 0), (2, 3)).without(Box((1, 1), (9, 9)))
            [Box(start=(0, 0), stop=(1, 3)), Box(start=(1, 0), stop=(2, 1))]
        """
        common = self & other
        if not common.numel:
            return [self] if self.numel else []
        parts, rest = [], self
        for dim, (start, stop) in enumerate(zip(common.start, common.stop, strict=True)):
            parts += [rest.along(dim, rest.start[dim], start), rest.along(dim, stop, rest.stop[dim])]
            rest = rest.along(dim, start, stop)
        return [part for part in parts if part.numel]

    def chunks(self, limit: int) -> Iterator[Box]:
        """Cut into boxes of at most ``limit`` elements, leading dimensions first, in memory order."""
        if self.numel <= limit:
            if self.numel:
                yield self
            return
        dim = next(d for d, n in enumerate(self.shape) if n > 1)
        rows = max(1, limit * self.shape[dim] // self.numel)
        for start in range(self.start[dim], self.stop[dim], rows):
            yield from self.along(dim, start, start + rows).chunks(limit)


def place(index: Sequence[int], shape: Sequence[int]) -> int:
    """The place of an element of a tensor, counted in row-major order.

    Example:
        >>> place((1, 2), (4, 5)), place((), ())
        (7, 0)
    """
    found = 0
    for i, n in zip(index, shape, strict=True):
        found = found * n + i
    return found


def bounding(boxes: Sequence[Box], ndim: int) -> Box:
    """The smallest box that contains all ``boxes``; an empty one at the origin where there are none."""
    if not boxes:
        return Box((0,) * ndim, (0,) * ndim)
    start = tuple(min(column) for column in zip(*(box.start for box in boxes), strict=True))
    stop = tuple(max(column) for column in zip(*(box.stop for box in boxes), strict=True))
    return Box(start, stop)


def overlaps(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """The points that lie in two or more of the boxes, as boxes that do not overlap.

    The answer does not depend on the order of the boxes.

    Example:
        >>> overlaps([Box((0, 0), (2, 5)), Box((1, 0), (4, 5)), Box((3, 0), (3, 5))])
        (Box(start=(1, 0), stop=(2, 5)),)
    """
    times = Counter(box for box in boxes if box.numel)
    if times.total() < 2:
        return ()
    ndim = len(boxes[0].start)
    cuts = [sorted({side[d] for box in times for side in (box.start, box.stop)}) for d in range(ndim)]
    # How often each cell between the cuts is covered: a difference in every dimension, then the running sums.
    count = torch.zeros([len(cut) for cut in cuts], dtype=torch.int64, device="cpu")
    at = [{cut: k for k, cut in enumerate(cut)} for cut in cuts]
    sides = [[[at[d][cut] for d, cut in enumerate(side)] for side in (box.start, box.stop)] for box in times]
    index = torch.tensor(sides, dtype=torch.int64, device="cpu").view(len(times), 2, ndim)
    repeated = torch.tensor(list(times.values()), dtype=torch.int64, device="cpu")
    for corner in product((0, 1), repeat=ndim):
        where = (
            index[:, list(corner), list(range(ndim))] * torch.tensor(count.stride(), device="cpu", dtype=torch.int64)
        ).sum(1)
        count.view(-1).index_add_(0, where.long(), repeated * (-1) ** sum(corner))
    for d in range(count.dim()):
        count = count.cumsum(d)
    cells = [
        Box(
            tuple(cut[k] for cut, k in zip(cuts, cell, strict=True)),
            tuple(cut[k + 1] for cut, k in zip(cuts, cell, strict=True)),
        )
        for cell in (count > 1).nonzero().tolist()
    ]
    for d in reversed(range(count.dim())):
        cells = _joined(cells, d)
    return tuple(cells)


def _joined(boxes: Sequence[Box], dim: int) -> list[Box]:
    """Join boxes that touch along ``dim`` and are otherwise equal."""

    def others(box: Box) -> tuple[tuple[int, int], ...]:
        return tuple((a, b) for d, (a, b) in enumerate(zip(box.start, box.stop, strict=True)) if d != dim)

    joined: list[Box] = []
    for box in sorted(boxes, key=lambda box: (others(box), box.start[dim])):
        if joined and others(joined[-1]) == others(box) and joined[-1].stop[dim] == box.start[dim]:
            joined[-1] = Box(joined[-1].start, box.stop)
        else:
            joined.append(box)
    return sorted(joined, key=lambda box: box.start)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that the elements ``[start, stop)`` of a flattened tensor consist of.

    They come in memory order and follow one another without a gap, so each is contiguous in local memory. There are at
    most ``2 * len(shape) - 1`` of them.

    Args:
        shape: shape of the original tensor, flattened in row-major order.
        start: first element, ``0 <= start``.
        stop: one past the last element, ``start <= stop <= numel``.

    Raises:
        ValueError: if the range does not lie in the tensor.

    Example:
        The tail of a row, whole rows, the head of a row:

        >>> for box in flat_boxes((4, 5), 3, 17):
        ...     print(box)
        Box(start=(0, 3), stop=(1, 5))
        Box(start=(1, 0), stop=(3, 5))
        Box(start=(3, 0), stop=(4, 2))
    """
    shape = tuple(shape)
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"elements [{start}, {stop}) do not lie in a tensor of shape {shape}")
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:  # all in one row: the same question, one dimension lower
        inner = flat_boxes(shape[1:], start - first * row, stop - first * row)
        return [Box((first, *box.start), (first + 1, *box.stop)) for box in inner]
    boxes = []
    if start > first * row:
        boxes += flat_boxes(shape, start, (first + 1) * row)
        first += 1
    whole = stop // row
    if whole > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (whole, *shape[1:])))
    return boxes + flat_boxes(shape, whole * row, stop)
