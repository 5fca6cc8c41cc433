"""What a model will need per rank, before anything is rented: reckoned from shapes, to the byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from sm3_dist.adapters.zero import Partition
from sm3_dist.box import Box, bounding, flat_boxes, overlaps
from sm3_dist.cover import touched
from sm3_dist.ranges import Range
from sm3_dist.shard import LocalShard, accumulator_dtype

WRAPPERS = ("none", "ddp", "fsdp2", "zero1")
"""One process, DistributedDataParallel, ``fully_shard`` over all ranks, ``SM3(shard_over=)`` over all ranks."""

_STEP, _SQUARE_SUM = 4, 8


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank between two steps.

    Attributes:
        weights: what the rank holds of the weights.
        gradients: as much of the gradients, once backward is through. With ``step_in_backward`` they are freed as they
            come, and it is the largest module's (FSDP2) or parameter's that counts.
        state: of SM3: accumulators, momentum, step counts, and what ``update_rms`` keeps.
        sent: the buffer of maxima that is reduced in each step.
        adam_moments: the two moments that Adam would hold in place of ``state``, in the type of the weights.
    """

    weights: int
    gradients: int
    state: int
    sent: int
    adam_moments: int


def plan(
    module: nn.Module,
    *,
    world: int = 1,
    wrapper: str = "none",
    momentum: float = 0.0,
    momentum_dtype: torch.dtype | None = None,
    update_rms: float | None = None,
    cover_block: int | None = None,
) -> list[RankBytes]:
    """What each rank holds of a model that trains with SM3, exactly; activations and gathered weights come on top.

    Args:
        module: the model as it is before any wrapper; on the meta device it takes no memory.
        world: number of ranks.
        wrapper: ``"none"``, ``"ddp"``, ``"fsdp2"`` (or HSDP, with the number of ranks of one replica for ``world``), or
            ``"zero1"``.
        momentum: as for :class:`sm3_dist.SM3`, and so are the others; all parameters are in one param group.
        momentum_dtype: see there.
        update_rms: see there.
        cover_block: see there.

    Returns:
        for each rank its bytes.

    Raises:
        ValueError: for another wrapper, for several ranks without any, and for fewer than 1.

    Example:
        >>> import torch, sm3_dist
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096, dtype=torch.bfloat16)
        >>> first, second = sm3_dist.plan(model, world=2, wrapper="fsdp2")
        >>> first
        RankBytes(weights=16781312, gradients=16781312, state=32776, sent=16384, adam_moments=33562624)
    """
    if wrapper not in WRAPPERS:
        raise ValueError(f"wrapper must be one of {', '.join(map(repr, WRAPPERS))}, but is {wrapper!r}")
    if world < 1 or (wrapper == "none" and world > 1):
        raise ValueError(f"{world} ranks with wrapper={wrapper!r}: name how they share the work, or take world=1")
    kept = {p.dtype: accumulator_dtype(p.dtype).itemsize for p in module.parameters() if p.requires_grad}
    widest = max(kept.values(), default=0)  # accumulators of several types are sent in one buffer
    parts: list[list[RankBytes]] = [[RankBytes(0, 0, 0, 0, 0)] for _ in range(world)]
    for param, held in _cut(module, wrapper, world):
        shards = [
            LocalShard(tuple(param.shape) or (1,), boxes, extent=extent, cover_block=cover_block)
            for boxes, extent in held
        ]
        shared = [box for i in range(shards[0].accumulator_count) for box in _shared(shards, i, wrapper)]
        for part, shard in zip(parts, shards, strict=True):
            weights = param.element_size() * (shard.numel if wrapper == "fsdp2" else param.numel())
            if not param.requires_grad:
                part.append(RankBytes(weights, 0, 0, 0, 0))
                continue
            state = _STEP + kept[param.dtype] * sum(stored.numel for stored in shard.stored)
            if momentum > 0:
                state += shard.numel * (momentum_dtype.itemsize if momentum_dtype else kept[param.dtype])
            if update_rms is not None:
                state += _SQUARE_SUM
            sent = widest * sum(box.numel for box in shared)
            part.append(RankBytes(weights, weights, state, sent, 2 * param.element_size() * shard.numel))
    return [RankBytes(*map(sum, zip(*map(astuple, part), strict=True))) for part in parts]


Held = tuple[tuple[Box, ...], Box]
"""The boxes that a rank updates, and their extent."""


def _cut(module: nn.Module, wrapper: str, world: int) -> Iterator[tuple[Tensor, list[Held]]]:
    """Each parameter with what every rank updates of it."""
    params = list(module.parameters())
    if wrapper != "zero1":
        for param in params:
            whole = Box.whole(tuple(param.shape) or (1,))
            rows = -(-whole.stop[0] // world)  # as torch.chunk cuts
            cut = wrapper == "fsdp2"
            boxes = [whole.along(0, r * rows, (r + 1) * rows) if cut else whole for r in range(world)]
            yield param, [((box,) if box.numel else (), box) for box in boxes]
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in params:
        if param.requires_grad:
            alike.setdefault((param.dtype, param.device), []).append(param)
        else:
            yield param, [_range(param, (0, 0))] * world
    for trained in alike.values():
        partition = Partition(trained, world)
        for index, each in enumerate(trained):
            yield each, [_range(each, elements) for elements in partition.ranges(index)]


def _range(param: Tensor, elements: Range) -> Held:
    shape = tuple(param.shape) or (1,)
    boxes = flat_boxes(shape, *elements)
    return tuple(boxes), bounding(boxes, len(shape))


def _shared(shards: Sequence[LocalShard], i: int, wrapper: str) -> tuple[Box, ...]:
    """The entries of accumulator ``i`` that several ranks touch, where they do not compute the same thing."""
    if wrapper in ("none", "ddp") or (wrapper == "fsdp2" and i == 0):
        return ()
    holding = [shard for shard in shards if wrapper == "fsdp2" or shard.boxes]
    return overlaps([touched(shard.extent, i, shard.cover_block) for shard in holding])
