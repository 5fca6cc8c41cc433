"""Which process groups collectives run over: those of the holders of a tensor, and of these the ones that exist."""

import datetime
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sm3_dist import SM3
from sm3_dist.checkpoint import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from sm3_dist.layout.groups import group_of, timeout_of


def stage(flattened: bool) -> dict[str, tuple[int, ...]]:
    """Two pipeline stages of two ranks, with other names and shapes: whole state, and what it has of momentum."""
    groups, number = [dist.new_group([0, 1]), dist.new_group([2, 3])], dist.get_rank() // 2
    torch.manual_seed(0)
    model = nn.Module()
    for k in range(1 + number):  # the second stage has more of them
        model.add_module(f"layer{number}{k}", nn.Linear(4 + number, 5))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    if flattened:
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, process_group=groups[number], device_id=cpu, use_orig_params=True)
        optimizer = SM3.adamw_like(model.named_parameters(), model=model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
    else:
        optimizer = SM3.adamw_like(model.named_parameters(), shard_over=groups[number])
    optimizer.step()
    options = StateDictOptions(full_state_dict=True)
    weights, saved = get_state_dict(model, optimizer, options=options)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=saved, options=options)
    if not number:  # parts, which the ranks of the other stage do not wait for
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    return {name: tuple(values["momentum_buffer"].shape) for name, values in saved["state"].items()}


def test_pipeline_stages_put_their_own_state_together(workers: Pool) -> None:
    for flattened in (False, True):
        shapes = workers(4).run(stage, flattened)
        assert shapes[0] == shapes[1] == {"layer00.weight": (5, 4), "layer00.bias": (5,)}
        assert shapes[2] == shapes[3]
        assert list(shapes[2]) == ["layer10.weight", "layer10.bias", "layer11.weight", "layer11.bias"]


def groups_by_rank() -> None:
    assert group_of(range(dist.get_world_size())) is dist.group.WORLD
    theirs = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=77))
    if dist.get_rank() < 2:
        assert group_of([0, 1]) is theirs
        assert timeout_of(theirs) == datetime.timedelta(seconds=77)
    if dist.get_rank() > 0:  # nobody has made it
        made = group_of([1, 2])
        assert timeout_of(made) == timeout_of(dist.group.WORLD) != datetime.timedelta(minutes=30)
        assert group_of([1, 2]) is made


def test_groups_that_exist_are_used_and_new_ones_have_the_timeout_of_all(workers: Pool) -> None:
    workers(3).run(groups_by_rank)


def step_fsdp2() -> None:
    model = nn.Linear(8, 8)
    fully_shard(model)
    optimizer = SM3.adamw_like(model.named_parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))


def loops_of_gloo() -> int:
    """Each group of gloo has a thread, which wakes up a hundred times a second."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("gloo_tcp_loop") for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_group_outlives_its_end(workers: Pool) -> None:
    """A cache that knows a mesh holds its groups: ours holds none, and the harness clears those of PyTorch."""
    before = workers(3).run(loops_of_gloo)  # other tests may have left some
    for world_size in (2, 3, 2):
        workers(world_size).run(step_fsdp2)
    assert workers(3).run(loops_of_gloo) == before
