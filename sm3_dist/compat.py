"""What differs between the releases of PyTorch that are supported, 2.9 and up. No other file asks for the release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
"""The names in ``torch.distributed``: the first of each from 2.13 on, the second up to 2.12."""
GROUP_NAME: Callable[[str], Any] = getattr(getattr(dist, "distributed_c10d", None), "GroupName", str)
"""The type of the names of process groups: that of a string up to 2.9."""


def all_gather_single(output: Any, input: Any, **options: Any) -> Any:
    """What is ``torch.distributed.all_gather_single`` from 2.13 on."""
    return getattr(dist, ALL_GATHER)(output, input, **options)


def reduce_scatter_single(output: Any, input: Any, **options: Any) -> Any:
    """What is ``torch.distributed.reduce_scatter_single`` from 2.13 on."""
    return getattr(dist, REDUCE_SCATTER)(output, input, **options)


Step = TypeVar("Step", bound=Callable[..., Any])


def whole_step(step: Step) -> Step:
    """Let ``torch.compile`` call an optimizer's ``step()`` and not look into it, hooks and profiling included.

    A step is a few launches already, from addresses that a graph would not see change. (What is public of this,
    ``torch.compiler.disable``, imports the compiler when it decorates; this does so when it is called, as the methods
    of PyTorch's own optimizers do. ``hooked`` says that the hooks are in already.)
    """
    hooked: Any = _disable_dynamo(Optimizer.profile_hook_step(step))
    hooked.hooked = True
    return cast(Step, hooked)


# Strided shards: along one dimension tensor parallelism cuts first, and FSDP2 what that leaves.


def same_placements(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two DTensors on one mesh are cut alike: up to 2.9 a strided shard is equal to a plain one."""
    return a == b and [*map(type, a)] == [*map(type, b)]


def redistributes_to_strided_shards() -> bool:
    """Whether ``DTensor.redistribute`` cuts as FSDP2 does, which it does from 2.10 on."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    return bool(_StridedShard(0, split_factor=2) != Shard(0))


def guard_strided_shards() -> None:
    """Have PyTorch 2.9 know strided shards where later releases do, and raise where it would be wrong in silence.

    Parts of unequal length it puts together in another order, and cuts elsewhere, be they of weights or of state; and
    of a sum over ranks it gives each rank another's part. Up to 2.12 ``torch.load(weights_only=True)`` refuses the
    placement unless it is named.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    torch.serialization.add_safe_globals([_StridedShard])
    if redistributes_to_strided_shards():
        return
    strided: Any = _StridedShard
    gather, split = strided._to_replicate_tensor, strided._split_tensor

    def checked_gather(self: Any, local: Any, mesh: Any, mesh_dim: int, shape: Sequence[int]) -> Any:
        n, ranks = shape[self.dim], mesh.size(mesh_dim)
        if not _gathered_in_order(n, self.split_factor, ranks):
            raise _wrong("puts together", n, self.split_factor, ranks)
        return gather(self, local, mesh, mesh_dim, shape)

    def checked_split(self: Any, tensor: Any, ranks: int, **options: Any) -> Any:
        n = tensor.size(self.dim)
        if n % (ranks * self.split_factor):
            raise _wrong("cuts", n, self.split_factor, ranks)
        return split(self, tensor, ranks, **options)

    def refused_sum(self: Any, tensor: Any, mesh: Any, reduce_op: str, mesh_dim: int) -> Any:
        raise NotImplementedError(
            f"PyTorch {torch.__version__} gives ranks the wrong parts of a sum where tensor parallelism and FSDP2 cut "
            "along one dimension. Redistribute it to Replicate, or use PyTorch 2.10 or newer."
        )

    strided._to_replicate_tensor = checked_gather
    strided._split_tensor = checked_split
    strided._reduce_shard_tensor = refused_sum


def _gathered_in_order(n: int, first: int, then: int) -> bool:
    """Whether ``n`` entries, cut into ``first`` parts and each into ``then``, lie where 2.9 looks for them."""

    def lengths(n: int, parts: int) -> list[int]:
        most = -(-n // parts)
        return [max(0, min(most, n - k * most)) for k in range(parts)]

    by_rank = list(zip(*(lengths(part, then) for part in lengths(n, first)), strict=True))
    together = all(list(parts) == lengths(sum(parts), first) for parts in by_rank)
    return together and [sum(parts) for parts in by_rank] == lengths(n, then)


def _wrong(does: str, n: int, first: int, then: int) -> NotImplementedError:
    return NotImplementedError(
        f"PyTorch {torch.__version__} {does} wrongly what tensor parallelism and FSDP2 both cut along one dimension, "
        f"here {n} entries into {first} x {then} unequal parts. Use PyTorch 2.10 or newer, a size that {first * then} "
        "divides, or, for a checkpoint, sharded state dicts (full_state_dict=False)."
    )
