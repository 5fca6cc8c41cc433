"""Batches: which bytes the model sees at which step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.job.world import UserError

IGNORED = -100  # a target that cross-entropy does not count


@dataclass(frozen=True)
class Share:
    """The part of every batch that falls to this rank: the ``index``-th of ``count`` equal parts."""

    index: int = 0
    count: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of a batch."""
        return rows.tensor_split(self.count)[self.index]


@dataclass(frozen=True)
class Batches:
    """Random windows of the training bytes.

    A batch is a function of seed and step alone: it is the same however many ranks share it, and a run that resumes at
    step ``n`` needs to remember nothing but ``n``.

    Args:
        data: uint8, 1-D, at least ``seq_len + 1`` bytes.
        batch_size: windows in a batch, over all ranks.
        seq_len: bytes that the model reads in a window; the one after each is to be predicted.
        seed: which of the possible orders.
        share: this rank's part.

    Example:
        >>> data = torch.arange(100, dtype=torch.uint8)
        >>> whole = Batches(data, batch_size=4, seq_len=8, seed=0)
        >>> half = Batches(data, batch_size=4, seq_len=8, seed=0, share=Share(index=1, count=2))
        >>> inputs, targets = whole[7]
        >>> inputs.shape, bool((targets == inputs + 1).all()), bool((half[7][0] == inputs[2:]).all())
        (torch.Size([4, 8]), True, True)
    """

    data: Tensor
    batch_size: int
    seq_len: int
    seed: int
    share: Share = Share()

    def __post_init__(self) -> None:
        if self.batch_size % self.share.count:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared evenly by {self.share.count} data-parallel ranks; "
                f"make it a multiple of {self.share.count}"
            )
        check_length(self.data, self.seq_len, "learn from")

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's inputs and targets of ``step``, int64, each ``(batch_size / ranks, seq_len)``."""
        chance = random.Random(f"{self.seed} {step}")
        starts = [chance.randrange(len(self.data) - self.seq_len) for _ in range(self.batch_size)]
        rows = self.share.of(torch.tensor(starts)[:, None])
        windows = self.data[rows + torch.arange(self.seq_len + 1)].long()
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Passage:
    """All of the held-out bytes, once, in windows that follow one another.

    Every byte but the first is predicted once, from the bytes before it in its window, at least one. Every rank gets
    equally many batches, as the collectives of a sharded model require: targets that do not count fill up the end.

    Args:
        data: uint8, 1-D, at least ``seq_len + 1`` bytes.
        batch_size: windows in a batch, over all ranks; a multiple of ``share.count``.
        seq_len: bytes that the model reads in a window.
        share: this rank's part.
    """

    data: Tensor
    batch_size: int
    seq_len: int
    share: Share = Share()

    def __post_init__(self) -> None:
        check_length(self.data, self.seq_len, "hold out")

    def __len__(self) -> int:
        """How many batches there are, the same on every rank."""
        return -(-(len(self.data) - 1) // (self.batch_size * self.seq_len))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's inputs and targets, int64, each ``(batch_size / ranks, seq_len)``."""
        size = self.batch_size * self.seq_len
        for start in range(0, len(self.data) - 1, size):
            inputs = self.data[start : start + size].long()
            targets = self.data[start + 1 : start + 1 + size].long()
            inputs = torch.nn.functional.pad(inputs, (0, size - len(inputs)))
            targets = torch.nn.functional.pad(targets, (0, size - len(targets)), value=IGNORED)
            yield self.share.of(inputs.view(-1, self.seq_len)), self.share.of(targets.view(-1, self.seq_len))


def check_length(data: Tensor, seq_len: int, purpose: str) -> None:
    if len(data) <= seq_len:
        raise UserError(
            f"--seq-len {seq_len} needs at least {seq_len + 1} bytes to {purpose}, and there are {len(data)} for that; "
            "pass a shorter --seq-len or more --data"
        )
