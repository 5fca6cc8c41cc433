"""Weight gathering: the weights that each rank updated reach every rank, in buckets of bounded size.

A bucket carries an equal share of each rank's range, so it is what one all-gather moves. It leaves as soon as this rank
has updated its part, and travels while the next part is being updated.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.compat import all_gather_single
from sm3_dist.layout.box import Box, flat_boxes
from sm3_dist.layout.zero import Partition
from sm3_dist.ranks.watch import RankWatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES = 25_000_000
"""Size of a bucket: the parts of all ranks together."""
IN_FLIGHT = 2
"""Buckets under way at a time. So many of them are the memory that gathering weights takes, for the time of a step."""
_WHAT = "the exchange of new weights"
IN_PLACE_BYTES = 1 << 16
"""Contiguous elements of at least this size are broadcast from and into the parameter, smaller ones in one message."""


@dataclass(frozen=True)
class Segment:
    """Elements ``[start, stop)`` of a flattened parameter, all of them one rank's."""

    param: Tensor
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def in_place(self) -> bool:
        """Whether it can be sent from where it lies, and is worth a message of its own."""
        return self.param.is_contiguous() and self.numel * self.param.element_size() >= IN_PLACE_BYTES

    def flat(self) -> Tensor:
        """The elements as a view of the parameter, which is contiguous."""
        return self.param.detach().view(-1)[self.start : self.stop]

    def views(self) -> list[Tensor]:
        """The elements as views of the parameter, whatever its strides: the boxes that they consist of."""
        whole = Box.whole(self.param.shape)
        boxes = flat_boxes(self.param.shape, self.start, self.stop)
        return [self.param.detach()[box.within(whole)] for box in boxes]


class Message:
    """Segments side by side in a flat buffer.

    Args:
        segments: parameters of one type on one device.
        buffer: at least as long; made here where it is not given.
    """

    def __init__(self, segments: Sequence[Segment], buffer: Tensor | None = None) -> None:
        if buffer is None:
            buffer = segments[0].param.new_empty(sum(segment.numel for segment in segments), requires_grad=False)
        self.buffer = buffer
        self._views = [view for segment in segments for view in segment.views()]
        self._slots, start = [], 0
        for view in self._views:
            self._slots.append(buffer.narrow(0, start, view.numel()).view(view.shape))
            start += view.numel()

    def pack(self) -> None:
        """Copy the parameters into the buffer."""
        if self._views:
            torch._foreach_copy_(self._slots, self._views)

    def unpack(self) -> None:
        """Copy the buffer into the parameters."""
        if self._views:
            torch._foreach_copy_(self._views, self._slots)


class Gather:
    """A bucket on its way as one all-gather of equal parts, those of smaller ranges padded.

    Args:
        group: the ranks.
        parts: for each of them the segments that it sends.
    """

    def __init__(self, group: ProcessGroup, parts: Sequence[Sequence[Segment]]) -> None:
        rank = dist.get_rank(group)
        numel = max(sum(segment.numel for segment in part) for part in parts)
        first = next(segment.param for part in parts for segment in part)
        received = first.new_empty(len(parts) * numel, requires_grad=False)
        self._others = [Message(part, received[r * numel :]) for r, part in enumerate(parts) if r != rank]
        own = Message(parts[rank], first.new_empty(numel, requires_grad=False))
        own.pack()
        self._own = own  # alive until it has been sent
        self.works = [all_gather_single(received, own.buffer, group=group, async_op=True)]

    def unpack(self) -> None:
        """Overwrite the weights of the other ranks' ranges."""
        for message in self._others:
            message.unpack()


class Broadcasts:
    """A bucket on its way as broadcasts, large segments from and into the parameters themselves.

    They send as many bytes as the all-gather. Gloo's all-gather goes through buffers of its own, which
    takes several times as long.

    Args:
        group: the ranks.
        parts: for each of them the segments that it sends.
    """

    def __init__(self, group: ProcessGroup, parts: Sequence[Sequence[Segment]]) -> None:
        rank = dist.get_rank(group)
        self._received: list[Message] = []
        self.works = []
        for source, part in enumerate(parts):
            tensors = [segment.flat() for segment in part if segment.in_place]
            small = [segment for segment in part if not segment.in_place]
            if small:
                message = Message(small)
                if source == rank:
                    message.pack()
                else:
                    self._received.append(message)
                tensors.append(message.buffer)
            self.works += [dist.broadcast(t, group=group, group_src=source, async_op=True) for t in tensors]

    def unpack(self) -> None:
        """Overwrite the weights that came in buffers."""
        for message in self._received:
            message.unpack()


