"""Parameters that lie whole on every rank: no wrapper, or DistributedDataParallel."""

from __future__ import annotations

from torch import Tensor

from sm3_dist.layout.box import Box
from sm3_dist.layout.shard import LocalShard


def describe(param: Tensor, cover_block: int | None) -> tuple[LocalShard, ...]:
    """One box, shared with nobody: replicas compute the same thing."""
    shape = tuple(param.shape) or (1,)
    return (LocalShard(shape, (Box.whole(shape),), cover_block=cover_block),)
