"""Lookout: which ranks tell one another what they do, for the tensors of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from sm3_dist.ranks.fingerprint import Circle, Member, Seal
from sm3_dist.ranks.spot_check import SpotCheck
from sm3_dist.ranks.watch import RankWatch
from sm3_dist.step.entry import HYPERPARAMETERS, Entry

Ranks = tuple[int, ...]


class Lookout:
    """Tells a rank apart that does something else than the others. One for all plans of an optimizer.

    Args:
        watch: this rank's view of the others.
    """

    def __init__(self, watch: RankWatch) -> None:
        self.watch = watch
        self._circles: dict[Ranks, Circle] = {}
        self._checks: dict[Ranks, SpotCheck] = {}
        self._sealed: set[Ranks] = set()
        self._entries: Sequence[Entry] = ()

    def plan(self, entries: Sequence[Entry]) -> None:
        """Speak of the tensors of a new plan, on which the sets of ranks that ``watch`` follows have agreed."""
        self._entries = entries
        self._sealed = set()

    def seal(self, ranks: Ranks, add: bool, device: torch.device) -> Seal | None:
        """What a bucket of these ranks carries; ``None`` for all but the first. See :class:`Seal`."""
        if len(ranks) < 2 or ranks in self._sealed:
            return None
        self._sealed.add(ranks)
        return Seal(self._circle(ranks), add, device)

    def check_the_others(self) -> None:
        """Compare through the store those sets of ranks that no bucket has a seal of, once the buckets are made."""
        sealed = [set(ranks) for ranks in self._sealed]
        before, self._checks = self._checks, {}
        for ranks in sorted(_sets(self._entries)):
            if len(ranks) < 2 or any(set(ranks) <= others for others in sealed):
                continue
            circle, known = self._circle(ranks), before.get(ranks)
            self._checks[ranks] = SpotCheck(circle) if known is None or known.token != circle.token else known

    @property
    def unsealed(self) -> list[Ranks]:
        """The sets of ranks that are compared through the store."""
        return list(self._checks)

    def look(self) -> None:
        """Compare them, if it is time to; see :class:`SpotCheck`."""
        for check in self._checks.values():
            check.look()

    def _circle(self, ranks: Ranks) -> Circle:
        within: dict[Ranks, bool] = {}
        members, groups = [], {}
        for entry in self._entries:
            if entry.shard.ranks not in within:
                within[entry.shard.ranks] = set(ranks) <= set(entry.shard.ranks)
            if within[entry.shard.ranks]:
                alike = set(ranks) <= set(entry.shard.replicas)
                members.append(Member(entry.label, entry.param, alike))
                groups[id(entry.group)] = entry.group
        circle = self._circles.setdefault(ranks, Circle(ranks, HYPERPARAMETERS, self.watch))
        circle.plan(list(groups.values()), members, _token(ranks, self.watch.tokens))
        return circle


def _sets(entries: Iterable[Entry]) -> set[Ranks]:
    """The ranks that agree on tensors, and those that hold the same part of one."""
    shards = [entry.shard for entry in entries]
    return {tuple(sorted(shard.ranks)) for shard in shards} | {tuple(sorted(shard.replicas)) for shard in shards}


def _token(ranks: Ranks, tokens: Mapping[Ranks, str]) -> str:
    """That of the smallest set that these ranks lie in, the same on each of them."""
    wider = [others for others in tokens if set(ranks) <= set(others)]
    return tokens[min(wider, key=lambda others: (len(others), others))]
