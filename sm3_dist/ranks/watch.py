"""RankWatch: what one rank learns of the others while it waits for them, and what a user is told when that fails.

A rank that stops in a step leaves a note in the key-value store of ``torch.distributed``. Who waits for a collective
longer than a moment looks there from time to time; so a fault of one rank is an error on all of them, and not a wait
until the timeout.
"""

from __future__ import annotations

import atexit
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.groups import group_of_all
from sm3_dist.layout.shard import in_words

if TYPE_CHECKING:
    from torch.distributed import Work
    from torch.distributed.distributed_c10d import Store

    from sm3_dist.ranks.threaded_wait import ThreadedWait

LOOK_EVERY = timedelta(seconds=1)
"""How long a rank waits before it looks whether another has left a note, and again."""
PATIENCE = timedelta(seconds=25)
"""How long a rank that goes on after an error waits for the others to do so too."""
EARLY = "sm3_dist/stopped"
"""Key of the note of a rank that stopped before it had agreed on a plan with others."""
SLACK = 30.0
"""Seconds by which clocks, and the times at which ranks make their optimizers, may differ for such a note to count."""


class PlanMismatchError(RuntimeError):
    """Ranks that belong together hold different parameters or settings, or do not take the same steps."""


class CollectiveError(RuntimeError):
    """A collective of a step failed, or waits for a rank that stopped. The cause is what the library raised, if it did.

    Attributes:
        step: which call of ``step()`` it belongs to, the first being 1.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class RankWatch:
    """One optimizer's view of the other ranks.

    Attributes:
        made: when it was made, in seconds.
        awaited: the ranks with which it agrees on a plan at this moment.
        call: how often ``step()`` was called.
        discarded: how often gradients were thrown away that no step had used.
        used: whether a step was taken since gradients were last set to ``None``.
        tokens: what begins the keys of each set of ranks that has agreed on its plan, see
            :func:`~sm3_dist.ranks.agreement.check_agreement`.
    """

    _last_error = 0.0
    """When a step of this process stopped with an error, whichever optimizer's it was."""
    _without_plan: ClassVar[set[int]] = set()
    """The optimizers of this process, by number, that have not come to their first step."""
    _numbers = itertools.count()

    def __init__(self) -> None:
        self.made = time.time()
        self._number = next(self._numbers)
        self._without_plan.add(self._number)
        self.awaited: tuple[int, ...] = ()
        self.call = 0
        self.discarded = 0
        self.used = True
        self.tokens: dict[tuple[int, ...], str] = {}
        self._stopped: set[int] = set()  # calls in which this rank itself raised an error
        self._planned: set[int] = set()  # calls in which it made its plan anew
        self._past_planning = 0  # the last call in which it has its plan
        self._error = ""  # with which it stopped in its last call
        self._in_step = False

    def follow(self, tokens: Mapping[tuple[int, ...], str]) -> None:
        """Look for the notes of these sets of ranks from now on."""
        self.tokens = dict(tokens)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count a call of ``step()``, and let the others know of an error in it."""
        self.call += 1
        self._in_step = True
        try:
            if self._error:
                self._go_on_together()
            yield
            self._error = ""
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}"
            self.leave_note(error)
            raise
        finally:
            self.used, self._in_step = True, False

    def drop_gradients(self, params: Iterable[Tensor]) -> None:
        """Note that gradients are about to be set to ``None``: whether a step has used them."""
        self.discarded += not self.used and any(param.grad is not None for param in params)
        self.used = False

    def leave_note(self, error: BaseException) -> None:
        """Let the others know that this rank stopped in the present call with this error."""
        self._stopped.add(self.call)
        RankWatch._last_error = time.time()
        if not (dist.is_available() and dist.is_initialized()):
            return
        relayed = isinstance(error, PlanMismatchError) or (isinstance(error, CollectiveError) and not error.__cause__)
        words = str(error) if relayed else f"{type(error).__name__}: {error}"
        note = {"call": self.call, "rank": dist.get_rank(), "relayed": relayed, "words": words[:10_000]}
        keys = [f"{token}/stopped" for token in self.tokens.values()] or [EARLY]
        with suppress(Exception):  # the store may be gone with the rank that hosts it; the error itself counts
            for key in keys:
                store_of_world().set(key, json.dumps({**note, "time": time.time()}))

    def _go_on_together(self) -> None:
        """Go on after an error if all ranks do: those that did not stop in that call are out of step with this one.

        Raises:
            PlanMismatchError: they have not all come within ``PATIENCE``.
        """
        if not self.tokens:
            return
        store, stopped = store_of_world(), self.call - 1
        places = [(ranks, f"{token}/goes on/{stopped}") for ranks, token in self.tokens.items()]
        for ranks, place in places:
            if store.add(place, 1) == len(ranks):
                store.set(f"{place}/all", "")
        for ranks, place in places:
            if not wait_for_key(store, f"{place}/all", PATIENCE, self.look):
                raise PlanMismatchError(
                    f"rank {dist.get_rank()} stopped in its step number {stopped} of SM3 with {self._error}\nand went "
                    f"on with the next, but not all of ranks {in_words(ranks)} did so within {PATIENCE}: where one "
                    "stops and goes on, all of them must."
                )

    @contextmanager
    def meeting(self, ranks: tuple[int, ...]) -> Iterator[None]:
        """Look for notes of these ranks, with which there is no plan yet."""
        self.awaited = ranks
        try:
            yield
        finally:
            self.awaited = ()

    def have_plan(self) -> None:
        """Note that this rank has its plan for the present call."""
        self._without_plan.discard(self._number)
        self._past_planning = self.call

    def plan_anew(self, words: str) -> None:
        """Let the others know that this rank makes its plan anew in the present call, or for the next, and why."""
        call = self.call if self._in_step else self.call + 1  # others may be in the present one yet
        self._planned.add(call)
        note = {"call": call, "rank": dist.get_rank(), "words": words[:10_000]}
        for token in self.tokens.values():
            store_of_world().set(f"{token}/anew", json.dumps(note))

    def look(self, ahead: bool = False) -> None:
        """See whether a rank has left a note.

        Args:
            ahead: whether an error in a later step than the present one counts. Whoever comes to it has done their part
                of this one, and this rank may stop there too. While plans are compared it always counts: whoever went
                past that does not come.

        Raises:
            PlanMismatchError: it found a difference between ranks.
            CollectiveError: it stopped for another reason.
        """
        if self.awaited:
            self._look_for_early_note()
        for ranks, token in self.tokens.items():
            store = store_of_world()
            if store.check([f"{token}/anew"]):
                self._look_at_plan(json.loads(store.get(f"{token}/anew")), ranks)
            if not store.check([f"{token}/stopped"]):
                continue
            note = json.loads(store.get(f"{token}/stopped"))
            if note["call"] in self._stopped:
                continue  # all ranks stopped in that call, and went on together
            if self._in_step and note["call"] > self.call and not (ahead or self.awaited):
                continue
            self._stop_because_of(note, ranks)

    def _stop_because_of(self, note: Mapping[str, Any], ranks: Sequence[int]) -> None:
        if note["relayed"]:
            raise PlanMismatchError(note["words"])
        raise CollectiveError(
            f"rank {note['rank']} of {in_words(ranks)} stopped in its step number {note['call']} of SM3 with "
            f"{note['words']}\nMend that first: the other ranks, as this one in its step number {self.call}, stop "
            "because of it.",
            self.call,
        )

    def _look_for_early_note(self) -> None:
        """See a note of ranks that share no key with this one yet. It may be of an optimizer or an attempt before."""
        store = store_of_world()
        if not store.check([EARLY]):
            return
        note = json.loads(store.get(EARLY))
        is_fresh = note["time"] > self.made - SLACK and note["time"] > RankWatch._last_error + SLACK
        if is_fresh and note["rank"] in self.awaited and note["rank"] != dist.get_rank():
            self._stop_because_of(note, self.awaited)

    def _look_at_plan(self, note: Mapping[str, Any], ranks: Sequence[int]) -> None:
        if note["call"] > self._past_planning or note["call"] in self._planned:
            return  # this rank may come to it yet, or has done the same
        raise PlanMismatchError(
            f"rank {note['rank']} planned anew in step number {note['call']} of SM3, and not all of ranks "
            f"{in_words(ranks)} did. {note['words']}"
        )

    def wait(self, works: Iterable[Work | ThreadedWait | None], what: str, ranks: Sequence[int], on_host: bool) -> None:
        """Wait for collectives, in order.

        Args:
            works: the collectives.
            what: what error messages call them.
            ranks: who takes part.
            on_host: whether they run on the CPU. Those of a GPU are waited for by the GPU.

        Raises:
            PlanMismatchError, CollectiveError: as :meth:`look`; or if a collective failed.
        """
        with self.explained(what, ranks):
            for work in works:
                if work is None:  # a rank that does not belong to the group has nothing to wait for
                    continue
                while on_host and self.tokens and not _done(work):
                    self.look()
                if not (on_host and self.tokens):
                    work.wait()

    @contextmanager
    def explained(self, what: str, ranks: Sequence[int]) -> Iterator[None]:
        """Chain errors of a communication library to one that says what failed, and what usually causes that."""
        started = time.monotonic()
        try:
            yield
        except (PlanMismatchError, CollectiveError):
            raise
        except RuntimeError as error:
            after = time.monotonic() - started
            try:
                self.look(ahead=True)
            except (PlanMismatchError, CollectiveError) as found:
                raise found from error
            except Exception:  # the store is gone too
                pass
            raise CollectiveError(
                f"{what} over ranks {in_words(ranks)} failed on rank {dist.get_rank()} in its step number {self.call} "
                f"of SM3, after {after:.1f} s: {error}\n"
                "Usually one of these ranks has ended, by an error of its own or for want of memory: look for the "
                "first error in the logs of all ranks. If all of them are alive, one did not come to this step in time "
                "(the timeout is that of init_process_group), or uses the same process group for something else at "
                "this moment.",
                self.call,
            ) from error


@atexit.register
def _leave_last_note() -> None:
    """Let those know who wait for a first plan that this process ended without one: nothing else would tell them."""
    if RankWatch._last_error or not (RankWatch._without_plan and dist.is_available() and dist.is_initialized()):
        return
    words = f"rank {dist.get_rank()} ended before its first step of SM3, for which other ranks wait."
    note = {"call": 1, "rank": dist.get_rank(), "relayed": True, "words": words, "time": time.time()}
    with suppress(Exception):  # the rank that hosts the store may have ended before
        store = store_of_world()
        store.set_timeout(timedelta(seconds=5))
        store.set(EARLY, json.dumps(note))


def store_of_world() -> Store:
    """The key-value store that all ranks reach.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
    """
    store: Store = group_of_all().get_group_store()
    return store


def wait_for_key(store: Store, key: str, patience: timedelta, look: Callable[[], None]) -> bool:
    """Wait until a key is there; ``False`` if it has not come. ``look`` is called from time to time."""
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        left = deadline - time.monotonic()
        try:
            store.wait([key], max(timedelta(milliseconds=1), min(LOOK_EVERY, timedelta(seconds=left))))
            return True
        except dist.DistNetworkError as error:
            raise CollectiveError(
                f"the key-value store of torch.distributed cannot be reached any more ({error}): the process that "
                "hosts it, mostly that of rank 0, has ended. Look for its error in the logs."
            ) from error
        except RuntimeError:  # DistStoreError with some stores
            if left <= 0:
                return False
        look()


def _done(work: Work | ThreadedWait) -> bool:
    """Wait a moment for a collective; whether it has ended. Gloo's can be waited for again if not.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(LOOK_EVERY)
    except RuntimeError as error:
        if "Operation timed out" not in str(error):
            raise
        if not work.is_completed():
            return False
        work.wait()  # it ended, well or not, when the wait had just given up
    return True
