"""The checks that GPUs are to pass, on the CPU."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from harness import Pool
from on_device import CHECKS, OPTIONS, WRAPPERS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sm3_dist import SM3

ROWS = [row for row in itertools.product(WRAPPERS, OPTIONS, (1, 2)) if " ".join(map(str, row[:2])) in CHECKS]


def check(name: str) -> None:
    CHECKS[name](torch.device("cpu"))


@pytest.mark.sampled("wrapper, options, world_size", ROWS)
def test_a_wrapper_that_gpus_are_to_train_in(workers: Pool, wrapper: str, options: str, world_size: int) -> None:
    workers(world_size).run(check, f"{wrapper} {options}")


@pytest.mark.parametrize("name", ["scaled", "resumed"])
def test_what_else_gpus_are_to_do(workers: Pool, name: str) -> None:
    workers(2).run(check, name)


def check_offloaded(**options: Any) -> None:
    """Whatever is made under the mesh of another device than the parameter's has to stay with the parameter."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    params = [torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for _ in range(2)]
    optimizers = [SM3.adamw_like([param], **options) for param in params]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = distribute_tensor(torch.randn(96, 64, generator=generator), mesh, [Shard(0)])
            generator.manual_seed(step)
        optimizers[0].step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceMesh, "device_type", "cuda")
            optimizers[1].step()
    for key, value in optimizers[0].state[params[0]].items():
        other = optimizers[1].state[params[1]][key]
        assert other.device.type == "cpu"
        assert type(other) is type(value)
        pair = [each.to_local() if hasattr(each, "to_local") else each for each in (value, other)]
        assert torch.equal(*pair), key


@pytest.mark.parametrize("momentum", [torch.float32, torch.int8])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_on_the_cpu_under_a_mesh_of_gpus(workers: Pool, world_size: int, momentum: torch.dtype) -> None:
    """As FSDP2 has them with an offload policy; on two ranks an edge cuts a block of covers."""
    workers(world_size).run(partial(check_offloaded, momentum_dtype=momentum))
