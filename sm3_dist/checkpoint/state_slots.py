"""The slots of SM3's state: what this rank holds of each value that is saved of a tensor, under its canonical key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sm3_dist.checkpoint.slots import Slot
from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import grid
from sm3_dist.layout.shard import WHOLE, LocalShard, accumulator_dtype
from sm3_dist.maths.momentum_code import momentum_key
from sm3_dist.step.entry import Entry
from sm3_dist.step.state import State, accumulator_key, held_accumulators, step_device

SCALAR = Box((), ())


def slots_of(entry: Entry, state: State) -> dict[str, Slot]:
    """What this rank holds of the state of one original tensor."""
    shard, flat = entry.shard, not (entry.shard.layout == WHOLE or isinstance(entry.param, DTensor))
    speaks, scalar = not flat or shard.numel > 0 or 0 in shard.shape, entry.param.dim() == 0
    # One for all tensors of a flattened parameter, which may have taken different numbers of steps elsewhere.
    step = state["step"].clone() if flat else state["step"]
    slots = {"step": Slot((), [SCALAR], [step], step, not flat, speaks, shard.ranks)}
    for i, part in enumerate(held_accumulators(state, shard)):
        shape, held = _canonical(shard, i)
        slots[f"accumulator_{i}"] = _slot(shape, [held], [part], state[accumulator_key(shard, i)], shard, scalar)
    if entry.momentum_buffer is not None:
        parts, key = shard.state_views(entry.momentum_buffer), momentum_key(entry.momentum_buffer.dtype)
        slots[key] = _slot(shard.shape, shard.boxes, parts, state[key], shard, scalar)
    if entry.squares is not None:
        average = entry.squares.average
        slots["update_square_average"] = Slot((), [SCALAR], [average], average, not flat, speaks, shard.ranks)
    return slots


def absent_slots(
    param: Tensor,
    shard: LocalShard,
    group: Mapping[str, Any],
    momentum_dtype: torch.dtype | None,
    ranks: tuple[int, ...],
) -> dict[str, Slot]:
    """The slots of a tensor of which this rank holds no state at all."""
    like = param.new_empty(0, dtype=accumulator_dtype(param.dtype), requires_grad=False)
    step = torch.empty(0, dtype=torch.float32, device=step_device(param))
    forms: dict[str, tuple[tuple[int, ...], Tensor]] = {"step": ((), step)}
    for i in range(shard.accumulator_count):
        forms[f"accumulator_{i}"] = (_canonical(shard, i)[0] if param.dim() else (), like)
    if group["momentum"] > 0:
        dtype = momentum_dtype or like.dtype
        forms[momentum_key(dtype)] = (tuple(param.shape), like.to(dtype))
    if group["update_rms"] is not None:
        forms["update_square_average"] = ((), like.to(torch.int64))
    return {key: Slot(shape, [], [], tensor, whole=False, ranks=ranks) for key, (shape, tensor) in forms.items()}


def _canonical(shard: LocalShard, i: int) -> tuple[tuple[int, ...], Box]:
    """Canonical shape of accumulator ``i``, and the box of it that this rank's state holds."""
    shape, held = grid(shard.shape, i, shard.cover_block), shard.held[i]
    if shard.cover_block is not None:
        return shape, held
    # Whole slices: a vector. The other dimensions have one cover set each, if this rank holds anything.
    return (shape[i],), Box(held.start[i : i + 1], held.stop[i : i + 1] if held.numel else held.start[i : i + 1])


def _slot(
    shape: tuple[int, ...],
    boxes: Sequence[Box],
    parts: Sequence[Tensor],
    tensor: Tensor,
    shard: LocalShard,
    scalar: bool,
) -> Slot:
    held = [(box, part.view(box.shape)) for box, part in zip(boxes, parts, strict=True) if box.numel]
    if scalar:  # counts as a vector of one element everywhere else
        shape, held = (), [(SCALAR, part.view(())) for _, part in held]
    whole = shard.layout == WHOLE or isinstance(tensor, DTensor)
    return Slot(shape, [box for box, _ in held], [part for _, part in held], tensor, whole, ranks=shard.ranks)
