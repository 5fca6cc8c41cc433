"""LocalShard: which part of a tensor a rank holds, and which accumulator entries it shares with whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sm3_dist.layout.box import Box, bounding
from sm3_dist.layout.cover import Cell, accumulator_count, cell, touched

if TYPE_CHECKING:  # the maths does without torch.distributed
    from torch.distributed import ProcessGroup

_UNSET = Box((), ())
WHOLE = "whole"
"""Layout of a tensor that lies whole on every rank."""


@dataclass(frozen=True)
class Peers:
    """Ranks that take the maximum of shared accumulator entries together.

    Attributes:
        ranks: global ranks, in the order of the group.
        group: makes or looks up the ``torch.distributed.ProcessGroup`` of these ranks. Every peer calls it, once, in
            the same order, after the plans have been found equal.
    """

    ranks: tuple[int, ...]
    group: Callable[[], ProcessGroup] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Holdings:
    """Who holds what of a tensor that several ranks hold together, each element once.

    Attributes:
        peers: the ranks, of which some may hold nothing.
        boxes: the boxes of each rank, by its global number and in its memory order; empty for nothing.
    """

    peers: Peers
    boxes: Callable[[], dict[int, tuple[Box, ...]]] = field(compare=False, repr=False)


def in_words(ranks: Sequence[int]) -> str:
    """Ranks as messages and plans name them: all, unless there are so many that runs are easier to read.

    Example:
        >>> in_words([0, 1, 3]), in_words(range(4096))
        ('[0, 1, 3]', '[0 to 4095]')
    """
    if len(ranks) <= 16:
        return str(list(ranks))
    starts = [i for i in range(len(ranks)) if i == 0 or ranks[i] != ranks[i - 1] + 1]
    runs = [(ranks[a], ranks[b - 1]) for a, b in zip(starts, [*starts[1:], len(ranks)], strict=True)]
    return f"[{', '.join(str(a) if a == b else f'{a} to {b}' for a, b in runs)}]"


@dataclass(frozen=True)
class Shared:
    """Entries of one accumulator that several ranks touch.

    Attributes:
        peers: the ranks. Each describes the same regions in the same order.
        regions: rectangles of the accumulator's grid (global coordinates). Every peer sends the entries that it has and
            0, the identity of MAX, for the others.
    """

    peers: Peers
    regions: tuple[Box, ...]


@dataclass(frozen=True)
class Elsewhere:
    """Accumulator entries that one rank's state holds, but none of its elements needs: others work on them.

    Attributes:
        peers: the ranks among which this happens.
        lent: for each of ``peers.ranks`` the rectangles of its chunk that this rank works on, and it does not.
        borrowed: for each of them the rectangles of this rank's chunk that it works on, and this rank does not.
    """

    peers: Peers
    lent: tuple[tuple[Box, ...], ...]
    borrowed: tuple[tuple[Box, ...], ...]


@dataclass(frozen=True)
class Chunk:
    """What the state holds of an accumulator here, where that is not what the elements of this rank need.

    Blocks that an edge cuts are needed on both sides of it. PyTorch's state dicts know no such thing, so the state
    holds a DTensor of the grid, cut as PyTorch cuts it, and the rank works on a copy of its rectangle beside it.

    Attributes:
        box: the rectangle of the grid.
        elsewhere: the entries that do not lie on the rank that needs them; ``None`` where there are none on any rank.
    """

    box: Box
    elsewhere: Elsewhere | None = None


@dataclass(frozen=True)
class LocalShard:
    """The boxes of one original tensor that this rank holds.

    Attributes:
        shape: shape of the original tensor, at least one-dimensional (a scalar counts as shape ``(1,)``).
        boxes: what this rank holds, in the coordinates of the original tensor and in local memory order.
        flat_start: where the elements begin in a flat local tensor, one box after another; ``None`` where the local
            tensor has the shape of its only box.
        replicated: whether the local tensor is the whole original one, of which this rank updates the boxes alone. Its
            state is then flat, one box after another from 0.
        flat_numel: number of elements of a flat local tensor, with padding and with other tensors that lie in it.
        order: the dimensions in the order in which they lie in a flat local tensor; ``None`` for ``0, 1, …``.
        extent: smallest box that contains the boxes. Given explicitly where an empty shard still has rows or columns
            (a ``(3, 5)`` tensor over 4 ranks: the last holds 0 rows of 5 columns).
        shared: for each accumulator the entries that other ranks touch too; ``None`` where there are none.
        chunks: for each accumulator what the state holds of it; ``None`` where that is what this rank works on.
        ranks: every global rank that holds part of the tensor or a replica of it, where they plan together.
        layout: how the tensor is cut, in words that are the same on each of these ranks.
        name: distinguishes the original tensors within one flattened parameter; empty where there is just one.
        cover_block: indices per block of the covers, see :mod:`~sm3_dist.layout.cover`; ``None``: whole slices.
        replicas: the ranks that hold just the same of it, this one among them, where others do.
        holders: the ranks that hold the tensor together, each element once (no replicas); ``None`` where this rank
            holds all or nothing of it.
        listeners: the ranks that are told the sum of squares of its updates, where those are more than the holders.
        holdings: what each of these ranks holds; also where one of them holds all of it. ``None``: every rank does.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    flat_start: int | None = None
    extent: Box = field(default_factory=lambda: _UNSET)
    shared: tuple[Shared | None, ...] = ()
    chunks: tuple[Chunk | None, ...] = ()
    ranks: tuple[int, ...] = ()
    layout: str = WHOLE
    name: str = ""
    replicated: bool = False
    flat_numel: int | None = None
    order: tuple[int, ...] | None = None
    cover_block: int | None = None
    holders: Peers | None = None
    listeners: Peers | None = None
    holdings: Holdings | None = field(default=None, compare=False)
    replicas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.extent is _UNSET:
            object.__setattr__(self, "extent", bounding(self.boxes, len(self.shape)))
        if not self.shared:
            object.__setattr__(self, "shared", (None,) * self.accumulator_count)
        if not self.chunks:
            object.__setattr__(self, "chunks", (None,) * self.accumulator_count)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What state is made for: the same on every rank, and for as long as the layout stays."""
        return (self.shape, self.layout, self.cover_block)

    @property
    def numel(self) -> int:
        """Number of elements that this rank holds."""
        return sum(box.numel for box in self.boxes)

    @property
    def accumulator_count(self) -> int:
        """Number of accumulators."""
        return accumulator_count(self.shape, self.cover_block)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of each accumulator, see :func:`~sm3_dist.layout.cover.cell`."""
        return tuple(cell(self.shape, i, self.cover_block) for i in range(self.accumulator_count))

    @cached_property
    def stored(self) -> tuple[Box, ...]:
        """For each accumulator the rectangle of its grid that this rank works on."""
        return tuple(self.touched(self.extent, i) for i in range(self.accumulator_count))

    @cached_property
    def held(self) -> tuple[Box, ...]:
        """For each accumulator the rectangle of its grid that this rank's state holds."""
        return tuple(
            stored if chunk is None else chunk.box for stored, chunk in zip(self.stored, self.chunks, strict=True)
        )

    def touched(self, box: Box, i: int) -> Box:
        """The rectangle of the grid of accumulator ``i`` that ``box`` touches."""
        return touched(box, self.cells[i])

    def views(self, local: Tensor) -> list[Tensor]:
        """The boxes as views of the local parameter or gradient, each of its box's shape."""
        if not self.boxes:
            return []
        if local.dim() == 0:
            return [local.view(self.boxes[0].shape)]
        if self.replicated:
            return [local[box.within(Box.whole(self.shape))] for box in self.boxes]
        return [local] if self.flat_start is None else self._in_turn(local, self.flat_start)

    def state_views(self, local: Tensor) -> list[Tensor]:
        """The boxes as views of a state tensor with one value for each element that this rank holds (momentum)."""
        return self._in_turn(local, 0) if self.replicated else self.views(local)

    def _in_turn(self, flat: Tensor, start: int) -> list[Tensor]:
        """One box after another in a flat tensor."""
        views = []
        for box in self.boxes:
            views.append(unflattened(flat.narrow(0, start, box.numel), box.shape, self.order))
            start += box.numel
        return views

    def accumulator_shape(self, i: int) -> tuple[int, ...]:
        """Shape in which this rank's state holds accumulator ``i``.

        A vector over the indices of dimension ``i``; with block covers the rectangle of the grid.
        """
        shape = self.held[i].shape
        return (math.prod(shape),) if self.cover_block is None else shape


def unflattened(flat: Tensor, shape: Sequence[int], order: Sequence[int] | None) -> Tensor:
    """A view of this shape of a flat tensor in which the dimensions lie in this order."""
    if order is None:
        return flat.view(shape)
    return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of accumulators, momentum and of the maths: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
