"""fairscale's OSS with SM3 as its optimizer: whole tensors, each updated and with state on one rank alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flat_layouts import Model, exact_gradient
from harness import Pool
from torch import Tensor, nn

from sm3_dist import SM3
from sm3_dist.checkpoint import StateDictOptions, get_optimizer_state_dict

OPTIONS: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "beta": 0.95, "weight_decay": 0.1}


def gradients(step: int, model: nn.Module) -> dict[str, Tensor]:
    return {name: exact_gradient(step, name, weight.shape) for name, weight in model.named_parameters()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Where gradients are averaged over `W` ranks, the first has `W` times the gradient, and the others have zeros."""
    scale = 1
    if not isinstance(model, Whole):
        scale = dist.get_world_size() if dist.get_rank() == 0 else 0
    for step in steps:
        (model(gradients(step, model.module)) * scale).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradients are views of ShardedDataParallel's buffers


class Whole(nn.Module):
    """No wrapper, in the form of one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return self.module(grads)


def wrapped(names: bool) -> tuple[nn.Module, Any]:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS

    model = Model()
    params = model.named_parameters() if names else model.parameters()
    oss = OSS(params, optim=SM3, **OPTIONS)
    if dist.get_world_size() == 3:  # ShardedDataParallel multiplies by 1/3, which rounds; all have equal gradients
        return Whole(model), oss
    return ShardedDataParallel(model, oss), oss


def compare(names: bool) -> None:
    """Train, save, load into a fresh one, train on; every rank against one process."""
    alone = Whole(Model())
    reference = SM3(alone.parameters(), **OPTIONS)
    model, oss = wrapped(names)
    train(alone, reference, range(3))
    train(model, oss, range(3))
    for key, weight in model.module.state_dict().items():
        assert torch.equal(weight, alone.module.state_dict()[key]), key

    oss.consolidate_state_dict(recipient_rank=-1)
    saved = copy.deepcopy(oss.state_dict())
    assert_same_state(saved, reference.state_dict())

    again, fresh = wrapped(names)
    again.module.load_state_dict(model.module.state_dict())
    train(again, fresh, range(7, 8))  # it has a plan and state of its own, which give way
    again.module.load_state_dict(model.module.state_dict())
    fresh.load_state_dict(copy.deepcopy(saved))
    train(alone, reference, range(3, 6))
    train(again, fresh, range(3, 6))
    for key, weight in again.module.state_dict().items():
        assert torch.equal(weight, alone.module.state_dict()[key]), key
    fresh.consolidate_state_dict(recipient_rank=-1)
    assert_same_state(fresh.state_dict(), reference.state_dict())


def assert_same_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert state["state"].keys() == expected["state"].keys()
    for number, of_param in expected["state"].items():
        assert state["state"][number].keys() == of_param.keys()
        for key, value in of_param.items():
            assert torch.equal(state["state"][number][key], value), (number, key)


@pytest.mark.parametrize(("world_size", "names"), [(1, False), (2, True), (3, False), (4, False)])
def test_equals_one_process_and_survives_a_checkpoint(workers: Pool, world_size: int, names: bool) -> None:
    workers(world_size).run(compare, names)


def state_per_rank() -> tuple[int, int]:
    model, oss = wrapped(names=False)
    train(model, oss, range(1))
    mine = sum(value.numel() for state in oss.optim.state.values() for value in state.values())
    assert not oss.optim._current_plan().buckets, "whole tensors share nothing"
    total = torch.tensor(mine)
    dist.all_reduce(total)
    alone = Whole(Model())
    reference = SM3(alone.parameters(), **OPTIONS)
    train(alone, reference, range(1))
    return int(total), sum(value.numel() for state in reference.state.values() for value in state.values())


def test_each_state_tensor_lies_on_one_rank(workers: Pool) -> None:
    for together, alone in workers(3).run(state_per_rank):
        assert together == alone


def more_ranks_than_tensors() -> None:
    from fairscale.optim import OSS

    layer = nn.Linear(3, 2, bias=False)
    oss = OSS(layer.parameters(), optim=SM3)
    layer.weight.grad = torch.ones(2, 3)
    oss.step()
    assert (len(oss.optim.state) == 1) == (dist.get_rank() == 0)


def test_a_rank_without_any_parameter(workers: Pool) -> None:
    workers(2).run(more_ranks_than_tensors)


def frozen_and_added() -> list[str]:
    """Names of what is not as in one process, of state with which some tensors were frozen, and a group was added."""
    from fairscale.optim import OSS

    model, alone = Model(), Model()
    for each in (model, alone):  # never has state
        list(each.parameters())[-1].requires_grad_(False)
    first, *others = model.parameters()
    oss = OSS(others, optim=SM3, **OPTIONS)
    whole = SM3(list(alone.parameters())[1:], **OPTIONS)
    for each, optimizer in ((model, oss), (alone, whole)):
        train(Whole(each), optimizer, range(2))
        for param in list(each.parameters())[2:5]:
            param.requires_grad_(False)
    oss.add_param_group({"params": [first], "lr": 0.2})
    whole.add_param_group({"params": [next(alone.parameters())], "lr": 0.2})
    expected = get_optimizer_state_dict(alone, whole)
    found = get_optimizer_state_dict(model, oss, options=StateDictOptions(full_state_dict=True))
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    return [
        f"{key} of {name}"
        for name, of_param in expected["state"].items()
        for key, value in of_param.items()
        if not torch.equal(value, found["state"][name][key])
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_state_of_frozen_tensors_and_of_a_group_that_was_added(workers: Pool, world_size: int) -> None:
    assert workers(world_size).run(frozen_and_added) == [[]] * world_size
