"""Process groups by their ranks: those that exist already, and those made here."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sm3_dist.compat import GROUP_NAME


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """The group of these ranks, this one among them: the first that exists, else a new one.

    A new one has the timeout of the default group, and not the half hour that ``torch.distributed`` gives it. Every one
    of the ranks calls it, and nobody else need.

    Args:
        ranks: global ranks, in the order of the group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> group_of([0]) is dist.group.WORLD
        True
        >>> dist.destroy_process_group()
    """
    wanted, world = list(ranks), group_of_all()
    for group in (world, *dist.distributed_c10d._world.pg_map):
        if dist.get_process_group_ranks(group) == wanted and dist.get_backend(group) == dist.get_backend(world):
            return group
    with _name_for(tuple(wanted)):
        group = dist.new_group(wanted, timeout=timeout_of(world), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # those who do not belong to it get a number
    return group


_made: Counter[tuple[int, ...]] = Counter()


@contextmanager
def _name_for(ranks: tuple[int, ...]) -> Iterator[None]:
    """Let the members alone choose the name under which they find one another.

    PyTorch's has the number of groups that a rank is in, and ranks in different numbers of them never meet.
    """
    c10d: Any = dist.distributed_c10d
    _made[ranks] += 1
    name = f"sm3_dist_{zlib.crc32(repr(ranks).encode()):08x}_{_made[ranks]}"
    before = getattr(c10d, "_process_group_name", None)
    if before is None:  # a version that names groups in another way
        yield
        return
    c10d._process_group_name = lambda ranks, use_hashed_name: GROUP_NAME(name)
    try:
        yield
    finally:
        c10d._process_group_name = before


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a collective of a group may take; ``None`` where that cannot be read: then PyTorch's default holds."""
    for device in group._device_types:
        options = getattr(group._get_backend(torch.device(device)), "options", None)
        if isinstance(timeout := getattr(options, "_timeout", None), timedelta):
            return timeout
    return None


def group_of_all() -> dist.ProcessGroup:
    """The default group.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
    """
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("torch.distributed is not initialized, but parameters are sharded over ranks")
    return world
