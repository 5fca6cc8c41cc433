"""Replicated parameters of which each rank updates a range (ZeRO-1): ``SM3(params, shard_over=group)``.

The parameters lie whole on every rank, as DistributedDataParallel leaves them. Their concatenation is cut into as many
equal ranges as there are ranks; nearly every tensor then has one owner, and those at the cuts have several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout import whole
from sm3_dist.layout.box import Box, flat_boxes
from sm3_dist.layout.ranges import Range, even_cuts, shared_entries
from sm3_dist.layout.shard import Holdings, LocalShard, Peers, in_words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Partition:
    """Parameters of one type on one device, and where their concatenation is cut.

    Attributes:
        params: the parameters, in the order in which they are concatenated.
        cuts: the ends of the ranks' ranges; rank ``r`` of the group has elements ``[cuts[r], cuts[r + 1])``.
    """

    def __init__(self, params: Sequence[Tensor], parts: int) -> None:
        self.params = list(params)
        self.cuts = even_cuts([param.shape for param in params], parts)

    @cached_property
    def starts(self) -> list[int]:
        """Where each parameter begins in the concatenation."""
        return list(accumulate((param.numel() for param in self.params), initial=0))[:-1]

    def ranges(self, index: int) -> list[Range]:
        """The elements of parameter ``index``, flattened, that each rank of the group owns."""
        start, numel = self.starts[index], self.params[index].numel()
        inner = [min(max(cut - start, 0), numel) for cut in self.cuts]
        return list(pairwise(inner))


class Replicas:
    """Who updates what of parameters that are replicated over a group.

    Ranges never move: parameters that come later (a new param group, a thawed layer) are cut on their own, so that the
    state of the others stays where it is.

    Args:
        shard_over: the process group, or a one-dimensional mesh.

    Raises:
        ValueError: if the mesh has more dimensions, or this rank is not in the group.
        TypeError: for anything else.
    """

    def __init__(self, shard_over: ProcessGroup | DeviceMesh) -> None:
        self.group = _process_group(shard_over)
        self.ranks = tuple(dist.get_process_group_ranks(self.group))
        self.partitions: list[Partition] = []
        self._where: dict[Tensor, tuple[Partition, int]] = {}

    @property
    def rank(self) -> int:
        """Number of this rank within the group."""
        return dist.get_rank(self.group)

    def include(self, params: Iterable[Tensor]) -> None:
        """Cut those of the parameters that have not been cut yet."""
        fresh: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for param in params:
            if param not in self._where:
                fresh.setdefault((param.dtype, param.device), []).append(param)
        for alike in fresh.values():
            partition = Partition(alike, len(self.ranks))
            self.partitions.append(partition)
            self._where.update((param, (partition, index)) for index, param in enumerate(alike))

    def exchange(self, old: Tensor, new: Tensor) -> None:
        """Put ``new``, of the same shape, in the place of ``old``."""
        partition, index = self._where[new] = self._where.pop(old)
        partition.params[index] = new

    def describe(self, param: Tensor, cover_block: int | None) -> tuple[LocalShard, ...]:
        """The boxes that this rank updates; a parameter that has not been cut counts as whole."""
        if param not in self._where:
            return whole.describe(param, cover_block)
        partition, index = self._where[param]
        ranges, shape = partition.ranges(index), tuple(param.shape) or (1,)
        peers = Peers(self.ranks, lambda: self.group)
        inside = [cut for _, cut in ranges[:-1] if 0 < cut < math.prod(shape)]
        return (
            LocalShard(
                shape,
                boxes=tuple(flat_boxes(shape, *ranges[self.rank])),
                replicated=True,
                shared=shared_entries(shape, ranges, peers, cover_block),
                ranks=self.ranks,
                layout=f"stride {param.stride()}, replicated over ranks {in_words(self.ranks)}, "
                f"cut at elements {inside} from partition {self.partitions.index(partition)}",
                cover_block=cover_block,
                holders=peers if inside else None,
                holdings=Holdings(peers, lambda: self._holdings(shape, ranges)),
                replicas=self.ranks,  # of the gradients, which every rank has whole
            ),
        )

    def _holdings(self, shape: tuple[int, ...], ranges: Sequence[Range]) -> dict[int, tuple[Box, ...]]:
        return {rank: tuple(flat_boxes(shape, *part)) for rank, part in zip(self.ranks, ranges, strict=True)}


def _process_group(shard_over: ProcessGroup | DeviceMesh | object) -> ProcessGroup:
    if isinstance(shard_over, dist.device_mesh.DeviceMesh):
        if shard_over.ndim != 1:
            raise ValueError(
                f"shard_over= takes a mesh of one dimension, but this one has shape {tuple(shard_over.mesh.shape)} "
                f"and dimensions {shard_over.mesh_dim_names}. Pass the one over which parameters are replicated."
            )
        if shard_over.get_coordinate() is None:
            raise ValueError(f"this rank is not part of the mesh {shard_over.mesh.tolist()} passed as shard_over=")
        return shard_over.get_group()
    if shard_over == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not part of the process group passed as shard_over=; pass the group it is in")
    if not isinstance(shard_over, dist.ProcessGroup):
        raise TypeError(
            f"shard_over= takes a ProcessGroup, such as torch.distributed.group.WORLD, or a one-dimensional "
            f"DeviceMesh, but got {type(shard_over).__name__}"
        )
    return shard_over
