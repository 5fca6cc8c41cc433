"""The exchange of matrices: their boxes travel to one owner each, and come back when it has worked on the whole.

Every rank knows from shapes alone who holds which boxes, who owns which matrix, and what travels in which bucket. A
bucket is two all-to-alls of flat buffers, there and back. A matrix that lies whole on one rank does not travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.box import Box
from sm3_dist.layout.shard import unflattened
from sm3_dist.ranks.findings import Findings
from sm3_dist.ranks.watch import RankWatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES = 25_000_000
"""Most bytes of a bucket that a rank sends or receives, unless a single matrix has more."""
HAS, LACKS, HOLDS_NOTHING = 1.0, 0.0, -1.0
"""What a rank says of a matrix: whether it has something to send for its part."""


@dataclass(frozen=True)
class Matrix:
    """A tensor that several ranks hold together.

    Attributes:
        shape: its shape.
        order: its dimensions in the order in which each box lies in memory; ``None`` for ``0, 1, …``.
        boxes: what each rank holds of it, by its global number.
        owner: the rank that works on the whole.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    boxes: Mapping[int, tuple[Box, ...]]
    owner: int

    def numel(self, rank: int) -> int:
        """Number of elements that a rank holds."""
        return sum(box.numel for box in self.boxes.get(rank, ()))

    def copy(self, rank: int, flat: Tensor, whole: Tensor, back: bool) -> None:
        """Copy the boxes of a rank, one after another in a flat tensor, to their places in the whole, or back."""
        start = 0
        for box in self.boxes.get(rank, ()):
            there = unflattened(flat.narrow(0, start, box.numel), box.shape, self.order)
            here = whole[box.within(Box.whole(self.shape))]
            (there if back else here).copy_(here if back else there)
            start += box.numel


def owners(
    work: Sequence[int], holders: Sequence[Mapping[int, int]], loads: Mapping[int, int] | None = None
) -> tuple[list[int], list[int]]:
    """An owner for each matrix among those who hold some of it, so that all have about as much to do.

    The largest first, each to the rank that has the least to do so far; of those to the one that holds most of it.

    Args:
        work: what there is to do for each matrix.
        holders: how many elements of it each rank holds.
        loads: what ranks have to do besides.

    Returns:
        The owners; and the order in which they were chosen, in which neighbours mostly have different ones.

    Example:
        >>> owners([8, 2, 8, 5], [{0: 4, 1: 4}] * 4)
        ([0, 1, 1, 0], [0, 2, 3, 1])
    """
    sums = dict(loads or {})
    chosen = [0] * len(work)
    order = sorted(range(len(work)), key=lambda k: -work[k])
    for k in order:
        candidates = [rank for rank, numel in holders[k].items() if numel]
        chosen[k] = min(candidates, key=lambda rank: (sums.get(rank, 0), -holders[k][rank], rank))
        sums[chosen[k]] = sums.get(chosen[k], 0) + work[k]
    return chosen, order


