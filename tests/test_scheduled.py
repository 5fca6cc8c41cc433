"""What schedulers write into param groups: momentum that nobody asked for is told, a rate that cannot be is refused."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from sm3_dist import SM3, step_in_backward


def model_and(optimizer: Any, **options: Any) -> tuple[nn.Module, SM3]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, optimizer(model.parameters(), **options)


def step(model: nn.Module, optimizer: SM3) -> None:
    model(torch.ones(1, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def one_cycle(optimizer: SM3, **options: Any) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=10, **options)


def cyclic(optimizer: SM3, **options: Any) -> CyclicLR:
    return CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, **options)


schedulers = pytest.mark.parametrize("scheduler", [one_cycle, cyclic])


@schedulers
def test_momentum_that_a_scheduler_switches_on_is_told_once(scheduler: Any) -> None:
    model, optimizer = model_and(SM3)
    scheduler(optimizer)
    with pytest.warns(UserWarning, match="made with momentum=0.*Pass cycle_momentum=False"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


@schedulers
@pytest.mark.parametrize(
    ("method", "options", "cycle"),
    [(SM3, {}, False), (SM3, {"momentum": 0.9}, True), (SM3.adamw_like, {}, True)],
    ids=["not cycled", "momentum", "recipe"],
)
def test_schedulers_are_used_without_a_warning(scheduler: Any, method: Any, options: dict, cycle: bool) -> None:
    model, optimizer = model_and(method, **options)
    schedule = scheduler(optimizer, cycle_momentum=cycle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, optimizer)
            schedule.step()
    assert ("momentum_buffer" in optimizer.state[model.weight]) is cycle


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_rate_that_cannot_be_is_refused_and_costs_nothing(value: float, make: Any, in_backward: bool) -> None:
    model, optimizer = model_and(SM3.adamw_like, lr=make(0.5))
    if in_backward:
        step_in_backward(model, optimizer)
    schedule = LambdaLR(optimizer, lambda t: [1.0, 1.0, value, 1.0][t])
    step(model, optimizer)
    schedule.step()
    step(model, optimizer)
    schedule.step()
    before = [tensor.clone() for tensor in (model.weight.detach(), *optimizer.state[model.weight].values())]
    with pytest.raises(ValueError, match=r"lr of param group 0 must be at least 0 and finite, but is .*scheduler"):
        step(model, optimizer)
    after = (model.weight, *optimizer.state[model.weight].values())
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    schedule.step()
    optimizer.zero_grad()
    step(model, optimizer)
    assert not torch.equal(model.weight, before[0])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("weight_decay", float("nan"), "at least 0 and finite, but is nan"),
        ("weight_decay", "0.1", "at least 0 and finite, but is '0.1'"),
        ("lr", None, "at least 0 and finite, but is None"),
        ("momentum", 1.0, "at least 0 and less than 1, but is 1.0"),
        ("beta", torch.tensor(1.5), "at least 0 and less than 1, but is 1.5"),
        ("eps", -1.0, "at least 0 and finite, but is -1.0"),
        ("update_rms", 0.0, r"greater than 0 and finite \(or None\), but is 0.0"),
        ("update_rms", float("inf"), r"greater than 0 and finite \(or None\), but is inf"),
        ("orthogonalize", "weight", "True, False or names of tensors, but is 'weight'"),
    ],
)
@pytest.mark.parametrize("in_backward", [False, True])
def test_other_options_that_cannot_be_are_refused_too(name: str, value: Any, told: str, in_backward: bool) -> None:
    model, optimizer = model_and(SM3.adamw_like)
    if in_backward:
        step_in_backward(model, optimizer)
    step(model, optimizer)
    before = model.weight.detach().clone()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} of param group 0 must be {told}"):
        step(model, optimizer)
    assert torch.equal(model.weight, before)
