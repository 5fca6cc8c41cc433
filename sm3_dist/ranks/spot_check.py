"""SpotCheck: ranks that send one another nothing compare what they do through the key-value store, now and then.

The first rank writes down what it did in its last steps, the others compare it with what they did in the same steps. No
rank waits for another, and each asks the store once in a while, however fast it steps: it costs nothing that shows.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import OrderedDict

import torch.distributed as dist

from sm3_dist.layout.shard import in_words
from sm3_dist.ranks.difference import Facts, facts_from, facts_to, in_which_they_differ
from sm3_dist.ranks.fingerprint import Circle
from sm3_dist.ranks.watch import PlanMismatchError, store_of_world

FIRST = 8
"""In so many first steps each looks in every one."""
SECONDS = 1.0
"""Between two looks, later on."""
RANKS_PER_SECOND = 200
"""Of more ranks each looks more rarely, for the sake of the store."""
SHOWN = 64
"""How many of its last steps the first rank writes down."""
IN_WORDS = 8
"""How many of them with all that it did."""
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

    def look(self) -> None:
        """Note what this rank does in this step; compare it with the others, if it is time to.

        Raises:
            PlanMismatchError: this rank and the first one differ.
            CollectiveError: another rank has stopped.
        """
        facts = self.circle.facts()
        self._chain = zlib.crc32(facts.digest.to_bytes(4, "big"), self._chain)
        self._done[facts.call] = self._chain, facts
        if len(self._done) > KEPT:
            self._done.popitem(last=False)
        if len(self._done) > FIRST and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + max(SECONDS, len(self.circle.ranks) / RANKS_PER_SECOND)
        self.circle.watch.look()
        store, key = store_of_world(), self.circle.place("first")
        if dist.get_rank() == self.circle.ranks[0]:
            last = list(self._done.items())[-SHOWN:]
            quiet = len(last) - IN_WORDS
            shown = [[call, c, None if k < quiet else facts_to(each)] for k, (call, (c, each)) in enumerate(last)]
            store.set(key, json.dumps(shown))
        elif store.check([key]):
            self._compare(json.loads(store.get(key)))

    def _compare(self, shown: list[tuple[int, int, str | None]]) -> None:
        differ = [each for each in shown if each[0] in self._done and self._done[each[0]][0] != each[1]]
        if not differ:
            return
        call, circle, rank = differ[0][0], self.circle, dist.get_rank()
        first = circle.ranks[0]
        for at, _, told in differ:
            theirs, ours = told and facts_from(told), self._done[at][1]
            if theirs and theirs.digest != ours.digest:
                raise PlanMismatchError(in_which_they_differ([first, rank], {first: theirs, rank: ours}, *circle.names))
        raise PlanMismatchError(
            f"ranks {first} and {rank} of {in_words(circle.ranks)} must take the same steps of SM3 with the same "
            f"settings, but from step number {call} on, or before it, they did not: the settings of their param groups "
            f"differ, or parameters had a gradient on one of them alone. Here they were {self._done[call][1].settings}."
        )