def bucketed(matrices: Sequence[Matrix], itemsize: int) -> list[list[int]]:
    """Cut a sequence of matrices into buckets of bounded size: which go into each."""
    limit = max([BUCKET_BYTES // itemsize, *(sum(map(m.numel, m.boxes)) for m in matrices)])
    buckets: list[list[int]] = []
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for k, matrix in enumerate(matrices):
        parts = {rank: matrix.numel(rank) for rank in matrix.boxes}
        whole = sum(parts.values())
        full = received.get(matrix.owner, 0) + whole > limit
        if not buckets or full or any(sent.get(rank, 0) + part > limit for rank, part in parts.items()):
            buckets.append([])
            sent, received = {}, {}
        buckets[-1].append(k)
        received[matrix.owner] = received.get(matrix.owner, 0) + whole
        for rank, part in parts.items():
            sent[rank] = sent.get(rank, 0) + part
    return buckets


class MatrixExchange:
    """A bucket of matrices on their way to their owners and back.

    What a rank sends to an owner are its boxes of each of the owner's matrices, and a word on each of them.

    Args:
        matrices: the same on every rank of the group.
        group: the ranks that hold them together; ``None`` for matrices that lie whole on this rank.
        rank: the global number of this rank.
        dtype: type of the elements.
        device: where they lie.
        watch: this rank's view of the others.

    Attributes:
        parts: for each matrix what this rank holds of it, flat: a view of a buffer that has no memory after
            :meth:`close` until it is opened again.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        group: ProcessGroup | None,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        watch: RankWatch,
    ) -> None:
        self.matrices, self.group, self.rank = matrices, group, rank
        self._watch = watch
        self._ranks = [rank] if group is None else dist.get_process_group_ranks(group)
        owned = [[m for m, matrix in enumerate(matrices) if matrix.owner == owner] for owner in self._ranks]
        self._mine = owned[self._ranks.index(rank)]
        self._sent = [sum(matrices[m].numel(rank) + 1 for m in these) for these in owned]
        self._received = [sum(matrices[m].numel(source) + 1 for m in self._mine) for source in self._ranks]
        self._buffer = torch.empty(sum(self._sent), dtype=dtype, device=device)
        self._words: list[Tensor] = [self._buffer] * len(matrices)
        self.parts: list[Tensor] = [self._buffer] * len(matrices)
        start = 0
        for m in (m for these in owned for m in these):
            numel = matrices[m].numel(rank)
            self.parts[m], self._words[m] = self._buffer.narrow(0, start, numel + 1).split([numel, 1])
            start += numel + 1
        self._whole = self._buffer
        self._work: dist.Work | None = None
        self._mixed = Findings[None](device)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes that this rank sends to others, there and back."""
        me, size = self._ranks.index(self.rank), self._buffer.element_size()
        return size * (sum(self._sent) - self._sent[me]), size * (sum(self._received) - self._received[me])

    def open(self) -> None:
        """Give the parts memory, and set them to 0."""
        self._arrive()  # what a step that ended with an error left on its way
        self._buffer.untyped_storage().resize_(self._buffer.numel() * self._buffer.element_size())
        self._buffer.zero_()

    def close(self) -> None:
        """Free the memory, unless something is on its way: after an error, and then a library writes into it yet."""
        if self._work is None:
            self._whole = self._buffer
            self._buffer.untyped_storage().resize_(0)

    def send(self, present: Sequence[bool]) -> None:
        """Send the parts to the owners.

        Args:
            present: for each matrix whether there is something to send, if this rank holds some of it.
        """
        if self.group is None:
            return
        for matrix, word, has in zip(self.matrices, self._words, present, strict=True):
            word.fill_((HAS if has else LACKS) if matrix.numel(self.rank) else HOLDS_NOTHING)
        self._whole = self._buffer.new_empty(sum(self._received))
        self._work = self._all_to_all(self._whole, self._buffer, self._received, self._sent)

    def transform(self, function: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        """Have this rank's matrices, when all of their parts are there, replaced by a function of them; send them back.

        Args:
            function: of tensors, returns one of the same shape and type for each.
        """
        if self.group is None:
            self._transform_parts(function)
            return
        self._arrive()
        ends = list(accumulate((1 + self.matrices[m].numel(s) for s in self._ranks for m in self._mine), initial=0))
        pieces = [self._whole[a:b] for a, b in pairwise(ends)]
        parts = [pieces[k :: len(self._mine)] for k in range(len(self._mine))]
        wholes = [self._whole.new_empty(self.matrices[m].shape) for m in self._mine]
        for m, of_ranks, whole in zip(self._mine, parts, wholes, strict=True):
            for rank, part in zip(self._ranks, of_ranks, strict=True):
                self.matrices[m].copy(rank, part, whole, back=False)
        for m, of_ranks, result in zip(self._mine, parts, function(wholes), strict=True):
            words = torch.stack([part[-1] for part in of_ranks])
            mixed = (words == HAS).any() & (words == LACKS).any()
            for rank, part in zip(self._ranks, of_ranks, strict=True):
                self.matrices[m].copy(rank, part, result, back=True)
                part[-1] = mixed
        self._work = self._all_to_all(self._buffer, self._whole, self._sent, self._received)

    def _transform_parts(self, function: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        """The same where matrices lie whole on this rank: they are worked on where they are."""
        wholes = []
        for matrix, part in zip(self.matrices, self.parts, strict=True):
            (box,) = matrix.boxes[self.rank]
            wholes.append(unflattened(part, box.shape, matrix.order))
        for whole, result in zip(wholes, function(wholes), strict=True):
            whole.copy_(result)

    def finish(self) -> list[int]:
        """Wait for the results.

        Returns:
            The matrices of which some ranks have sent their parts and others had nothing to send. Every rank of the
            group knows of them; of what came back for them nothing may be used. On a GPU the host does not wait to know
            of them, and they are those of some steps before.
        """
        self._arrive()
        self._whole = self._buffer
        if self.group is None:
            return []
        self._mixed.add(torch.cat(self._words), None)
        return [m for words, _ in self._mixed.due() for m, mixed in enumerate(words.tolist()) if mixed]

    def _arrive(self) -> None:
        """Wait for what is on its way."""
        self._watch.wait([self._work], "the exchange of matrices", self._ranks, self._buffer.device.type == "cpu")
        self._work = None

    def _all_to_all(self, output: Tensor, given: Tensor, received: list[int], sent: list[int]) -> dist.Work | None:
        work: dist.Work | None = dist.all_to_all_single(output, given, received, sent, group=self.group, async_op=True)
        return work
