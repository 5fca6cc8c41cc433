"""SpotCheck: ranks that send one another nothing compare what they do through the key-value store, now and then.

In the first steps they wait for one another there, so that a run of a few steps is compared too. Later on the first
rank writes down what it did in its last steps, the others compare it with what they did in the same steps; no rank
waits for another, and each asks the store once in a while, however fast it steps: it costs nothing that shows.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import OrderedDict
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from sm3_dist.layout.shard import in_words
from sm3_dist.ranks.difference import Facts, facts_from, facts_to, in_which_they_differ
from sm3_dist.ranks.fingerprint import Circle
from sm3_dist.ranks.watch import PlanMismatchError, store_of_world, wait_for_key

FIRST = 8
"""In so many first steps all of them meet."""
PATIENCE = timedelta(seconds=10)
"""How long one waits there for the others. They may pause: it then goes on, and waits no more."""
SECONDS = 1.0
"""Between two looks, later on."""
RANKS_PER_SECOND = 200
"""Of more ranks each looks more rarely, for the sake of the store."""
SHOWN = 256
"""How many of its last steps the first rank writes down."""
KEPT = 1024
"""How many the others remember."""


class SpotCheck:
    """What the ranks of one circle compare.

    Args:
        circle: the ranks.
    """

    def __init__(self, circle: Circle) -> None:
        self.circle = circle
        self.token = circle.token
        self._chain = 0
        self._done: OrderedDict[int, tuple[int, Facts]] = OrderedDict()  # by call: the chain so far, what was done
        self._due = 0.0
        self._waits = True
        self._unanswered = ""  # where this rank waited in vain

    def look(self) -> None:
        """Note what this rank does in this step; compare it with the others, if it is time to.

        Raises:
            PlanMismatchError: this rank and another one differ.
            CollectiveError: another rank has stopped.
        """
        facts = self.circle.facts()
        self._chain = zlib.crc32(facts.digest.to_bytes(4, "big"), self._chain)
        self._done[facts.call] = self._chain, facts
        if len(self._done) > KEPT:
            self._done.popitem(last=False)
        early = len(self._done) <= FIRST
        if early and self._waits:
            self._meet(f"first steps/{len(self._done)}", facts)
        if not early and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + max(SECONDS, len(self.circle.ranks) / RANKS_PER_SECOND)
        self.circle.watch.look()
        store, key = store_of_world(), self.circle.place("first")
        if self._unanswered and store.check([f"{self._unanswered}/all"]):
            self._conclude(self._unanswered)
        if dist.get_rank() == self.circle.ranks[0]:
            store.set(key, json.dumps(self._shown()))
        elif store.check([key]):
            self._compare(json.loads(store.get(key)))

    def _meet(self, number: str, facts: Facts) -> None:
        """Compare this step with that of all others, and wait for them."""
        store, place, world = store_of_world(), self.circle.place(number), len(self.circle.ranks)
        self.circle.leave(number, facts)
        store.add(f"{place}/alike/{facts.digest}", 1)
        if store.add(f"{place}/came", 1) == world:
            alike = store.add(f"{place}/alike/{facts.digest}", 0) == world
            store.set(f"{place}/all", "alike" if alike else "differ")
        if wait_for_key(store, f"{place}/all", PATIENCE, self.circle.watch.look):
            self._conclude(place)
        else:
            self._waits, self._unanswered = False, place

    def _conclude(self, place: str) -> None:
        """Raise if those who met were not alike."""
        self._unanswered = ""
        store, ranks = store_of_world(), self.circle.ranks
        if store.get(f"{place}/all") != b"alike":
            found = {rank: facts_from(store.get(f"{place}/{rank}").decode()) for rank in ranks}
            raise PlanMismatchError(in_which_they_differ(ranks, found, *self.circle.names))

    def _shown(self) -> list[tuple[int, int, str | None]]:
        """Call, chain and facts of the last steps; ``None`` for the facts of the step before, but for the call."""
        shown: list[tuple[int, int, str | None]] = []
        before = None
        for call, (chain, facts) in list(self._done.items())[-SHOWN:]:
            same = before is not None and replace(facts, call=before.call) == before
            shown.append((call, chain, None if same else facts_to(facts)))
            before = facts
        return shown

    def _compare(self, shown: list[tuple[int, int, str | None]]) -> None:
        circle, rank, first = self.circle, dist.get_rank(), self.circle.ranks[0]
        theirs, from_call = Facts(0), 0
        for call, chain, told in shown:
            theirs = facts_from(told) if told else replace(theirs, call=call)
            if call not in self._done or self._done[call][0] == chain:
                continue
            ours = self._done[call][1]
            if theirs.digest != ours.digest:
                found = {first: theirs, rank: ours}
                raise PlanMismatchError(in_which_they_differ([first, rank], found, *circle.names))
            from_call = from_call or call
        if from_call:
            raise PlanMismatchError(
                f"ranks {first} and {rank} of {in_words(circle.ranks)} must take the same steps of SM3 with the same "
                f"settings, but in a step before number {from_call}, which is too long ago to say which, they did not: "
                "the settings of their param groups differed, or parameters had a gradient on one of them alone."
            )
