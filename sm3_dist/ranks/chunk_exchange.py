"""Accumulator entries that lie in the state of one rank, while others work on them.

Where edges of shards cut blocks, PyTorch's chunking gives some ranks entries that none of their elements needs (with 5
blocks of 64 rows on 4 ranks, the fifth lies on the third rank, but its rows on the fourth). They travel alone, from
those who work on them to the one whose state holds them, at the end of each step; after a load, the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sm3_dist.layout.box import Box
from sm3_dist.layout.shard import Elsewhere
from sm3_dist.ranks.bucket import BITS
from sm3_dist.ranks.watch import RankWatch


@dataclass(frozen=True)
class Lending:
    """One accumulator of which some entries lie elsewhere.

    Attributes:
        working: what this rank works on, of shape ``stored.shape``.
        stored: that rectangle of the accumulator's grid.
        visible: what this rank's state holds, of shape ``chunk.shape``.
        chunk: that rectangle.
        elsewhere: who lends what to whom.
        edited: whether somebody wrote into what the state holds.
    """

    working: Tensor
    stored: Box
    visible: Tensor
    chunk: Box
    elsewhere: Elsewhere
    edited: Callable[[], bool]


class ChunkExchange:
    """One all-to-all per process group and step, under way from the end of a step as the maxima are.

    Args:
        group: the process group.
        lendings: what it carries, the same on every rank but for the boxes; all of one type, on one device.
        watch: this rank's view of the others.
    """

    def __init__(self, group: ProcessGroup, lendings: Sequence[Lending], watch: RankWatch) -> None:
        self.group = group
        self._watch = watch
        self.lendings = lendings
        places = {rank: place for place, rank in enumerate(lendings[0].elsewhere.peers.ranks)}
        self._order = [places[rank] for rank in dist.get_process_group_ranks(group)]
        lent = [self._numel(each.elsewhere.lent[place] for each in lendings) for place in self._order]
        borrowed = [self._numel(each.elsewhere.borrowed[place] for each in lendings) for place in self._order]
        self._sizes = lent, borrowed
        bits = lendings[0].working.view(BITS[lendings[0].working.dtype])
        self._lent, self._borrowed = bits.new_empty(sum(lent)), bits.new_empty(sum(borrowed))
        self._work: dist.Work | None = None
        self._returning = False
        self._fresh = False  # whether what is borrowed has come since it was last written into the state

    def start(self) -> None:
        """Send entries to the ranks whose states hold them."""
        for part, view in self._parts(self._lent, lent=True):
            view.copy_(part)
        self._lent.bitwise_and_(torch.iinfo(self._lent.dtype).max)  # no sign, which a NaN may have
        sent, received = self._sizes
        self._work = dist.all_to_all_single(self._borrowed, self._lent, received, sent, group=self.group, async_op=True)
        self._fresh = True

    def start_return(self) -> None:
        """Send entries from the states that hold them to the ranks that work on them."""
        for part, view in self._parts(self._borrowed, lent=False):
            view.copy_(part)
        received, sent = self._sizes
        self._work = dist.all_to_all_single(self._lent, self._borrowed, received, sent, group=self.group, async_op=True)
        self._returning, self._fresh = True, False

    def finish(self) -> None:
        """Wait for what is on its way. What comes from the states is then in the working copies."""
        if self._work is not None:
            ranks, on_host = dist.get_process_group_ranks(self.group), self._lent.device.type == "cpu"
            self._watch.wait([self._work], "the exchange of accumulator entries", ranks, on_host)
            self._work = None
        if self._returning:
            self._returning = False
            for part, view in self._parts(self._lent, lent=True):
                part.copy_(view)

    def publish(self) -> None:
        """Write into the state what was borrowed: of what came from several ranks the maximum. Not if it was edited."""
        if not self._fresh:
            return
        self._fresh = False
        parts = [(part, view) for each, part, view in self._pieces(self._borrowed, lent=False) if not each.edited()]
        for part, _ in parts:
            part.zero_()
        for part, view in parts:
            torch.maximum(part, view, out=part)

    @staticmethod
    def _numel(boxes: Iterable[tuple[Box, ...]]) -> int:
        return sum(box.numel for these in boxes for box in these)

    def _parts(self, buffer: Tensor, lent: bool) -> Iterator[tuple[Tensor, Tensor]]:
        return ((part, view) for _, part, view in self._pieces(buffer, lent))

    def _pieces(self, buffer: Tensor, lent: bool) -> Iterator[tuple[Lending, Tensor, Tensor]]:
        """Each piece where it is held, and the view of the buffer where it is sent or received; as integers."""
        offset = 0
        for place in self._order:
            for each in self.lendings:
                tensor, within = (each.working, each.stored) if lent else (each.visible, each.chunk)
                bits = tensor.view(BITS[tensor.dtype])
                for box in (each.elsewhere.lent if lent else each.elsewhere.borrowed)[place]:
                    yield each, bits[box.within(within)], buffer.narrow(0, offset, box.numel).view(box.shape)
                    offset += box.numel
