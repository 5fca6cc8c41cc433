"""What the ranks of one process group tell one another: maxima, and sums of squares. One all-reduce each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.compat import all_gather_single, reduce_scatter_single
from sm3_dist.layout.box import Box
from sm3_dist.maths.rms import Averages, SquareSum
from sm3_dist.ranks.fingerprint import FIELDS, Seal
from sm3_dist.ranks.threaded_wait import ThreadedWait
from sm3_dist.ranks.watch import RankWatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MAXIMA, _SUMS = "the all-reduce of new maxima", "the all-reduce of sums of squares"
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The integer type as wide as a floating one."""


@dataclass(frozen=True)
class Slot:
    """The entries of one accumulator that a bucket carries.

    Attributes:
        accumulator: this rank's part, of shape ``stored.shape``.
        stored: the rectangle of the accumulator's grid that this rank stores.
        regions: the shared rectangles, the same on every rank of the group.
        contributes: whether this rank holds elements of the tensor; if not it sends 0, the identity of MAX.
    """

    accumulator: Tensor
    stored: Box
    regions: tuple[Box, ...]
    contributes: bool

    @property
    def bits(self) -> Tensor:
        """The accumulator as integers. Those of non-negative floats are ordered as the floats are, with NaN on top.

        So a maximum of integers is exact, the same in any order, and carries a NaN to every rank; the maximum of floats
        of a communication library may drop it.
        """
        return self.accumulator.view(BITS[self.accumulator.dtype])


