"""What ranks that must do the same did, and the difference in words."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sm3_dist.layout.shard import in_words


@dataclass(frozen=True)
class Facts:
    """What a rank did in one exchange, as far as all ranks of a circle must do the same.

    Attributes:
        call: which call of ``step()`` it was.
        settings: the hyperparameters of each param group.
        moved: of each tensor that all of the ranks hold alike, 1 if it has a gradient.
        discarded: how often gradients were thrown away that no step had used.
        event: what it was, if not a step.
        words: more about that; ranks may say different words.
    """

    call: int
    settings: tuple[tuple[Any, ...], ...] = ()
    moved: bytes = b""
    discarded: int = 0
    event: str = ""
    words: str = ""

    @property
    def digest(self) -> int:
        """24 bits, the same on ranks with the same facts."""
        told = repr((self.call, self.settings, self.discarded, self.event))
        return zlib.crc32(self.moved, zlib.crc32(told.encode())) >> 8


def facts_to(facts: Facts) -> str:
    """As text, for the key-value store."""
    return json.dumps({**asdict(facts), "moved": list(facts.moved)}, default=str)


def facts_from(text: str) -> Facts:
    """The inverse of :func:`facts_to`."""
    read = json.loads(text)
    return Facts(**{**read, "settings": tuple(map(tuple, read["settings"])), "moved": bytes(read["moved"])})


def in_which_they_differ(
    ranks: Sequence[int], found: Mapping[int, Facts], names: Sequence[str], labels: Sequence[str]
) -> str:
    """The difference between ranks, as a message for all of them.

    Args:
        ranks: those that must do the same.
        found: what those did that have said it.
        names: what the hyperparameters are called.
        labels: what the tensors are called that all hold alike.

    Example:
        >>> facts = {0: Facts(7, ((0.1,),)), 1: Facts(7, ((0.1,),)), 2: Facts(7, ((0.2,),))}
        >>> print(in_which_they_differ([0, 1, 2], facts, ["lr"], []).splitlines()[1])
          lr of param group 0 is 0.2 on ranks [2], and 0.1 on ranks [0, 1]
    """
    by_digest: dict[int, list[int]] = {}
    for rank in sorted(found):
        by_digest.setdefault(found[rank].digest, []).append(rank)
    (digest, most), *_ = sorted(by_digest.items(), key=lambda each: (-len(each[1]), each[1][0]))
    lines = [f"ranks {in_words(ranks)} must take the same steps of SM3 with the same settings, but"]
    for other, odd in by_digest.items():
        if other != digest:
            lines.append(f"  {_difference(found[odd[0]], odd, found[most[0]], most, names, labels)}")
    if len(by_digest) == 1 and len(found) == len(ranks):  # what the facts do not have
        lines.append("  a learning rate, which is a tensor on the GPU, is not the same on all of them")
    silent = [rank for rank in ranks if rank not in found]
    if silent:
        lines.append(f"  ranks {in_words(silent)} have not said what they did; see their logs")
    return "\n".join(lines)


def _difference(
    a: Facts, odd: Sequence[int], b: Facts, most: Sequence[int], names: Sequence[str], labels: Sequence[str]
) -> str:
    here, there = f"ranks {in_words(odd)}", f"ranks {in_words(most)}"
    if a.event != b.event:
        if not a.event:
            a, b, here, there = b, a, there, here
        return f"{here} {a.event} in step number {a.call}, and {there} did not. {a.words}"
    if a.call != b.call:
        return (
            f"{here} came to the exchange in call number {a.call} of step(), and {there} in call number {b.call}: "
            "step() was left out, or raised an error that was caught, on some of them alone"
        )
    if a.discarded != b.discarded:
        return (
            f"up to step number {a.call} {here} threw gradients away {a.discarded} times (zero_grad() without a "
            f"step() before it), and {there} {b.discarded} times: step() was left out on some of them alone"
        )
    for g, (mine, theirs) in enumerate(zip(a.settings, b.settings, strict=False)):
        for name, x, y in zip(names, mine, theirs, strict=True):
            if repr(x) != repr(y):
                return f"{name} of param group {g} is {x} on {here}, and {y} on {there}"
    for label, x, y in zip(labels, a.moved, b.moved, strict=False):
        if x != y:
            return (
                f"in step number {a.call} {label} has {'a' if x else 'no'} gradient on {here}, and "
                f"{'a' if y else 'no'} gradient on {there}, which hold the same part of it"
            )
    return f"{here} have {len(a.settings)} param groups, and {there} {len(b.settings)}"
