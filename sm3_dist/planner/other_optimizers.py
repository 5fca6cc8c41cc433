"""What other optimizers hold, by formula: on each rank, of the pieces that SM3 would have."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from torch import nn

from sm3_dist.layout.box import Box
from sm3_dist.planner.planning import RankBytes, check_plan
from sm3_dist.planner.rank_shards import REPLICATED, rank_shards

_FLOAT = 4
_QUANTIZED, _SMALL = 256, 4096


def adamw(elements: int, extent: Box, shape: tuple[int, ...]) -> int:
    """Two float32 moments of every element."""
    return 2 * _FLOAT * elements


def adamw_8bit(elements: int, extent: Box, shape: tuple[int, ...]) -> int:
    """Two moments of a byte per element and a float32 scale per 256; float32 in tensors of fewer than 4096."""
    if math.prod(shape) < _SMALL:
        return adamw(elements, extent, shape)
    return 2 * (elements + _FLOAT * -(-elements // _QUANTIZED))


def adafactor(elements: int, extent: Box, shape: tuple[int, ...]) -> int:
    """A float32 average per row and per column that the rank holds some of; no momentum; of vectors every element."""
    if len(shape) < 2:
        return _FLOAT * elements
    *matrices, rows, columns = extent.shape
    return _FLOAT * math.prod(matrices) * (rows + columns) if elements else 0


RIVALS: dict[str, Callable[[int, Box, tuple[int, ...]], int]] = {
    "adamw": adamw,
    "adamw-8bit": adamw_8bit,
    "adafactor": adafactor,
}
"""Bytes of state of the elements that a rank updates, of their extent, in a tensor of that shape."""


def rival(
    name: str,
    module: nn.Module,
    *,
    world: int = 1,
    wrapper: str = "none",
    replicas: int = 2,
    units: Collection[nn.Module] = (),
    tensor_parallel: Mapping[str, int] | None = None,
) -> list[RankBytes]:
    """What each rank holds with another optimizer, with float32 weights as in mixed precision.

    Gradients are float32 too. Not every one of these works under every wrapper: the bytes are those that it would hold
    if it did.

    Args:
        name: one of :data:`RIVALS`.
        module: see :func:`sm3_dist.plan` for this and all others.
        world: number of ranks.
        wrapper: how they share the work.
        replicas: for HSDP.
        units: what is wrapped one by one.
        tensor_parallel: for ``"tp"``.

    Returns:
        for each rank its bytes; nothing is sent.

    Raises:
        ValueError: as :func:`sm3_dist.plan` does.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024, bias=False)
        >>> [rival(name, model)[0].state for name in RIVALS]
        [8388608, 2129920, 8192]
    """
    check_plan(module, world, wrapper, replicas, tensor_parallel)
    copies = replicas if wrapper == "hsdp" else 1
    weights, gradients, state = ([0] * (world // copies) for _ in range(3))
    for piece in rank_shards(module, wrapper, world // copies, units, tensor_parallel):
        shape = tuple(piece.param.shape) or (1,)
        for rank, (boxes, extent) in enumerate(zip(piece.boxes, piece.extents, strict=True)):
            elements = sum(box.numel for box in boxes) + (piece.padding[rank] if piece.padding else 0)
            kept = _FLOAT * (piece.param.numel() if wrapper in REPLICATED else elements)
            weights[rank] += kept
            if piece.param.requires_grad:
                gradients[rank] += kept
                state[rank] += RIVALS[name](elements, extent, shape)
    return [RankBytes(w, g, s, 0, 0) for w, g, s in zip(weights, gradients, state, strict=True)] * copies
