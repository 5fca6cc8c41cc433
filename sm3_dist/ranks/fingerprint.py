"""Fingerprints: a rank that differs is told apart within a step, by integers in the bucket that travels anyway.

What the ranks of a process group must do alike in a step (:class:`Facts`) is hashed to one number, which the maxima or
the sums of that step take with them. Where the numbers are the same, so is the result on every rank what it expects;
else it is on none. Then, and only then, they look in the key-value store for what differs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.shard import in_words
from sm3_dist.ranks.difference import Facts, facts_from, facts_to, in_which_they_differ
from sm3_dist.ranks.findings import Findings
from sm3_dist.ranks.watch import LOOK_EVERY, PlanMismatchError, RankWatch, store_of_world, wait_for_key

FIELDS = 4
"""Integers of a bucket that a fingerprint takes."""
LARGEST = (1 << 24) - 1
"""No fingerprint is larger: squares of so many bits, summed over 2^15 ranks, still fit into 64."""
PATIENCE = timedelta(seconds=10)
"""How long ranks that know of a difference wait for what the others have to say."""


@dataclass(frozen=True)
class Member:
    """A tensor that the ranks of a circle hold, as far as fingerprints ask.

    Attributes:
        label: what error messages call it.
        param: its parameter.
        alike: whether all of the ranks hold the same part of it, so that they must have the same gradients.
    """

    label: str
    param: Tensor
    alike: bool


class Circle:
    """Ranks that tell one another what they do in each step.

    Args:
        ranks: global ranks, the same order on each.
        names: the hyperparameters that count.
        watch: this rank's view of the others.
    """

    def __init__(self, ranks: tuple[int, ...], names: Sequence[str], watch: RankWatch) -> None:
        self.ranks = ranks
        self.watch = watch
        self.token = ""
        self.exchanges = 0
        self._names = tuple(names)
        self._values = itemgetter(*names)
        self.plan([], [], "")

    def plan(self, groups: Sequence[Mapping[str, Any]], members: Sequence[Member], token: str) -> None:
        """Speak from now on of these param groups and tensors, the same on every rank in the same order.

        Args:
            groups: the param groups.
            members: the tensors.
            token: what the ranks got when they agreed on the plan.
        """
        self._groups = list(groups)
        self._alike = [member for member in members if member.alike]
        if token != self.token:
            self.token, self.exchanges = token, 0

    @property
    def names(self) -> tuple[Sequence[str], list[str]]:
        """What hyperparameters are called, and the tensors that all ranks hold alike."""
        return self._names, [member.label for member in self._alike]

    def facts(self, event: str = "", words: str = "") -> Facts:
        """What this rank does now."""
        if event:
            return Facts(self.watch.call, discarded=self.watch.discarded, event=event, words=words)
        settings = tuple(map(_on_host, map(self._values, self._groups)))
        moved = bytes(member.param.grad is not None for member in self._alike)
        return Facts(self.watch.call, settings, moved, self.watch.discarded)

    def lr_on_device(self) -> list[Tensor]:
        """The learning rates that are on a GPU, where the host does not look."""
        rates = (group["lr"] for group in self._groups)
        return [lr for lr in rates if isinstance(lr, Tensor) and lr.device.type != "cpu"]

    def explain(self, exchange: int, facts: Facts) -> PlanMismatchError:
        """Find out what differs. Every rank of the circle calls it, or has left its facts before.

        Args:
            exchange: of which exchange.
            facts: what this rank did then.

        Returns:
            The error to raise; the same on every rank.
        """
        store, place, rank = store_of_world(), self.place(exchange), dist.get_rank()
        self.leave(exchange, facts)
        if rank == self.ranks[0]:
            found, deadline = {rank: facts}, time.monotonic() + PATIENCE.total_seconds()
            next_look = time.monotonic() + LOOK_EVERY.total_seconds()
            while len(found) < len(self.ranks) and not store.check([f"{place}/verdict"]):
                for other in self.ranks:
                    if other not in found and store.check([f"{place}/{other}"]):
                        found[other] = facts_from(store.get(f"{place}/{other}").decode())
                if time.monotonic() > deadline:
                    break
                if time.monotonic() > next_look:  # one may have stopped for what it found in another group
                    self.watch.look()
                    next_look += LOOK_EVERY.total_seconds()
                time.sleep(0.001)
            if not store.check([f"{place}/verdict"]):
                store.set(f"{place}/verdict", in_which_they_differ(self.ranks, found, *self.names))
        if not wait_for_key(store, f"{place}/verdict", 2 * PATIENCE, self.watch.look):
            return PlanMismatchError(
                f"ranks {in_words(self.ranks)} do not do the same in step number {facts.call} of SM3, and rank "
                f"{self.ranks[0]} did not say what it did within {2 * PATIENCE}. Look for an earlier error in its log."
            )
        return PlanMismatchError(store.get(f"{place}/verdict").decode())

    def leave(self, exchange: int | str, facts: Facts) -> None:
        """Leave the facts of this rank where the others find them."""
        store_of_world().set(f"{self.place(exchange)}/{dist.get_rank()}", facts_to(facts))

    def accuse(self, exchange: int, facts: Facts) -> PlanMismatchError:
        """Say what differs where this rank alone knows: without waiting for others, who may be waiting for it.

        Args:
            exchange: of which exchange.
            facts: what this rank did then, and not all others.

        Returns:
            The error to raise, here and on the others.
        """
        error = PlanMismatchError(
            f"rank {dist.get_rank()} {facts.event} in step number {facts.call} of SM3, and not all of ranks "
            f"{in_words(self.ranks)} did. {facts.words}"
        )
        store_of_world().set(f"{self.place(exchange)}/verdict", str(error))
        return error

    def place(self, exchange: int | str) -> str:
        """The beginning of the keys of an exchange in the store."""
        members = zlib.crc32(repr(self.ranks).encode())
        return f"{self.token}/{members}/{exchange}"


class Seal:
    """What a bucket carries of a circle: written when it leaves, read when it is there.

    Args:
        circle: the ranks.
        add: whether the bucket adds integers up; else it takes their maxima.
        device: where it lies.
    """

    def __init__(self, circle: Circle, add: bool, device: torch.device) -> None:
        self.circle = circle
        self.add = add
        self._sent: tuple[int, Facts, Tensor] | None = None
        self._findings = Findings[tuple[int, Facts]](device)

    def write(self, fields: Tensor, event: str = "", words: str = "") -> None:
        """Write the fingerprint of this rank's step.

        Args:
            fields: the integers of the bucket that are for it, ``FIELDS`` of them.
            event: what else it is than a step.
            words: more about it.
        """
        circle = self.circle
        circle.exchanges += 1
        facts = circle.facts(event, words)
        if event:
            circle.leave(circle.exchanges, facts)
        numbers = self._pair(facts.digest)
        fields.copy_(torch.tensor([*numbers, *self._pair(0)], dtype=fields.dtype, device="cpu"))
        if rates := [] if event else circle.lr_on_device():
            bits = torch.stack([lr.reshape(()).float() for lr in rates]).view(torch.int32).long()
            weights = torch.arange(1, 2 * len(rates), 2, dtype=torch.int64, device=bits.device)
            digest = ((bits * weights).sum() * 0x9E3779B1 >> 8) & LARGEST
            fields[2:].copy_(torch.stack(self._pair(digest)))
        self._sent = circle.exchanges, facts, fields.clone()

    def read(self, fields: Tensor, world_size: int) -> None:
        """See whether all ranks wrote the same.

        Args:
            fields: the same integers, reduced over the ranks.
            world_size: number of the ranks.

        Raises:
            PlanMismatchError: on every rank, unless they did; says what differs.
        """
        if self._sent is None:
            return
        exchange, facts, sent = self._sent
        self._sent = None
        self._findings.add((fields != (sent * world_size if self.add else sent)).any(), (exchange, facts))
        for differ, (exchange, facts) in self._findings.due():
            if differ:
                raise self.circle.accuse(exchange, facts) if facts.event else self.circle.explain(exchange, facts)

    def _pair(self, digest: Any) -> list[Any]:
        """Two integers of which the maxima, or the sums, are as expected on every rank or on none."""
        return [digest, digest * digest if self.add else LARGEST - digest]


def _on_host(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hyperparameters as numbers; a stand-in for a learning rate on a GPU."""
    lr, *others = values
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type == "cpu" else "on the GPU"
    return lr, *others
