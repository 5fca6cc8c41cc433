"""Flat ranges: how a run of elements is cut over ranks, and which accumulator entries the cut tensors share.

Flattened wrappers and ZeRO-1 lay tensors one after another and give each rank a range of the elements. What a rank
holds of one tensor is then a range of the flattened tensor, and tensors that are cut share entries at the cuts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from sm3_dist.layout.box import Box, bounding, flat_boxes, overlaps
from sm3_dist.layout.cover import accumulator_count, cell, touched
from sm3_dist.layout.shard import Peers, Shared

Range = tuple[int, int]
"""Elements ``[start, stop)`` of a flattened tensor."""

SLACK = 200
"""A cut moves by at most 1 / SLACK of an even range, so that ranges are even to 2 / SLACK, which is 1 %."""


def shared_entries(
    shape: tuple[int, ...],
    ranges: Sequence[Range],
    peers: Peers,
    cover_block: int | None = None,
    order: Sequence[int] | None = None,
) -> tuple[Shared | None, ...]:
    """The accumulator entries of one tensor that several ranks touch.

    Args:
        shape: shape of the tensor, at least one-dimensional.
        ranges: the elements of the flattened tensor that each of the peers holds.
        peers: the ranks over which the tensor is cut.
        cover_block: indices per block of the covers, ``None`` for whole slices.
        order: the dimensions in the order in which the tensor was flattened; ``None`` for ``0, 1, …``.

    Returns:
        for each accumulator the shared entries, ``None`` where each entry is touched by at most one rank.

    Example:
        Two ranks cut a matrix within row 1, after its third element. They share that row, and every column:

        >>> peers = Peers((0, 1), group=lambda: None)
        >>> rows, columns = shared_entries((4, 5), [(0, 8), (8, 20)], peers)
        >>> rows.regions
        (Box(start=(1, 0), stop=(2, 1)),)
        >>> columns.regions
        (Box(start=(0, 0), stop=(1, 5)),)

        Cut between rows, they share the columns alone:

        >>> rows, columns = shared_entries((4, 5), [(0, 10), (10, 20)], peers)
        >>> rows is None, columns.regions
        (True, (Box(start=(0, 0), stop=(1, 5)),))
    """
    order = range(len(shape)) if order is None else order
    flat = [flat_boxes([shape[d] for d in order], start, stop) for start, stop in ranges if start < stop]
    extents = [reordered(bounding(boxes, len(shape)), order) for boxes in flat]
    cells = [cell(shape, i, cover_block) for i in range(accumulator_count(shape, cover_block))]
    regions = [overlaps([touched(extent, each) for extent in extents]) for each in cells]
    return tuple(Shared(peers, boxes) if boxes else None for boxes in regions)


def reordered(box: Box, order: Sequence[int]) -> Box:
    """A box of the tensor with dimensions ``order`` as a box of the tensor with dimensions ``0, 1, …``.

    Example:
        >>> reordered(Box((1, 2, 3), (4, 5, 6)), (2, 0, 1))
        Box(start=(2, 3, 1), stop=(5, 6, 4))
    """
    place = [order.index(d) for d in range(len(order))]
    return Box(tuple(box.start[p] for p in place), tuple(box.stop[p] for p in place))


def even_cuts(shapes: Sequence[Sequence[int]], parts: int) -> list[int]:
    """Where to cut the concatenation of tensors into ranges of equal size.

    A cut moves to the next border between rows, so that no row is shared, if there is one so close that the ranges stay
    even within 1 %; and to a border between tensors, so that nothing is shared, if that is at most a row further.

    Args:
        shapes: shape of each tensor.
        parts: number of ranges.

    Returns:
        the ``parts + 1`` ends of the ranges, the first 0 and the last the number of elements.

    Example:
        >>> even_cuts([(1000, 10), (1000, 20)], 2)  # the middle, 15000, is between rows of the second tensor
        [0, 15000, 30000]
        >>> even_cuts([(1001, 10), (999, 20)], 2)  # the middle, 14995, is within a row of the second tensor
        [0, 14990, 29990]
        >>> even_cuts([(1000, 10), (1001, 10)], 2)  # the border between the tensors is less than a row away
        [0, 10000, 20010]
    """
    ends = list(accumulate(map(math.prod, shapes), initial=0))
    total = ends[-1]
    slack = total // (parts * SLACK)
    return [0, *(_near(part * total // parts, shapes, ends, slack) for part in range(1, parts)), total]


def _near(cut: int, shapes: Sequence[Sequence[int]], ends: Sequence[int], slack: int) -> int:
    """The best place to cut at most ``slack`` elements from ``cut``."""
    index = bisect_right(ends, cut) - 1  # the tensor that it cuts; its neighbours' far ends are no nearer than its own
    if index == len(shapes):
        return cut
    start, stop = ends[index], ends[index + 1]
    row = math.prod(shapes[index][1:])
    above = start + (cut - start) // row * row
    for borders, limit in (((start, stop), min(slack, row)), ((above, above + row), slack)):
        nearest = min(borders, key=lambda place: abs(place - cut))
        if abs(nearest - cut) <= limit:
            return nearest
    return cut
