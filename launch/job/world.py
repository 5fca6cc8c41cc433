"""The world: all processes of one run, started by torchrun or just this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sm3_dist.ranks.rendezvous import meet

T = TypeVar("T")

PATIENCE = timedelta(minutes=3)
"""How long the others are waited for at the start, and in a collective."""


class UserError(Exception):
    """Something that the user can put right; its message says how. Shown without a traceback."""


@dataclass(frozen=True)
class World:
    """This process among all.

    Args:
        rank: number of this process, from 0; rank 0 speaks for all.
        size: number of processes.
        local_rank: number of this process on its machine, which chooses its GPU.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def current(cls) -> World:
        """Return the world of the default process group."""
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, local_size)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def agreed(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns here; if it raises :class:`UserError` on any rank, raise it on every rank.

        So a mistake that only one rank can see (a file missing on one machine) never leaves the others waiting.
        """
        result, error = None, None
        try:
            result = action()
        except UserError as raised:
            error = str(raised)
        for rank, message in enumerate(self.gather(error)):
            if message is not None:
                raise UserError(f"rank {rank}: {message}" if rank else message)
        return result  # type: ignore[return-value]

    def same(self, what: str, value: object) -> None:
        """Raise :class:`UserError` on every rank unless all ranks have the same ``value``."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}")

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, by rank."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of every rank's ``tensor``."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def device(self, wanted: str) -> torch.device:
        """Return this rank's device: ``wanted`` is "cpu", "cuda" or "auto" (CUDA where there is any).

        Raises:
            UserError: CUDA is wanted and missing, or has fewer devices than this machine has ranks.
        """
        found = torch.cuda.device_count()
        if wanted == "cpu" or (wanted == "auto" and not found):
            return torch.device("cpu")
        if self.local_size > found:
            raise UserError(
                f"{self.local_size} processes on this machine need a CUDA device each, and torch finds {found}; "
                f"pass --device cpu{f' or --nproc-per-node {found}' if found else ''}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)


@contextmanager
def join() -> Iterator[World]:
    """Join the processes that torchrun started (without it: a world of one), and leave together.

    After an exception this rank may be alone, so it does not wait for the others: it leaves at once, and torchrun stops
    the rest.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        # Under torchrun --max-restarts the store still has the addresses of those that died.
        met = meet(store, "launch", range(size), rank, "", PATIENCE)
        if rank == 0 and len(met.messages) < size:
            absent = ", ".join(str(other) for other in range(size) if other not in met.messages)
            raise TimeoutError(f"ranks {absent} of {size} did not start within {PATIENCE}")
        store = PrefixStore(met.token, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield World.current()
    dist.barrier()  # none is cut off in mid-message
    dist.destroy_process_group()
