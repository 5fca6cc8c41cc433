"""Accumulators of which the state holds another part than this rank works on, because edges of shards cut blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sm3_dist.layout.describe import local_tensor
from sm3_dist.layout.shard import LocalShard
from sm3_dist.ranks.chunk_exchange import Lending


class CutCover:
    """A working copy of one accumulator, beside the state.

    Args:
        held: the state tensor, a DTensor.
        step: the step counter of the same parameter, of which every rank has one.
        shard: what this rank holds of the parameter.
        i: which accumulator it is.

    Attributes:
        working: this rank's rectangle of the grid, of shape ``shard.stored[i].shape``.
        fresh: whether the working copy is yet to be told what the states of other ranks hold.
    """

    def __init__(self, held: Tensor, step: Tensor, shard: LocalShard, i: int) -> None:
        chunk = shard.chunks[i]
        assert chunk is not None
        self.held, self.chunk, self.stored = held, chunk, shard.stored[i]
        self._step = step
        self._visible = local_tensor(held)
        self.working = torch.zeros(self.stored.shape, dtype=held.dtype, device=self._visible.device)
        self.read()

    def read(self) -> None:
        """Take from the state what this rank's part of it tells. The rest is other ranks' to send."""
        self.working.zero_()
        common = self.chunk.box & self.stored
        if common.numel:
            self.working[common.within(self.stored)] = self._visible[common.within(self.chunk.box)]
        self.fresh = True
        self.note()

    def publish(self) -> None:
        """Write into the state what this rank has of its part of it."""
        common = self.chunk.box & self.stored
        if common.numel:
            self._visible[common.within(self.chunk.box)] = self.working[common.within(self.stored)]

    def note(self) -> None:
        """Remember the state as it is now: all that was done to it was done by the optimizer."""
        self._seen = self._versions()

    def edited(self) -> bool:
        """Whether somebody else wrote into the state since."""
        # Who loads in place writes steps too, and those on every rank; of a chunk a rank may hold nothing.
        return self._seen != self._versions()

    def is_good_for(self, held: Tensor, step: Tensor) -> bool:
        """Whether this is the working copy of what this state holds now. It may have been moved."""
        if held is not self.held or self.edited():
            return False
        visible, self._step = local_tensor(held), step
        if visible.data_ptr() != self._visible.data_ptr() and not torch.equal(visible, self._visible):
            return False
        self._visible = visible
        self.note()
        return True

    def lending(self) -> Lending | None:
        """What is to be exchanged with ranks that work on entries which this rank's state holds, or the other way."""
        elsewhere = self.chunk.elsewhere
        if elsewhere is None:
            return None
        return Lending(self.working, self.stored, self._visible, self.chunk.box, elsewhere, self.edited)

    def _versions(self) -> tuple[int, int, int]:
        # An operation on a DTensor is counted there, and one on its local tensor there.
        return self.held._version, self._visible._version, self._step._version


def cut_covers(
    state: Mapping[str, Any], shard: LocalShard, keys: Sequence[str], older: Mapping[int, CutCover]
) -> list[CutCover | None]:
    """For each accumulator its working copy, if the state holds another part than this rank works on.

    Args:
        state: of the parameter.
        shard: what this rank holds of it.
        keys: the names of the accumulators in the state.
        older: working copies made before, by ``id`` of the state tensor; they are good as long as nobody edits that.
    """
    covers: list[CutCover | None] = []
    for i, (key, chunk) in enumerate(zip(keys, shard.chunks, strict=True)):
        cover = None
        if chunk is not None:
            cover = older.get(id(state[key]))
            if cover is None or not cover.is_good_for(state[key], state["step"]):
                cover = CutCover(state[key], state["step"], shard, i)
        covers.append(cover)
    return covers