class MaxBucket:
    """One all-reduce MAX per process group and step, under way from the end of a step until the next one.

    Args:
        group: the process group.
        slots: what it carries, the same on every rank but for what the rank stores.
        device: where the buffer lies.
        shard_covers: keep every entry on one rank alone between steps. ``start`` is then a reduce-scatter that frees
            the accumulators, and ``finish`` an all-gather that brings them back.
        watch: this rank's view of the others.
        seal: the fingerprint that it carries; ``None`` where another bucket of the group does.
    """

    def __init__(
        self,
        group: ProcessGroup,
        slots: Sequence[Slot],
        device: torch.device,
        shard_covers: bool,
        watch: RankWatch,
        seal: Seal | None = None,
    ) -> None:
        self.group = group
        self.slots = slots
        self._watch = watch
        self._seal = seal
        self._ranks, self._on_host = dist.get_process_group_ranks(group), device.type == "cpu"
        self._empty = False
        self.device = device
        self.shard_covers = shard_covers
        wide = any(slot.accumulator.dtype == torch.float64 for slot in slots)
        self.dtype = torch.int64 if wide else torch.int32
        self._first = FIELDS if seal is not None else 0
        self.numel = self._first + sum(region.numel for slot in slots for region in slot.regions)
        self._pieces = list(self._cut())
        # Accumulators of which every entry is shared need no storage of their own while the owners hold the entries.
        self._releasable = [
            slot.accumulator
            for slot in slots
            if shard_covers and any((region & slot.stored) == slot.stored for region in slot.regions)
        ]
        self._buffer: Tensor | None = None
        self._owned: Tensor | None = None
        self._work: dist.Work | None = None

    @property
    def pending(self) -> bool:
        """Whether the accumulators are still those of before the reduction."""
        return self._work is not None or self._owned is not None

    def start(self, event: str = "", words: str = "", empty: bool = False) -> None:
        """Send this rank's maxima. The accumulators must not be read before ``finish``.

        Args:
            event: what else this is than the end of a step, see :class:`~sm3_dist.ranks.fingerprint.Seal`.
            words: more about it.
            empty: send the fingerprint alone; the accumulators then stay as they are.
        """
        self._empty = empty
        world = dist.get_world_size(self.group)
        padding = -self.numel % world if self.shard_covers else 0
        if self._buffer is None:
            self._buffer = torch.empty(self.numel + padding, dtype=self.dtype, device=self.device)
        self._buffer.zero_()
        for slot, region, part in self._parts():
            if slot.contributes and not empty:
                part.copy_(slot.bits[region.within(slot.stored)])
        # Clear the sign: a maximum of squares has none, but the NaN that x86 makes does.
        self._buffer.bitwise_and_(torch.iinfo(self.dtype).max)
        if self._seal is not None:
            self._seal.write(self._buffer[:FIELDS], event, words)
        with self._watch.explained(_MAXIMA, self._ranks):
            if not self.shard_covers:
                self._work = dist.all_reduce(self._buffer, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
                return
            owned = self._buffer.new_empty(self._buffer.numel() // world)
            scatter = reduce_scatter_single(owned, self._buffer, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
            waiting = ThreadedWait(scatter) if self._on_host else scatter
            self._watch.wait([waiting], _MAXIMA, self._ranks, self._on_host)
        self._owned, self._buffer = owned, None
        for accumulator in () if empty else self._releasable:
            accumulator.untyped_storage().resize_(0)

    def finish(self) -> None:
        """Overwrite the shared accumulator entries with the maxima over all ranks."""
        if self._work is not None:
            self._watch.wait([self._work], _MAXIMA, self._ranks, self._on_host)
            self._work = None
        elif self._owned is not None:
            self._buffer = self._owned.new_empty(self._owned.numel() * dist.get_world_size(self.group))
            with self._watch.explained(_MAXIMA, self._ranks):
                gather = all_gather_single(self._buffer, self._owned, group=self.group, async_op=True)
            self._watch.wait([gather], _MAXIMA, self._ranks, self._on_host)
            self._owned = None
            for accumulator in self._releasable:
                accumulator.untyped_storage().resize_(accumulator.numel() * accumulator.element_size())
        else:
            return
        assert self._buffer is not None
        if self._seal is not None:
            self._seal.read(self._buffer[:FIELDS], dist.get_world_size(self.group))
        for slot, region, part in () if self._empty else self._parts():
            slot.bits[region.within(slot.stored)] = part.to(BITS[slot.accumulator.dtype])
        if self.shard_covers:
            self._buffer = None

    def _cut(self) -> Iterator[tuple[Slot, Box, Box, int]]:
        """For each shared rectangle that this rank stores some of: that part, the rectangle, where it is sent."""
        offset = self._first
        for slot in self.slots:
            for region in slot.regions:
                held = region & slot.stored
                if held.numel:
                    yield slot, held, region, offset
                offset += region.numel

    def _parts(self) -> Iterator[tuple[Slot, Box, Tensor]]:
        """For each shared rectangle what this rank stores of it, and the view of the buffer where that is sent."""
        assert self._buffer is not None
        for slot, held, region, offset in self._pieces:
            whole = self._buffer.narrow(0, offset, region.numel).view(region.shape)
            yield slot, held, whole[held.within(region)]


class SumBucket:
    """One all-reduce SUM of integers per process group and step; under way like the maxima.

    It carries the sums of squares of ``update_rms``, and which tensors took a step: a tensor counts a step where any of
    its ranks takes one, for one count is saved, and bias correction and random numbers go by it.

    Args:
        group: the process group; ``None`` for tensors that lie whole on this rank.
        sums: the sums of squares, the same on every rank. Their ``partial`` become views of the buffer.
        averages: their moving averages.
        steps: step counters of tensors that several ranks hold parts of, the same on every rank.
        device: where the buffer lies.
        watch: this rank's view of the others.
        seal: the fingerprint that it carries; ``None`` where another bucket of the group does.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        sums: Sequence[SquareSum],
        averages: Averages,
        steps: Sequence[Tensor],
        device: torch.device,
        watch: RankWatch,
        seal: Seal | None = None,
    ) -> None:
        self.group = group
        self._averages = averages
        self.steps = list(steps) if group is not None else []
        self._watch = watch
        self._seal = seal
        self._ranks = [] if group is None else dist.get_process_group_ranks(group)
        parts = [len(sums), len(self.steps), FIELDS if seal is not None else 0]
        self._buffer = torch.zeros(sum(parts), dtype=torch.int64, device=device)
        self._sums, self._stepped, _ = self._buffer.split(parts)
        for each, view in zip(sums, self._sums.unbind(), strict=True):
            view.copy_(each.partial)
            each.partial.set_(view)
        self._work: dist.Work | None = None
        self._sent: Tensor | None = None
        self._empty = False
        self.recount()

    def recount(self) -> None:
        """Take the steps counted so far for those of all ranks."""
        self.counted = torch.stack(self.steps) if self.steps else None

    def carry_over(self, older: SumBucket) -> None:
        """Take over what an older bucket had counted when it last sent, for steps taken before this one sends."""
        if self.counted is None or older.counted is None:
            return
        before = {id(step): count for step, count in zip(older.steps, older.counted.unbind(), strict=True)}
        self.counted = torch.stack(
            [before.get(id(step), count) for step, count in zip(self.steps, self.counted.unbind(), strict=True)]
        )

    def start(self, event: str = "", words: str = "", empty: bool = False) -> None:
        """Send what this rank has added up; see :meth:`MaxBucket.start`."""
        self._empty = empty
        self._sent = torch.zeros_like(self._buffer) if empty else self._buffer
        if self.counted is not None and not empty:
            self._taken = torch.stack(self.steps) != self.counted
            self._stepped.copy_(self._taken)
        if self.group is None:  # at once, so that a step is whole, in a CUDA graph too
            self.finish()
            return
        if self._seal is not None:
            self._seal.write(self._sent[-FIELDS:], event, words)
        with self._watch.explained(_SUMS, self._ranks):
            self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.SUM, group=self.group, async_op=True)

    def finish(self) -> None:
        """Bring the moving averages up to date, and the step counters."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        if self._work is not None:
            self._watch.wait([self._work], _SUMS, self._ranks, sent.device.type == "cpu")
            self._work = None
            if self._seal is not None:
                self._seal.read(sent[-FIELDS:], len(self._ranks))
        if self._empty:
            return
        self._averages.take(self._sums)
        if self.counted is not None:
            missed = (self._stepped > 0).to(self._taken.device) & ~self._taken
            if missed.device.type != "cpu" or missed.any():  # a GPU is not asked
                torch._foreach_add_(self.steps, list(missed.to(self.counted.dtype).unbind()))
            self.recount()
        self._buffer.zero_()
