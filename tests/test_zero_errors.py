"""What ZeRO-1 refuses, on every rank."""

import copy
from unittest.mock import patch

import moving
import pytest
import torch
import torch.distributed as dist
from harness import Pool
from replicas import give, params_of
from torch import nn
from torch.distributed.checkpoint import state_dict as by_torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from sm3_dist import SM3, PlanMismatchError
from sm3_dist.ranks import weight_gather


def other_parameters(difference: str) -> None:
    rank = dist.get_rank()
    params = params_of([(4, 3), (5 + rank,) if difference == "shape" else (5,)])
    if difference == "stride" and rank:
        params[0] = nn.Parameter(params[0].detach().t().contiguous().t())
    if difference == "history":  # one rank cuts the two together, the other one after another
        params[1].requires_grad_(rank == 0)
    optimizer = SM3(params, shard_over=dist.group.WORLD)
    give(params, 0)
    optimizer.step()


@pytest.mark.parametrize("difference", ["shape", "stride", "history"])
def test_ranks_with_other_parameters(workers: Pool, difference: str) -> None:
    workers(2).run_raises(PlanMismatchError, other_parameters, difference, match="rank 1 has")


def refused() -> None:
    params = params_of([(4, 3)])
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    with pytest.raises(ValueError, match=r"one dimension.*\(2, 1\).*'replica', 'shard'"):
        SM3(params, shard_over=mesh)
    with pytest.raises(TypeError, match="got int"):
        SM3(params, shard_over=2)  # type: ignore[arg-type]
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="not part of the process group"):
            SM3(params, shard_over=group)
    first = DeviceMesh("cpu", [0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=r"not part of the mesh \[0\]"):
            SM3(params, shard_over=first)
    with pytest.raises(TypeError, match="holds a process group and cannot be pickled"):
        copy.deepcopy(SM3(params, shard_over=dist.group.WORLD))
    with pytest.raises(ValueError, match="at least 0"):
        SM3(params, shard_over=dist.group.WORLD, check_gradients=-1)
    with pytest.raises(ValueError, match="at least 0, but is None"):
        SM3(params, shard_over=dist.group.WORLD, check_gradients=None)  # type: ignore[arg-type]
    one = init_device_mesh("cpu", (2,))
    distributed = nn.Parameter(distribute_tensor(torch.ones(4, 3), one, [Replicate()]))
    assert isinstance(distributed, DTensor)
    with pytest.raises(ValueError, match="sharded already"):
        SM3([distributed], shard_over=dist.group.WORLD)
    with pytest.raises(TypeError, match="view_as_real"):
        SM3([nn.Parameter(torch.ones(2, dtype=torch.complex64))], shard_over=dist.group.WORLD)


def test_refuses_what_it_cannot_do(workers: Pool) -> None:
    workers(2).run(refused)


def sparse() -> None:
    """With more buckets than are sent without waiting: a rank that has nothing to do with the table must raise too."""
    table = nn.Embedding(6, 4, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    params = params_of([(20, 9), (12, 12)])
    give(params, 0)
    with patch.object(weight_gather, "BUCKET_BYTES", 100):
        SM3([*params, *table.parameters()], shard_over=dist.group.WORLD).step()


def test_sparse_gradients_are_refused_on_every_rank(workers: Pool) -> None:
    workers(2).run_raises(NotImplementedError, sparse, match="sparse=False")


def state_dict_by_torch(layout: str) -> None:
    by_torch.get_optimizer_state_dict(*moving.build(layout, dist.get_world_size()))


@pytest.mark.parametrize("layout", ["zero", "fairscale"])
def test_state_dicts_that_would_have_a_part_are_refused(workers: Pool, layout: str) -> None:
    """PyTorch saved that of one rank for all, and loaded it on all of them."""
    workers(1).run(state_dict_by_torch, layout)
    match = r"each rank has a part.*sm3_dist\.checkpoint"
    workers(2).run_raises(NotImplementedError, state_dict_by_torch, layout, match=match)
