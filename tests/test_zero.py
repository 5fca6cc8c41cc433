"""ZeRO-1: replicated parameters, each rank updating a range, must train as one process does, to the last bit."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from replicas import (
    BUCKETING,
    OPTIONS,
    WORLDS,
    assert_replicas,
    assert_same,
    copies,
    digest,
    give,
    params_of,
    train_beside_one_process,
)
from sampling import crossed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from launch.benchmarks.zero1 import bytes_sent
from sm3_dist import SM3
from sm3_dist.layout.shard import LocalShard
from sm3_dist.ranks import weight_gather


def trained(bucketing: dict[str, Any], options: dict[str, Any]) -> str:
    return train_beside_one_process(params_of(), bucketing, lr=0.3, **options)


@pytest.mark.sampled("world_size, bucketing, options", crossed(WORLDS, BUCKETING, range(len(OPTIONS))))
def test_equals_one_process(workers: Pool, world_size: int, bucketing: str, options: int) -> None:
    assert_replicas(workers(world_size).run(trained, BUCKETING[bucketing], OPTIONS[options]))


def two_elements_at_a_time() -> str:
    return train_beside_one_process(params_of([(5, 3), (4,), (2, 3, 2)]), {"BUCKET_BYTES": 8, "IN_PLACE_BYTES": 8})


@pytest.mark.parametrize("world_size", [1, 3])
def test_equals_one_process_two_elements_at_a_time(workers: Pool, world_size: int) -> None:
    assert_replicas(workers(world_size).run(two_elements_at_a_time))


def with_sharded_covers() -> str:
    return train_beside_one_process(params_of(), BUCKETING["one-bucket"], momentum=0.9, shard_covers=True)


@pytest.mark.parametrize("world_size", WORLDS)
def test_equals_one_process_with_sharded_covers(workers: Pool, world_size: int) -> None:
    assert_replicas(workers(world_size).run(with_sharded_covers))


def mixed_types(bucketing: dict[str, Any]) -> str:
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [p for kind in kinds for p in params_of([(5, 7), (3,), (4, 3, 5)], kind)]
    return train_beside_one_process(params[::2] + params[1::2], bucketing, momentum=0.9)


@pytest.mark.sampled("world_size, bucketing", crossed([2, 3], BUCKETING))
def test_types_mix(workers: Pool, world_size: int, bucketing: str) -> None:
    assert_replicas(workers(world_size).run(mixed_types, BUCKETING[bucketing]))


def converted(bucketing: dict[str, Any]) -> str:
    """Some are of another type from the third step on, though they were cut together."""
    params, whole = params_of(), params_of()
    sharded, alone = SM3.adamw_like(params, shard_over=dist.group.WORLD), SM3.adamw_like(whole)
    with patch.multiple(weight_gather, **bucketing):
        for step in range(5):
            for side, optimizer in ((params, sharded), (whole, alone)):
                for param in side[::2] if step == 2 else ():
                    param.data = param.data.bfloat16()
                give(side, step)
                optimizer.step()
            assert_same(params, whole, sharded, alone, where=step)
    return digest(params)


@pytest.mark.sampled("world_size, bucketing", crossed([2, 3], BUCKETING))
def test_types_may_change(workers: Pool, world_size: int, bucketing: str) -> None:
    assert_replicas(workers(world_size).run(converted, BUCKETING[bucketing]))


def removed() -> int:
    """How many of the parameters are sent after two of them have left the optimizer."""
    params = params_of([(5, 7), (3, 8), (4, 6)])
    optimizer = SM3.adamw_like([{"params": [param]} for param in params], shard_over=dist.group.WORLD)
    give(params, 0)
    optimizer.step()
    for param in params[::2]:
        del optimizer.param_groups[-1 if param is params[2] else 0], optimizer.state[param]
    give(params, 1)
    optimizer.step()
    gatherer = optimizer._current_plan().gatherer
    assert gatherer is not None
    return len({segment.param for bucket in gatherer.buckets for part in bucket for segment in part})


def test_what_was_removed_is_not_sent(workers: Pool) -> None:
    assert workers(2).run(removed) == [1, 1]


def strided(bucketing: dict[str, Any]) -> str:
    """Transposed, with gaps, channels last: the ranges are those of the tensors, whatever lies where in memory."""
    params = params_of([(9, 6), (5, 11), (4, 3, 2, 5), (10, 8)])
    transposed, gaps, channels_last, plain = (param.detach() for param in params)
    wide = torch.zeros(5, 40)
    wide[:, 3:36:3] = gaps
    strided = [transposed.t(), wide[:, 3:36:3], channels_last.contiguous(memory_format=torch.channels_last), plain]
    params = [nn.Parameter(tensor) for tensor in strided]
    assert [param.is_contiguous() for param in params] == [False, False, False, True]
    result = train_beside_one_process(params, bucketing, momentum=0.9, beta=0.9)
    assert wide[:, [0, 1, 2, 4, 5, 37]].count_nonzero() == 0
    return result


@pytest.mark.sampled("world_size, bucketing", crossed([2, 3], BUCKETING))
def test_parameters_need_not_be_contiguous(workers: Pool, world_size: int, bucketing: str) -> None:
    assert_replicas(workers(world_size).run(strided, BUCKETING[bucketing]))


def groups_come_and_go() -> str:
    """Two groups, a frozen parameter that thaws, one that freezes, and a group that is added later."""
    params = params_of()
    whole = copies(params)
    sides = []
    for side, keywords in ((params, {"shard_over": dist.group.WORLD}), (whole, {})):
        side[0].requires_grad_(False)
        groups = [{"params": side[:3]}, {"params": side[3:7], "lr": 0.01, "weight_decay": 0.1, "momentum": 0.0}]
        sides.append(SM3(groups, lr=0.3, momentum=0.9, **keywords))  # type: ignore[arg-type]
    sharded, alone = sides

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            for side, optimizer in ((params, sharded), (whole, alone)):
                give(side, step)
                for param in side:
                    param.grad = param.grad if param.requires_grad else None
                optimizer.step()
            assert_same(params, whole, sharded, alone, where=step)

    steps(0, 3)
    owned = _shards(sharded)
    for side in (params, whole):
        side[0].requires_grad_(True)
        side[3].requires_grad_(False)
    steps(3, 6)
    sharded.add_param_group({"params": params[7:], "beta": 0.5})
    alone.add_param_group({"params": whole[7:], "beta": 0.5})
    steps(6, 9)
    assert all(_shards(sharded)[param].boxes == shard.boxes for param, shard in owned.items())  # state stayed in place
    return digest(params)


def _shards(optimizer: SM3) -> dict[Tensor, LocalShard]:
    return {entry.param: entry.shard for entry in optimizer._current_plan().entries}


@pytest.mark.parametrize("world_size", WORLDS)
def test_groups_come_and_go(workers: Pool, world_size: int) -> None:
    assert_replicas(workers(world_size).run(groups_come_and_go))


def exchange() -> str:
    """Somebody puts other tensors in the place of the parameters, as accelerate does."""
    params, whole = params_of(), params_of()
    sharded, alone = SM3(params, momentum=0.9, shard_over=dist.group.WORLD), SM3(whole, momentum=0.9)
    for step in range(5):
        if step == 3:
            params = [nn.Parameter(param.detach().clone()) for param in params]
            sharded.param_groups[0]["params"] = params
        for side, optimizer in ((params, sharded), (whole, alone)):
            give(side, step)
            optimizer.step()
        assert_same(params, whole, sharded, alone)
    return digest(params)


def test_exchanged_parameters_keep_their_state(workers: Pool) -> None:
    assert_replicas(workers(3).run(exchange))


def resume() -> str:
    params, whole = params_of(), params_of()
    sharded, alone = SM3(params, momentum=0.9, shard_over=dist.group.WORLD), SM3(whole, momentum=0.9)
    for step in range(6):
        if step == 3:
            saved = sharded.state_dict()
            sharded = SM3(params, momentum=0.9, shard_over=dist.group.WORLD)
            sharded.load_state_dict(saved)
        for side, optimizer in ((params, sharded), (whole, alone)):
            give(side, step)
            optimizer.step()
        assert_same(params, whole, sharded, alone)
    with pytest.raises(ValueError, match=r"this rank stores.*sm3_dist\.checkpoint saves"):
        sharded.load_state_dict(alone.state_dict())
    return digest(params)


def test_resumes_from_its_state_dict(workers: Pool) -> None:
    assert_replicas(workers(3).run(resume))


def on_a_mesh() -> str:
    return train_beside_one_process(
        params_of(), BUCKETING["one-bucket"], shard_over=init_device_mesh("cpu", (dist.get_world_size(),))
    )


def test_a_mesh_in_place_of_the_group(workers: Pool) -> None:
    assert_replicas(workers(2).run(on_a_mesh))


def on_subgroups() -> str:
    """Replicated over 4 ranks, sharded over 2 of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    return train_beside_one_process(params_of(), BUCKETING["one-bucket"], momentum=0.9, shard_over=mesh["shard"])


