"""Rendezvous: how ranks meet in a key-value store that may still hold what an earlier attempt left there.

``torchrun --max-restarts`` starts workers anew with the store of those that died, and counts of restarts may differ
between machines (pytorch/pytorch#135712). So no key is trusted that does not depend on somebody who is here now: each
rank calls with a number of its own, and the first rank answers under that number, with a token of its own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

from sm3_dist.ranks.watch import LOOK_EVERY, wait_for_key

_LONGEST_PAUSE = 0.1


@dataclass(frozen=True)
class Rendezvous:
    """Ranks that have met.

    Attributes:
        token: begins the keys that these ranks share, and nobody before or after them.
        messages: what each rank had to say, by rank. Only the first rank has those of others; who is absent has none.
    """

    token: str
    messages: dict[int, str]


def meet(
    store: Store,
    place: str,
    ranks: Sequence[int],
    rank: int,
    message: str,
    timeout: timedelta,
    look: Callable[[], None] = lambda: None,
) -> Rendezvous:
    """Wait until all ranks are here. Every one of them calls it; the first of them waits for all others.

    Args:
        store: a store that all of them reach.
        place: the beginning of the keys; one rendezvous at a time.
        ranks: who is to come.
        rank: this one.
        message: what it has to say.
        timeout: how long it waits.
        look: called from time to time while it waits; what it raises ends the wait.

    Raises:
        TimeoutError: the first rank did not answer. On the first rank itself nothing is raised: who is absent has no
            message.

    Example:
        >>> from datetime import timedelta
        >>> from torch.distributed import HashStore
        >>> meet(HashStore(), "here", [0], 0, "hello", timedelta(seconds=1)).messages
        {0: 'hello'}
    """
    if rank == ranks[0]:
        return _lead(store, place, ranks, message, timeout, look)
    call = uuid.uuid4().hex
    store.set(f"{place}/call/{rank}", call)
    if not wait_for_key(store, f"{place}/answer/{call}", timeout, look):
        raise TimeoutError(f"rank {ranks[0]} did not answer within {timeout}")
    token = store.get(f"{place}/answer/{call}").decode()
    store.set(f"{token}/message/{rank}", message)
    return Rendezvous(token, {rank: message})


def _lead(
    store: Store, place: str, ranks: Sequence[int], message: str, timeout: timedelta, look: Callable[[], None]
) -> Rendezvous:
    token = f"{place}/{uuid.uuid4().hex}"
    leader, *absent = ranks
    messages, answered = {leader: message}, set()
    deadline, pause = time.monotonic() + timeout.total_seconds(), 0.0002
    next_look = time.monotonic() + LOOK_EVERY.total_seconds()
    while absent:
        for rank in absent:
            if store.check([f"{token}/message/{rank}"]):
                messages[rank] = store.get(f"{token}/message/{rank}").decode()
            elif store.check([f"{place}/call/{rank}"]):
                call = store.get(f"{place}/call/{rank}").decode()  # perhaps of one who died, and is overwritten yet
                if call not in answered:
                    answered.add(call)
                    store.set(f"{place}/answer/{call}", token)
        absent = [rank for rank in absent if rank not in messages]
        if time.monotonic() > deadline:
            break
        if absent and time.monotonic() > next_look:
            look()
            next_look = time.monotonic() + LOOK_EVERY.total_seconds()
        time.sleep(pause if absent else 0)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return Rendezvous(token, dict(sorted(messages.items())))