Parts = list[list[Segment]]


class WeightGatherer:
    """Sends every rank's new weights to all ranks, bucket by bucket, in the same order on every rank.

    Args:
        group: the ranks over which the parameters are replicated.
        partitions: which range of which parameters each of them updates.
        moving: the parameters whose weights can change in this plan.
        watch: this rank's view of the others.
    """

    def __init__(
        self,
        group: ProcessGroup,
        partitions: Sequence[Partition],
        moving: Collection[Tensor],
        watch: RankWatch,
    ) -> None:
        self.group = group
        self._watch = watch
        self.buckets = [b for partition in partitions for parts in _alike(partition, moving) for b in _buckets(parts)]
        self._in_flight: deque[Gather | Broadcasts] = deque()

    def waits_for(self, bucket: Parts) -> set[Tensor]:
        """The parameters that this rank must have updated before a bucket can leave."""
        return {segment.param for segment in bucket[dist.get_rank(self.group)]}

    def start(self, bucket: Parts) -> None:
        """Send a bucket. Every weight of this rank in it has been updated."""
        while len(self._in_flight) >= IN_FLIGHT:
            self._finish_first()
        device = next(segment.param.device for part in bucket for segment in part)
        transport = Broadcasts if device.type == "cpu" else Gather
        with self._watch.explained(_WHAT, dist.get_process_group_ranks(self.group)):
            self._in_flight.append(transport(self.group, bucket))

    def finish(self) -> None:
        """Wait until every weight has arrived."""
        while self._in_flight:
            self._finish_first()

    def _finish_first(self) -> None:
        first = self._in_flight.popleft()
        on_host = isinstance(first, Broadcasts)
        self._watch.wait(first.works, _WHAT, dist.get_process_group_ranks(self.group), on_host)
        first.unpack()


def _alike(partition: Partition, moving: Collection[Tensor]) -> Iterable[Parts]:
    """What each rank sends, of one type and device at a time: they may be others than when the partition was cut."""
    found: dict[tuple[torch.dtype, torch.device], Parts] = {}
    for index, param in enumerate(partition.params):
        if param in moving:
            parts = found.setdefault((param.dtype, param.device), [[] for _ in partition.cuts[1:]])
            for part, (start, stop) in zip(parts, partition.ranges(index), strict=True):
                if start < stop:
                    part.append(Segment(param, start, stop))
    return found.values()


def _buckets(parts: Parts) -> list[Parts]:
    """Cut what each rank sends into the same number of parts; those that need the least updating come first."""
    largest = max(sum(segment.numel for segment in part) for part in parts)
    if largest == 0 or len(parts) == 1:
        return []
    itemsize = next(segment.param.element_size() for part in parts for segment in part)
    limit = max(1, BUCKET_BYTES // (len(parts) * itemsize))
    size = math.ceil(largest / math.ceil(largest / limit))  # no more buckets than with the limit, but all alike
    pieces = [_pieces(part, math.ceil(largest / size), size) for part in parts]
    owned = [{segment.param: segment.numel for segment in part} for part in parts]

    def wait(bucket: Sequence[Sequence[Segment]]) -> int:
        """Elements to update before it can leave, on the rank where they are most: a tensor is updated as a whole."""
        return max(sum(o[segment.param] for segment in part) for o, part in zip(owned, bucket, strict=True))

    return sorted((list(bucket) for bucket in zip(*pieces, strict=True)), key=wait)


def _pieces(segments: Sequence[Segment], count: int, size: int) -> list[list[Segment]]:
    """``count`` lists of segments, each of ``size`` elements but for the last ones."""
    pieces: Parts = [[] for _ in range(count)]
    position = 0
    for segment in segments:
        start = segment.start
        while start < segment.stop:
            index = position // size
            stop = min(segment.stop, start + (index + 1) * size - position)
            pieces[index].append(Segment(segment.param, start, stop))
            position, start = position + stop - start, stop
    return pieces
