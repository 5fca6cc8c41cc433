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
from sm3_dist.ranks.watch import PlanMismatchError, RankWatch, store_of_world, wait_for_key

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

SLACK = timedelta(seconds=5)
"""How much longer other ranks wait than the one that decides."""


def check_agreement(
    plans: Mapping[tuple[int, ...], Sequence[str]],
    watch: RankWatch,
    patience: Mapping[tuple[int, ...], timedelta] | None = None,
) -> dict[tuple[int, ...], str]:
    """Raise on every rank unless each set of ranks describes the same plan.

    Args:
        plans: for each set of global ranks that plan together (this rank being one of them) the lines of the plan.
        watch: this rank's view of the others.
        patience: how long to wait for sets of ranks; where none is given, as long as the key-value store does.

    Returns:
        For each set a token: the beginning of keys in the store that these ranks share, and nobody else.

    Raises:
        PlanMismatchError: on every rank of the set; it names the first line that differs, or the ranks that are absent.
    """
    store = store_of_world()
    tokens = {}
    for ranks, lines in sorted(plans.items()):  # in the same order everywhere, so that none waits for another in a ring
        check = _Check(store, ranks, lines, watch, (patience or {}).get(ranks))
        with watch.meeting(ranks), watch.explained("the comparison of plans", ranks):
            tokens[ranks] = check.conclude()
    return tokens


class _Check:
    def __init__(
        self, store: Store, ranks: tuple[int, ...], lines: Sequence[str], watch: RankWatch, patience: timedelta | None
    ) -> None:
        self.store, self.ranks, self.lines, self.watch = store, ranks, lines, watch
        self.rank = dist.get_rank()
        self.timeout: timedelta = patience or store.timeout  # type: ignore[attr-defined]  # missing in the stubs

    def conclude(self) -> str:
        """Compare, and return the token."""
        leader = self.ranks[0]
        members = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:16]
        digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        patience = self.timeout if self.rank == leader else self.timeout + SLACK
        try:
            met = meet(self.store, f"sm3_dist/plan/{members}", self.ranks, self.rank, digest, patience, self.watch.look)
        except TimeoutError as error:
            raise self._left_alone(leader) from error
        self.prefix = met.token
        if self.rank == leader:
            self.store.set(f"{self.prefix}/verdict", self._verdict(met.messages))
        verdict = self._read("verdict", leader)
        if verdict == "equal":
            return self.prefix
        kind, *others = verdict.split()
        if kind == "absent":
            raise PlanMismatchError(
                f"ranks {', '.join(others)} of {in_words(self.ranks)} did not come to the comparison of SM3's plans "
                f"within {self.timeout}: they hold no parameter of this mesh or process group, or they stopped."
            )
        raise self._difference(leader, int(others[0]))

    def _verdict(self, digests: Mapping[int, str]) -> str:
        absent = [rank for rank in self.ranks if rank not in digests]
        if absent:
            return "absent " + " ".join(map(str, absent))
        differing = [rank for rank in self.ranks if digests[rank] != digests[self.rank]]
        return f"differs {differing[0]}" if differing else "equal"

    def _difference(self, leader: int, other: int) -> PlanMismatchError:
        if self.rank in (leader, other):
            self.store.set(f"{self.prefix}/lines/{self.rank}", "\n".join(self.lines))
        ours = self._read(f"lines/{leader}", leader).split("\n")
        theirs = self._read(f"lines/{other}", other).split("\n")
        at = _first_difference(ours, theirs)
        ending = "(no more parameters)"
        a = ours[at] if at < len(ours) else ending
        b = theirs[at] if at < len(theirs) else ending
        return PlanMismatchError(
            f"SM3 needs the same parameters with the same settings on all of ranks {in_words(self.ranks)}, but\n"
            f"  rank {leader} has {len(ours)} tensors, and as number {at}: {a}\n"
            f"  rank {other} has {len(theirs)} tensors, and as number {at}: {b}\n"
            f"{_parts_that_differ(a, b)}"
            "Build the model and the param groups in the same way on every rank."
        )

    def _read(self, name: str, author: int) -> str:
        key = f"{self.prefix}/{name}"
        if not wait_for_key(self.store, key, self.timeout + SLACK, self.watch.look):
            raise self._left_alone(author)
        return self.store.get(key).decode()

    def _left_alone(self, missing: int) -> PlanMismatchError:
        return PlanMismatchError(
            f"rank {missing} of {in_words(self.ranks)} did not take part in the check of SM3's plans within "
            f"{self.timeout}: it holds no parameter of this mesh or process group, or it stopped."
        )


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The number of the first line that differs. One that is missing counts first: it may change all others.

    Example:
        >>> _first_difference(["a: shape (2,), cut at 1", "b: shape (3,), cut at 4"], ["a: shape (2,), cut at 2"])
        1
    """
    if len(ours) != len(theirs):
        ours, theirs = ([line.partition("), ")[0] for line in lines] for lines in (ours, theirs))
    common = enumerate(zip(ours, theirs, strict=False))
    return next((k for k, (a, b) in common if a != b), min(len(ours), len(theirs)))


def _parts_that_differ(a: str, b: str) -> str:
    """Where two lines have the same parts in other words, those words."""
    pairs = list(zip(a.split(", "), b.split(", "), strict=False))
    differ = [f"{x} and {y}" for x, y in pairs if x != y]
    return f"They differ in {'; '.join(differ)}.\n" if len(differ) < len(pairs) else ""
