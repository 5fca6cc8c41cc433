"""The check that replicated parameters have the same gradients on every rank, as DistributedDataParallel leaves them.

Each rank of ZeRO-1 updates its range from its own gradients. If they differ, training goes wrong and nothing shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.box import Box
from sm3_dist.ranks.watch import RankWatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18  # elements; their bits as 64-bit integers take 2 MB


class GradientMismatchError(RuntimeError):
    """Ranks that are to be replicas of one another have different gradients."""


class GradientCheck:
    """What a step asks of the gradients of replicated parameters.

    Args:
        group: the ranks over which they are replicated.
        steps: in how many first steps to compare them across ranks.
        watch: this rank's view of the others.
    """

    def __init__(self, group: ProcessGroup, steps: int, watch: RankWatch) -> None:
        self.group = group
        self.watch = watch
        self.steps_left = steps

    def __call__(self, params: Sequence[tuple[Tensor, str]]) -> None:
        """Raise if one is sparse, or, in the first steps, differs between ranks; see the functions below."""
        refuse_sparse_gradients(params)
        if self.steps_left:
            check_same_gradients(params, self.group, self.watch)
            self.steps_left -= 1


def check_same_gradients(
    params: Sequence[tuple[Tensor, str]], group: ProcessGroup, watch: RankWatch | None = None
) -> None:
    """Raise on every rank unless every rank of the group has the same gradients, to the bit.

    One all-reduce of two integers per parameter. It is exact: the checksums are sums of integers.

    Args:
        params: the parameters, each with what error messages call it, the same on every rank.
        group: the ranks over which they are replicated.
        watch: this rank's view of the others.

    Raises:
        GradientMismatchError: on every rank; it names the first parameter whose gradients differ.

    Example:
        Every rank of a group calls it; here the only one:

        >>> _ = torch.manual_seed(0)
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.randn(3)
        >>> check_same_gradients([(weight, "weight")], dist.group.WORLD)
        >>> dist.destroy_process_group()
    """
    if not params:
        return
    sums = torch.stack([checksum(param.grad).to(params[0][0].device) for param, _ in params])
    largest = torch.cat([sums, ~sums])  # the largest complement is the complement of the smallest
    watch, what, ranks = watch or RankWatch(), "the comparison of gradients", dist.get_process_group_ranks(group)
    with watch.explained(what, ranks):
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group, async_op=True)
    watch.wait([work], what, ranks, largest.device.type == "cpu")
    top, bottom = largest.chunk(2)
    differ = (top != ~bottom).nonzero().flatten().tolist()
    if differ:
        raise GradientMismatchError(
            f"the gradients of {params[differ[0]][1]}, and of {len(differ) - 1} more of {len(params)} parameters, "
            f"differ between ranks {dist.get_process_group_ranks(group)}. With shard_over= each rank updates its range "
            "from its own gradients, so they must be the same: wrap the model in DistributedDataParallel, or average "
            "the gradients over these ranks before step(). check_gradients=0 switches this check off."
        )


def refuse_sparse_gradients(params: Sequence[tuple[Tensor, str]]) -> None:
    """Raise if a gradient is sparse: before anything is sent, so that no rank waits for one that has raised.

    Args:
        params: the parameters, each with what error messages call it.

    Raises:
        NotImplementedError: it names the first such parameter.
    """
    for param, label in params:
        if param.grad is not None and param.grad.is_sparse:
            raise NotImplementedError(
                f"{label} has a sparse gradient, which shard_over= does not take. Use nn.Embedding(..., sparse=False), "
                "or give the parameter an SM3 of its own without shard_over."
            )


def checksum(grad: Tensor | None) -> Tensor:
    """The sum of the bit patterns of a gradient, as a 64-bit integer that wraps around.

    Example:
        >>> checksum(torch.tensor([1.0, 2.0])).item() == 0x3F800000 + 0x40000000
        True
    """
    if grad is None:
        return torch.tensor(torch.iinfo(torch.int64).min, dtype=torch.int64, device="cpu")
    grad, total = grad.detach(), torch.zeros((), dtype=torch.int64, device=grad.device)
    whole, kind = Box.whole(grad.shape), _BITS[grad.element_size()]
    for chunk in whole.chunks(_CHUNK):
        total += grad[chunk.within(whole)].view(kind).sum(dtype=torch.int64)
    return total
