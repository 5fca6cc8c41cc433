"""RankWatch: what one rank learns of the others while it waits for them, and what a user is told when that fails.

A rank that stops in a step leaves a note in the key-value store of ``torch.distributed``. Who waits for a collective
longer than a moment looks there from time to time; so a fault of one rank is an error on all of them, and not a wait
until the timeout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from sm3_dist.layout.shard import in_words

if TYPE_CHECKING:
    from torch.distributed import Work
    from torch.distributed.distributed_c10d import Store

LOOK_EVERY = timedelta(seconds=1)
"""How long a rank waits before it looks whether another has left a note, and again."""


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
        call: how often ``step()`` was called.
        discarded: how often gradients were thrown away that no step had used.
        used: whether a step was taken since gradients were last set to ``None``.
        tokens: what begins the keys of each set of ranks that has agreed on its plan, see
            :func:`~sm3_dist.ranks.agreement.check_agreement`.
    """

    def __init__(self) -> None:
        self.call = 0
        self.discarded = 0
        self.used = True
        self.tokens: dict[tuple[int, ...], str] = {}
        self._stopped: set[int] = set()  # calls in which this rank itself raised an error
        self._planned: set[int] = set()  # calls in which it made its plan anew

    def follow(self, tokens: Mapping[tuple[int, ...], str]) -> None:
        """Look for the notes of these sets of ranks from now on."""
        self.tokens = dict(tokens)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count a call of ``step()``, and let the others know of an error in it."""
        self.call += 1
        try:
            yield
        except BaseException as error:
            self.leave_note(error)
            raise
        finally:
            self.used = True

    def drop_gradients(self, params: Iterable[Tensor]) -> None:
        """Note that gradients are about to be set to ``None``: whether a step has used them."""
        self.discarded += not self.used and any(param.grad is not None for param in params)
        self.used = False

    def leave_note(self, error: BaseException) -> None:
        """Let the others know that this rank stopped in the present call with this error."""
        self._stopped.add(self.call)
        if not self.tokens:
            return
        relayed = isinstance(error, PlanMismatchError) or (isinstance(error, CollectiveError) and not error.__cause__)
        words = str(error) if relayed else f"{type(error).__name__}: {error}"
        note = {"call": self.call, "rank": dist.get_rank(), "relayed": relayed, "words": words[:10_000]}
        with suppress(Exception):  # the store may be gone with the rank that hosts it; the error itself counts
            for token in self.tokens.values():
                store_of_world().set(f"{token}/stopped", json.dumps(note))

    def plan_anew(self, words: str) -> None:
        """Let the others know that this rank makes its plan anew in the present call, and why."""
        self._planned.add(self.call)
        note = {"call": self.call, "rank": dist.get_rank(), "words": words[:10_000]}
        for token in self.tokens.values():
            store_of_world().set(f"{token}/anew", json.dumps(note))

    def look(self) -> None:
        """See whether a rank has left a note.

        Raises:
            PlanMismatchError: it found a difference between ranks.
            CollectiveError: it stopped for another reason.
        """
        for ranks, token in self.tokens.items():
            store = store_of_world()
            if store.check([f"{token}/anew"]):
                self._look_at_plan(json.loads(store.get(f"{token}/anew")), ranks)
            if not store.check([f"{token}/stopped"]):
                continue
            note = json.loads(store.get(f"{token}/stopped"))
            if note["call"] in self._stopped:
                continue  # all ranks stopped in that call, and went on together
            if note["relayed"]:
                raise PlanMismatchError(note["words"])
            raise CollectiveError(
                f"rank {note['rank']} of {in_words(ranks)} stopped in its step number {note['call']} of SM3 with "
                f"{note['words']}\nMend that first: the other ranks, as this one in its step number {self.call}, stop "
                "because of it.",
                self.call,
            )

    def _look_at_plan(self, note: Mapping[str, Any], ranks: Sequence[int]) -> None:
        if note["call"] >= self.call or note["call"] in self._planned:
            return  # this rank may come to it yet, or has done the same
        raise PlanMismatchError(
            f"rank {note['rank']} planned anew in step number {note['call']} of SM3, and not all of ranks "
            f"{in_words(ranks)} did. {note['words']}"
        )

    def wait(self, works: Iterable[Work | None], what: str, ranks: Sequence[int], on_host: bool) -> None:
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
                self.look()
            except CollectiveError as found:
                raise found from error
            except PlanMismatchError as found:
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


def store_of_world() -> Store:
    """The key-value store that all ranks reach.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
    """
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("torch.distributed is not initialized, but parameters are sharded over ranks")
    store: Store = world.get_group_store()
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


def _done(work: Work) -> bool:
    """Wait a moment for a collective; whether it has ended. Gloo's can be waited for again if not.

    Raises:
        RuntimeError: it failed.
    """
    try:
        work.wait(LOOK_EVERY)
    except RuntimeError as error:
        if work.is_completed() or "Operation timed out" not in str(error):
            raise
        return False
    return True
