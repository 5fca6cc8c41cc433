"""Parameters that lie whole on every rank: no wrapper, or DistributedDataParallel."""

from __future__ import annotations

from torch import Tensor

from sm3_dist.box import Box
from sm3_dist.shard import LocalShard


def describe(param: Tensor, label: str) -> tuple[LocalShard, ...]:
    """One box, shared with nobody: replicas compute the same thing."""
    if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter":
        raise ValueError(
            f"{label} was flattened by FullyShardedDataParallel, so its original shape is not known here. "
            "Pass the wrapped root module: SM3(model.parameters(), model=model)."
        )
    shape = tuple(param.shape) or (1,)
    return (LocalShard(shape, (Box.whole(shape),)),)
