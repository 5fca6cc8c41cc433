"""Process groups that this package makes for itself, and waiting for collectives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of ranks that this rank is one of. Its members alone call it, all of them.

    Args:
        ranks: global ranks.
    """
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # those who do not belong to it get a number
    return group


def wait(works: Iterable[dist.Work | None]) -> None:
    """Wait for collectives, in order."""
    for work in works:
        if work is not None:  # a rank that does not belong to the group has nothing to wait for
            work.wait()
