"""The check that all ranks plan the same, made once, before the first collective could hang.

It goes through the key-value store of ``torch.distributed``, so it needs no collective of its own, and the ranks that
differ learn what differs instead of waiting for one another. Ranks send a hash, and texts only where hashes differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from sm3_dist.layout.shard import in_words
from sm3_dist.ranks.rendezvous import meet

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

SLACK = timedelta(seconds=5)
"""How much longer other ranks wait than the one that decides."""


class PlanMismatchError(RuntimeError):
    """Ranks that share accumulators hold different parameters or settings."""


def check_agreement(plans: Mapping[tuple[int, ...], Sequence[str]]) -> None:
    """Raise on every rank unless each set of ranks describes the same plan.

    Args:
        plans: for each set of global ranks that plan together (this rank being one of them) the lines of the plan.

    Raises:
        PlanMismatchError: on every rank of the set; it names the first line that differs, or the ranks that are absent.
    """
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("torch.distributed is not initialized, but parameters are sharded over ranks")
    store = world.get_group_store()
    for ranks, lines in sorted(plans.items()):  # in the same order everywhere, so that none waits for another in a ring
        _Check(store, ranks, lines).conclude()


class _Check:
    def __init__(self, store: Store, ranks: tuple[int, ...], lines: Sequence[str]) -> None:
        self.store, self.ranks, self.lines = store, ranks, lines
        self.rank = dist.get_rank()
        self.timeout: timedelta = store.timeout  # type: ignore[attr-defined]  # missing in the stubs

    def conclude(self) -> None:
        leader = self.ranks[0]
        members = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:16]
        digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        patience = self.timeout if self.rank == leader else self.timeout + SLACK
        try:
            met = meet(self.store, f"sm3_dist/plan/{members}", self.ranks, self.rank, digest, patience)
        except TimeoutError as error:
            raise self._left_alone(leader) from error
        self.prefix = met.token
        if self.rank == leader:
            self.store.set(f"{self.prefix}/verdict", self._verdict(met.messages))
        verdict = self._read("verdict", leader)
        if verdict == "equal":
            return
        kind, *others = verdict.split()
        if kind == "absent":
            raise PlanMismatchError(
                f"ranks {', '.join(others)} of {in_words(self.ranks)} did not reach their first SM3 step within "
                f"{self.timeout}: they hold no parameter of this mesh or process group, or they stopped."
            )
        self._explain(leader, int(others[0]))

    def _verdict(self, digests: Mapping[int, str]) -> str:
        absent = [rank for rank in self.ranks if rank not in digests]
        if absent:
            return "absent " + " ".join(map(str, absent))
        differing = [rank for rank in self.ranks if digests[rank] != digests[self.rank]]
        return f"differs {differing[0]}" if differing else "equal"

    def _explain(self, leader: int, other: int) -> None:
        if self.rank in (leader, other):
            self.store.set(f"{self.prefix}/lines/{self.rank}", "\n".join(self.lines))
        ours = self._read(f"lines/{leader}", leader).split("\n")
        theirs = self._read(f"lines/{other}", other).split("\n")
        common = enumerate(zip(ours, theirs, strict=False))
        at = next((k for k, (a, b) in common if a != b), min(len(ours), len(theirs)))
        ending = "(no more parameters)"
        a = ours[at] if at < len(ours) else ending
        b = theirs[at] if at < len(theirs) else ending
        raise PlanMismatchError(
            f"SM3 needs the same parameters with the same settings on all of ranks {in_words(self.ranks)}, but\n"
            f"  rank {leader} has {len(ours)} tensors, and as number {at}: {a}\n"
            f"  rank {other} has {len(theirs)} tensors, and as number {at}: {b}\n"
            "Build the model and the param groups in the same way on every rank."
        )

    def _read(self, name: str, author: int) -> str:
        key = f"{self.prefix}/{name}"
        try:
            self.store.wait([key], self.timeout + SLACK)
        except RuntimeError as error:  # DistStoreError with some stores
            raise self._left_alone(author) from error
        return self.store.get(key).decode()

    def _left_alone(self, missing: int) -> PlanMismatchError:
        return PlanMismatchError(
            f"rank {missing} of {in_words(self.ranks)} did not take part in the check of SM3's plans within "
            f"{self.timeout}: it holds no parameter of this mesh or process group, or it stopped."
        )
