"""Whole optimizer steps on flat tensors that are cut anywhere, against one step of whole tensors, to the last bit.

No wrapper and no process group: one process plays every rank in turn, and takes the maxima of what they share by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sm3_dist import SM3, kernels
from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import grid
from sm3_dist.layout.flat import shard_of
from sm3_dist.layout.flat_metadata import FlatTensor, Original
from sm3_dist.layout.shard import LocalShard, Peers
from sm3_dist.step.entry import Entry
from sm3_dist.step.param_groups import settings_of
from sm3_dist.step.state import fill_state, held_accumulators


@dataclass(frozen=True)
class Piece:
    """An original tensor, and how many elements of padding lie before it."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    padding: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    shape = draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    return Piece(shape, draw(st.permutations(range(len(shape))).map(tuple)), draw(st.integers(0, 3)))


options = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.9]),
        "beta": st.sampled_from([0.0, 0.95]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "cover_block": st.sampled_from([None, 2]),
    }
)


class Rank:
    """What one rank holds of the flat tensor, with its state."""

    def __init__(self, flat: Tensor, originals: list[Original], part: int, peers: Peers, rank: int, group: Any) -> None:
        self.range = slice(rank * part, (rank + 1) * part)
        self.param = nn.Parameter(flat[self.range].clone())
        tensor = FlatTensor(self.param, tuple(originals), part, peers, rank, "a test")
        self.shards = [shard_of(tensor, original, group["cover_block"]) for original in originals]
        state: dict[str, Any] = {}
        fill_state(state, self.param, self.shards, group, momentum_dtype=None)
        self.momentum = state.get("momentum_buffer")
        self.entries = [
            Entry(
                self.param,
                group,
                shard,
                held_accumulators(state, shard),
                self.momentum,
                state["step"],
                None,
                shard.name,
            )
            for shard in self.shards
        ]

    def step(self, grad: Tensor | None) -> None:
        self.param.grad = None if grad is None else grad[self.range].clone()
        group = self.entries[0].group
        with torch.no_grad():
            for work in kernels.launch_list(self.entries, "auto"):
                work.update({id(group): settings_of(group, None)})


def share(ranks: list[Rank]) -> None:
    """Overwrite every shared entry with the maximum over the ranks that store it."""
    for k, entry in enumerate(ranks[0].entries):
        for i, shared in enumerate(entry.shard.shared):
            for region in shared.regions if shared is not None else ():
                parts = [(rank.entries[k], region & rank.shards[k].stored[i]) for rank in ranks]
                total = torch.zeros(region.shape)
                for other, held in parts:
                    there = total[held.within(region)]
                    there.copy_(torch.maximum(there, _of(other, i, held)))
                for other, held in parts:
                    _of(other, i, held).copy_(total[held.within(region)])


def _of(entry: Entry, i: int, held: Box) -> Tensor:
    return entry.accumulators[i][held.within(entry.shard.stored[i])] if held.numel else torch.zeros(held.shape)


def flatten(tensors: list[Tensor], contents: list[Piece], size: int) -> Tensor:
    """One after another, in the order of memory, with padding that must never be looked at."""
    flat, position = torch.full((size,), math.nan), 0
    for tensor, piece in zip(tensors, contents, strict=True):
        position += piece.padding
        flat[position : position + piece.numel] = tensor.permute(piece.order).flatten()
        position += piece.numel
    return flat


@given(st.lists(pieces(), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3), options, st.integers(0, 99))
def test_flat_steps_equal_whole_steps(
    contents: list[Piece], world: int, extra: int, given: dict[str, Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.randn(piece.shape, generator=generator)) for piece in contents]
    alone = SM3(weights, lr=0.3, **given)
    ends = list(accumulate(piece.padding + piece.numel for piece in contents))
    originals = [
        Original(str(k), piece.shape, end - piece.numel, order=piece.order or None)
        for k, (piece, end) in enumerate(zip(contents, ends, strict=True))
    ]
    part = -(-ends[-1] // world) + extra
    size = part * world
    start = flatten([weight.detach() for weight in weights], contents, size)
    peers = Peers(tuple(range(world)), group=lambda: None)  # type: ignore[arg-type, return-value]
    group = alone.param_groups[0]
    ranks = [Rank(start, originals, part, peers, rank, group) for rank in range(world)]
    for step in range(4):
        grads = [torch.randn(piece.shape, generator=generator) for piece in contents] if step != 2 else None
        for k, weight in enumerate(weights):
            weight.grad = grads[k].clone() if grads else None
        alone.step()
        for rank in ranks:
            rank.step(flatten(grads, contents, size) if grads else None)
        share(ranks)
    result = torch.cat([rank.param.detach() for rank in ranks])
    assert torch.equal(
        result.nan_to_num(), flatten([weight.detach() for weight in weights], contents, size).nan_to_num()
    )
    for rank in ranks:
        for weight, entry in zip(weights, rank.entries, strict=True):
            for i, (accumulator, stored) in enumerate(zip(entry.accumulators, entry.shard.stored, strict=True)):
                outer = grid(entry.shard.shape, i, given["cover_block"])
                expected = alone.state[weight][f"accumulator_{i}"].view(outer)[stored.within(Box.whole(outer))]
                assert torch.equal(accumulator, expected)
    assert_momentum(ranks, weights, alone)


def assert_momentum(ranks: list[Rank], weights: list[nn.Parameter], alone: SM3) -> None:
    for rank in ranks:
        for weight, shard in zip(weights, rank.shards, strict=True):
            if rank.momentum is not None:
                expected = boxes_of(alone.state[weight]["momentum_buffer"], shard)
                assert all(map(torch.equal, shard.state_views(rank.momentum), expected))


def boxes_of(tensor: Tensor, shard: LocalShard) -> list[Tensor]:
    return [tensor.view(shard.shape)[box.within(Box.whole(shard.shape))] for box in shard.boxes]


@given(st.lists(pieces(), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 3))
def test_the_parts_hold_every_element_once(contents: list[Piece], world: int, extra: int) -> None:
    ends = list(accumulate(piece.padding + piece.numel for piece in contents))
    part = -(-ends[-1] // world) + extra
    peers = Peers(tuple(range(world)), group=lambda: None)  # type: ignore[arg-type, return-value]
    positions = flatten_positions(contents, part * world)
    for k, (piece, end) in enumerate(zip(contents, ends, strict=True)):
        original = Original(str(k), piece.shape, end - piece.numel, order=piece.order or None)
        count = torch.zeros(original.shape or (1,), dtype=torch.int)
        for rank in range(world):
            tensor = FlatTensor(torch.empty(0), (original,), part, peers, rank, "a test")
            shard = shard_of(tensor, original)
            local = positions[rank * part : (rank + 1) * part]
            for box, view in zip(shard.boxes, shard.views(local), strict=True):
                at = box.within(Box.whole(shard.shape))
                count[at] += 1
                assert torch.equal(view, torch.arange(piece.numel).view(shard.shape)[at] + 1000 * k)
        assert (count == 1).all()


def flatten_positions(contents: list[Piece], size: int) -> Tensor:
    """Which element of which tensor lies at each position."""
    numbers = [torch.arange(piece.numel).view(piece.shape) + 1000.0 * k for k, piece in enumerate(contents)]
    return flatten(numbers, contents, size).nan_to_num(-1).long()
