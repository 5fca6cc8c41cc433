"""A step overwrites weights, and autograd knows: what still needs the old ones raises an error, as elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import Tensor, nn
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sm3_dist import SM3, step_in_backward

MESSAGE = "modified by an inplace operation"


def step_between(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """A graph that needs the weights of before a step."""
    late = model(torch.ones(2, 4, requires_grad=True)).square().sum()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return late


@pytest.mark.parametrize("backend", ["eager", "c"])
def test_a_step_between_forward_and_backward(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match=MESSAGE):
        step_between(model, SM3.adamw_like(model.parameters(), backend=backend)).backward()


def test_weights_without_a_gradient_are_as_they_were() -> None:
    model = nn.Linear(4, 4)
    optimizer = SM3(model.parameters())
    late = model(torch.ones(2, 4, requires_grad=True)).square().sum()
    optimizer.step()
    late.backward()


class Twice(nn.Module):
    """Uses a weight once with its gradient, and before that once without: its gradient is there first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4, bias=False), nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x) @ self.weight.detach()) @ self.weight


@pytest.mark.parametrize("backend", ["eager", "c"])
def test_a_step_in_backward_before_the_last_use_of_a_weight(backend: str) -> None:
    model = Twice()
    with step_in_backward(model, SM3(model.parameters(), backend=backend)), pytest.raises(RuntimeError, match=MESSAGE):
        model(torch.ones(2, 4)).square().sum().backward()


def tensor_parallel(backend: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallel())
    with pytest.raises(RuntimeError, match=MESSAGE):
        step_between(model, SM3(model.parameters(), backend=backend)).backward()


def tensor_parallel_orthogonal(backend: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(nn.Linear(4, 4, bias=False), mesh, ColwiseParallel())
    optimizer = SM3(model.parameters(), backend=backend, orthogonalize=True, momentum=0.9)
    version = model.weight._version
    with pytest.raises(RuntimeError, match=MESSAGE):
        step_between(model, optimizer).backward()
    assert model.weight._version > version


def replicas(backend: str) -> None:
    """Most of the weights come from the other rank, in place (the large one) and in a message."""
    model = nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 4))
    for param in model.parameters():
        optimizer = SM3([param], backend=backend, shard_over=dist.group.WORLD)
        other: Any = model(torch.ones(2, 4))
        param.grad, version = torch.ones_like(param), param._version
        optimizer.step()
        assert param._version > version
        del other


@pytest.mark.parametrize("backend", ["eager", "c"])
@pytest.mark.parametrize("wrap", [tensor_parallel, tensor_parallel_orthogonal, replicas])
def test_sharded_weights(workers: Pool, wrap: Callable[[str], None], backend: str) -> None:
    workers(2).run(wrap, backend)