def test_subgroups(workers: Pool) -> None:
    assert_replicas(workers(4).run(on_subgroups))


def sent() -> int:
    """Bytes that this rank sends in a step and for it."""
    params = params_of([(1000, 300), (300,), (300, 700)])
    optimizer = SM3(params, momentum=0.9, shard_over=dist.group.WORLD, check_gradients=0)
    for _ in range(2):
        dist.barrier()
        before = bytes_sent()
        give(params, 0)
        optimizer.step()
        assert optimizer.state  # the maxima have arrived
    return bytes_sent() - before


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_step_sends_one_all_gather_of_the_weights(workers: Pool, world_size: int) -> None:
    weights = 4 * (1000 * 300 + 300 + 300 * 700)
    total = sum(workers(world_size).run(sent))
    assert (world_size - 1) * weights <= total <= 1.03 * (world_size - 1) * weights


def stored() -> tuple[int, int]:
    """Elements of momentum and of accumulators on this rank."""
    params = params_of([(300, 40), (40,), (40, 160), (160,), (160, 40)])
    optimizer = SM3(params, momentum=0.9, shard_over=dist.group.WORLD)
    give(params, 0)
    optimizer.step()
    states = optimizer.state.values()
    momentum = sum(state["momentum_buffer"].numel() for state in states)
    return momentum, sum(state[key].numel() for state in states for key in state if key.startswith("accumulator"))


def test_a_rank_stores_the_state_of_its_range_alone(workers: Pool) -> None:
    momentum, accumulators = zip(*workers(4).run(stored), strict=True)
    total = 300 * 40 + 40 + 2 * 40 * 160 + 160
    assert sum(momentum) == total
    assert max(momentum) <= 1.01 * total / 4
    whole = 300 + 40 + 40 + 2 * (40 + 160) + 160
    assert sum(accumulators) <= whole + 3 * (160 + 1)  # each of 3 cuts doubles the columns and perhaps a row
