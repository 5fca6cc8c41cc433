"""Parameters, groups and optimizers that are removed: what stays keeps its state, and what goes frees its memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from against_eager import needs_c
from torch import Tensor, nn

from sm3_dist import SM3


def matrix(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def train(optimizer: SM3, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.cos(param.detach())
        optimizer.step()


def of(optimizer: SM3, param: Tensor) -> list[Tensor]:
    return [param, *optimizer.state[param].values()]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_behind_a_removed_group_keeps_its_state(momentum: float) -> None:
    first, second, third = map(matrix, range(3))
    optimizer = SM3.adamw_like([{"params": [first]}, {"params": [second]}], momentum=momentum)
    alone, fresh = SM3.adamw_like([matrix(1)], momentum=momentum), SM3.adamw_like([matrix(2)], momentum=momentum)
    train(optimizer, 2)
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [third]})
    train(optimizer, 2)
    train(alone, 4)
    train(fresh, 2)
    for param, other in ((second, alone), (third, fresh)):
        (twin,) = other.param_groups[0]["params"]
        assert all(map(torch.equal, of(optimizer, param), of(other, twin)))


def grouped_anew(optimizer: SM3) -> None:
    last = optimizer.param_groups[-1]["params"][-1]
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [last]})


LEAVING: dict[str, tuple[bool, Callable[[SM3], object]]] = {  # whether both are in one group, and how the first leaves
    "group": (False, lambda optimizer: optimizer.param_groups.pop(0)),
    "parameter": (True, lambda optimizer: optimizer.param_groups[0]["params"].pop(0)),
    "all groups": (False, grouped_anew),
}


@pytest.mark.parametrize("what", LEAVING)
def test_what_was_frozen_takes_nobodys_state(what: str) -> None:
    """Of a head that was trained first and then leaves: the rest is in its place, and has no state yet."""
    together, leave = LEAVING[what]
    head, rest = matrix(0), matrix(1)
    optimizer = SM3.adamw_like(
        [{"params": [head, rest]}] if together else [{"params": [each]} for each in (head, rest)]
    )
    alone = SM3.adamw_like([matrix(1)])
    rest.requires_grad_(False)
    head.grad = torch.ones(4, 3)
    optimizer.step()
    leave(optimizer)
    rest.requires_grad_(True)
    train(optimizer, 2)
    train(alone, 2)
    assert all(map(torch.equal, of(optimizer, rest), of(alone, *alone.param_groups[0]["params"])))


@pytest.mark.parametrize("way", ["removed", "exchanged"])
def test_what_goes_has_no_memory_any_more(way: str) -> None:
    param = matrix(0)
    optimizer = SM3.adamw_like([{"params": [param]}, {"params": [matrix(1)]}], momentum=0.9)
    train(optimizer, 1)
    kept = [weakref.ref(each) for each in of(optimizer, param)]
    if way == "removed":
        del optimizer.param_groups[0], optimizer.state[param]
    else:
        optimizer.param_groups[0]["params"] = [nn.Parameter(param.detach().clone())]
    train(optimizer, 1)
    del param
    assert all(each() is None for each in kept)


@pytest.fixture
def without_the_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_the_collector")
@pytest.mark.parametrize("backend", ["eager", pytest.param("c", marks=needs_c)])
def test_an_optimizer_that_goes_takes_its_memory_along_at_once(backend: str) -> None:
    train(SM3.adamw_like([matrix(0)]), 1)  # the first optimizer of a process imports, and PyTorch holds on to it
    params = [matrix(0), matrix(1)]
    optimizer = SM3.adamw_like(params, backend=backend)
    train(optimizer, 2)
    kept = [weakref.ref(each) for param in params for each in of(optimizer, param)]
    del optimizer, params
    assert all(each() is None for each in kept)
