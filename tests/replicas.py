"""Replicated parameters trained with ``shard_over`` beside one process: the comparison, to the last bit."""

import hashlib
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sm3_dist import SM3
from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import grid
from sm3_dist.layout.shard import LocalShard
from sm3_dist.ranks import weight_gather

WORLDS = [2, 3, 4]
BUCKETING: dict[str, dict[str, Any]] = {
    "one-bucket": {"BUCKET_BYTES": weight_gather.BUCKET_BYTES},
    "small-buckets": {"BUCKET_BYTES": 300, "IN_PLACE_BYTES": 40},  # some in place and some packed
    "in-place": {"BUCKET_BYTES": 300, "IN_PLACE_BYTES": 1},
    "all-gather": {"Broadcasts": weight_gather.Gather},  # as on a GPU; gloo can do it too
    "small-all-gathers": {"Broadcasts": weight_gather.Gather, "BUCKET_BYTES": 300},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"beta": 0.95, "weight_decay": 0.1},
    {"momentum": 0.9, "beta": 0.95, "maximize": True, "bias_correction": True, "nesterov": True},
    {"momentum": 0.9, "beta": 0.95, "update_rms": 0.2},
    {"momentum": 0.9, "cover_block": 2},
    {"momentum": 0.9, "beta": 0.95, "cover_block": 2, "cover_product": True, "update_rms": 0.2},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "stochastic_rounding": True},
]
# Odd and even, longer and shorter than any world, scalar, empty, of every number of dimensions from 0 to 5.
SHAPES: list[tuple[int, ...]] = [
    (3, 5),
    (7,),
    (),
    (8, 4),
    (6, 4, 3),
    (0, 3),
    (1, 9),
    (9, 1),
    (4, 1, 2, 1, 3),
    (40, 6),
    (1,),
]


def params_of(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def copies(params: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters of the same values, contiguous."""
    return [nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format)) for param in params]


def gradient(step: int, number: int, param: Tensor) -> Tensor | None:
    """The gradient in a step, the same on every rank. Some are None now and then, number 4 always."""
    if (step + number) % 4 == 3 or number == 4:
        return None
    generator = torch.Generator().manual_seed(100 * step + number)
    grad = torch.randn(param.shape, generator=generator) * 10.0 ** (number % 3 - 1)
    return grad.to(param.dtype)


def give(params: Sequence[Tensor], step: int) -> None:
    for number, param in enumerate(params):
        param.grad = gradient(step, number, param)


def assert_same(
    params: Sequence[Tensor], whole: Sequence[Tensor], sharded: SM3, alone: SM3, where: object = ""
) -> None:
    """Compare the weights, and what this rank stores with the part of it in the whole state."""
    stepped = [param for param in params if param in sharded.state]
    shards = {entry.param: entry.shard for entry in sharded._current_plan().entries}
    for number, (param, weight) in enumerate(zip(params, whole, strict=True)):
        assert torch.equal(param, weight), f"{where}: weight {number} of shape {tuple(weight.shape)}"
    for param in stepped:
        weight = whole[next(i for i, p in enumerate(params) if p is param)]
        assert_same_state(sharded.state[param], alone.state[weight], weight, shards[param])


def assert_same_state(held: dict[str, Any], state: dict[str, Any], weight: Tensor, shard: LocalShard) -> None:
    assert held.keys() == state.keys()
    assert held["step"] == state["step"]
    for i, rectangle in enumerate(shard.stored):
        whole = Box.whole(grid(shard.shape, i, shard.cover_block))
        expected = state[f"accumulator_{i}"].view(whole.shape)[rectangle.within(whole)]
        assert torch.equal(held[f"accumulator_{i}"].view(rectangle.shape), expected), (shard, i)
    if "update_square_average" in held and shard.boxes:
        assert held["update_square_average"] == state["update_square_average"]
    if "momentum_buffer" in held:
        moments = shard.views(state["momentum_buffer"])
        assert held["momentum_buffer"].numel() == shard.numel
        assert torch.equal(held["momentum_buffer"], torch.cat([m.reshape(-1) for m in moments] or [torch.zeros(0)]))


def digest(params: Sequence[Tensor]) -> str:
    data = b"".join(
        p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in params if p.numel() and p.dim()
    )
    return hashlib.sha256(data).hexdigest()


def assert_replicas(digests: list[Any]) -> None:
    assert len(set(digests)) == 1, "the replicas differ"


def train_beside_one_process(params: Sequence[nn.Parameter], bucketing: dict[str, Any], **keywords: Any) -> str:
    """Train ``params`` with, and copies of them without, ``shard_over``, ``weight_gather`` having these attributes."""
    keywords = {"shard_over": dist.group.WORLD, **keywords}
    alone_keywords = {k: v for k, v in keywords.items() if k not in ("shard_over", "shard_covers")}
    whole = copies(params)
    sharded, alone = SM3(params, **keywords), SM3(whole, **alone_keywords)
    with patch.multiple(weight_gather, **bucketing):
        for step in range(5):
            give(params, step)
            give(whole, step)
            sharded.step()
            alone.step()
            assert_same(params, whole, sharded, alone, where=(step, keywords))
    return digest(params)
