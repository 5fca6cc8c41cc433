"""Slots: what a rank holds of a value of a state dict, and how such values are put together and taken apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sm3_dist.checkpoint.boxed import BoxedTensor, holders
from sm3_dist.compat import same_placements
from sm3_dist.layout.box import Box
from sm3_dist.layout.describe import local_tensor

Boxes = list[Box]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Slot:
    """One value of a state dict, and what this rank holds of it.

    Attributes:
        shape: canonical shape of the whole value.
        boxes: what this rank holds, non-empty boxes in canonical coordinates.
        parts: for each box its elements, views of what the model or the optimizer holds.
        tensor: what it is held in.
        whole: whether that has the canonical shape already, as whole tensors and DTensors have.
        ranks: the ranks that hold it together, where they hold parts; all ranks if none are given.
        speaks: whether what this rank holds is to be relied on. Not so for scalars where it holds no elements,
            and others do.
    """

    shape: tuple[int, ...]
    boxes: Boxes
    parts: list[Tensor]
    tensor: Tensor
    whole: bool
    speaks: bool = True
    ranks: tuple[int, ...] = ()

    def copied(self) -> Slot:
        """A copy of what this rank holds."""
        return replace(self, parts=[part.clone() for part in self.parts], tensor=self.tensor.clone())


def values(slots: Mapping[Key, Slot]) -> dict[Key, Tensor]:
    """The values: live tensors and DTensors, and where a rank holds boxes :class:`BoxedTensor` with views of them.

    A collective over the ranks that hold parts of the same slots; none for those that are whole.
    """
    cut: dict[tuple[int, ...], dict[Key, Boxes]] = defaultdict(dict)
    for key, slot in slots.items():
        if not slot.whole:
            cut[slot.ranks][key] = slot.boxes if slot.speaks else []
    pieces: dict[Key, list[tuple[Box, bool]]] = {}
    for ranks in sorted(cut, key=lambda ranks: (len(ranks), ranks)):  # smaller sets lie within larger ones
        pieces |= _share_out(cut[ranks], ranks)
    result: dict[Key, Tensor] = {}
    for key, slot in slots.items():
        if slot.whole:
            result[key] = slot.tensor
        elif 0 in slot.shape:  # nobody holds any of it, and everybody knows all of it
            result[key] = slot.tensor.new_zeros(slot.shape)
        else:
            result[key] = _boxed(slot, pieces[key] or [(box, False) for box in slot.boxes])
    return result


def _boxed(slot: Slot, pieces: Sequence[tuple[Box, bool]]) -> BoxedTensor:
    """The pieces of a slot as a tensor; pieces lie in the slot's boxes."""
    held = [
        (piece, part[piece.within(box)], owned)
        for piece, owned in pieces
        for box, part in zip(slot.boxes, slot.parts, strict=True)
        if (piece & box) == piece
    ]
    boxes, parts, owned = zip(*held, strict=True) if held else ((), (), ())
    return BoxedTensor(slot.shape, boxes, parts, owned, slot.tensor.dtype, slot.tensor.device, slot.ranks)


def _share_out(held: dict[Key, Boxes], ranks: Sequence[int]) -> dict[Key, list[tuple[Box, bool]]]:
    """Cut what this rank holds into pieces that it owns and pieces that a lower rank owns.

    Each entry is owned by the lowest rank that holds it, so that it is written once. A collective over these ranks.
    """
    below: dict[Key, Boxes] = defaultdict(list)
    group = holders(ranks)
    if group is not None and dist.get_world_size(group) > 1:
        everyone: list[dict[Key, Boxes]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(everyone, {at: boxes for at, boxes in held.items() if boxes}, group=group)
        for theirs in everyone[: dist.get_rank(group)]:
            for at, boxes in theirs.items():
                below[at] += boxes
    return {at: [piece for box in boxes for piece in _cut(box, below[at])] for at, boxes in held.items()}


def _cut(box: Box, others: Boxes) -> Iterator[tuple[Box, bool]]:
    mine = [box]
    for other in others:
        remaining = []
        for piece in mine:
            if (piece & other).numel:
                yield piece & other, False
            remaining += piece.without(other)
        mine = remaining
    yield from ((piece, True) for piece in mine)


class Reader:
    """Boxes of a loaded value, whatever holds it. Every rank makes one for each value, in the same order."""

    def __init__(self, value: Tensor, like: Tensor | None) -> None:
        if isinstance(value, DTensor):
            same = (
                isinstance(like, DTensor)
                and like.device_mesh == value.device_mesh
                and same_placements(like.placements, value.placements)
            )
            # Of the same layout: the box that is asked for is what this rank holds. If not: a collective.
            self._local = local_tensor(value) if same else None
            self._value = value if same else value.full_tensor()
        else:
            self._local, self._value = None, value

    def read(self, box: Box) -> Tensor:
        """The elements of a box that this rank holds."""
        if self._local is not None:
            return self._local.reshape(box.shape)
        if isinstance(self._value, BoxedTensor):
            return self._value.read(box)
        return self._value[tuple(map(slice, box.start, box.stop))]
