"""The check that all ranks plan the same, made once, before the first collective could hang.

It goes through the key-value store of ``torch.distributed``, so it needs no collective of its own, and the ranks that
differ learn what differs instead of waiting for one another. Ranks send a hash, and texts only where hashes differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from sm3_dist.shard import in_words


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
    checks = [_Check(store, ranks, lines) for ranks, lines in sorted(plans.items())]
    for check in checks:  # first everybody speaks, then everybody listens: no order can deadlock
        check.publish()
    for check in checks:
        check.conclude()


class _Check:
    def __init__(self, store: Store, ranks: tuple[int, ...], lines: Sequence[str]) -> None:
        self.store, self.ranks, self.lines = store, ranks, lines
        members = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        self.rank = dist.get_rank()
        # The store counts, not this module: a group that is left and made anew has a new store, and begins anew.
        round_ = store.add(f"sm3_dist/plan/{members}/rounds/{self.rank}", 1)
        self.prefix = f"sm3_dist/plan/{members}/{round_}"
        self.timeout: timedelta = store.timeout  # type: ignore[attr-defined]  # missing in the stubs

    def publish(self) -> None:
        digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        self.store.set(f"{self.prefix}/hash/{self.rank}", digest)

    def conclude(self) -> None:
        leader = self.ranks[0]
        if self.rank == leader:
            self.store.set(f"{self.prefix}/verdict", self._verdict())
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

    def _verdict(self) -> str:
        keys = {rank: f"{self.prefix}/hash/{rank}" for rank in self.ranks}
        try:
            self.store.wait(list(keys.values()), self.timeout)
        except RuntimeError:  # DistStoreError with some stores; either way somebody is missing
            absent = [rank for rank, key in keys.items() if not self.store.check([key])]
            return "absent " + " ".join(map(str, absent))
        mine = self.store.get(keys[self.rank])
        for rank, key in keys.items():
            if self.store.get(key) != mine:
                return f"differs {rank}"
        return "equal"

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
            self.store.wait([key], self.timeout + timedelta(seconds=5))
        except RuntimeError as error:
            raise PlanMismatchError(
                f"rank {author} of {in_words(self.ranks)} did not take part in the check of SM3's plans within "
                f"{self.timeout}: it holds no parameter of this mesh or process group, or it stopped."
            ) from error
        return self.store.get(key).decode()
