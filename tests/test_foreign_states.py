"""The states of other optimizers go on here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import SM3 as torch_sm3
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as by_torch

from sm3_dist import SM3
from sm3_dist.checkpoint import (
    StateDictOptions,
    from_adamw,
    from_torch_sm3,
    set_optimizer_state_dict,
)

FULL = StateDictOptions(full_state_dict=True)


def foreign_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", (4, 3)), ("b", (5,)), ("c", ()))}


def take_steps(optimizer: Any, parameters: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def holder() -> nn.Module:
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in foreign_parameters().items()})  # type: ignore[return-value]


def test_torch_sm3_goes_on_here() -> None:
    old = holder()
    optimizer = torch_sm3.SM3(old.parameters(), lr=0.1, momentum=0.9)
    take_steps(optimizer, list(old.parameters()), 3)
    model = holder()
    model.load_state_dict(old.state_dict())
    ours = SM3(model.parameters(), lr=5.0, momentum=0.9)
    converted = from_torch_sm3(optimizer.state_dict(), [name for name, _ in model.named_parameters()])
    set_optimizer_state_dict(model, ours, converted, options=FULL)
    assert ours.param_groups[0]["lr"] == 0.1
    for _ in range(2):
        take_steps(optimizer, list(old.parameters()), 1)
        take_steps(ours, list(model.parameters()), 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, old.get_parameter(name), rtol=1e-6, atol=1e-7)
        assert ours.state[parameter]["step"] == 5


@pytest.mark.parametrize("block", [None, 2])
def test_adamw_goes_on_here(block: int | None) -> None:
    model = holder()
    adamw = torch.optim.AdamW(model.parameters())
    take_steps(adamw, list(model.parameters()), 3)
    ours = SM3(model.parameters(), lr=0.2, momentum=0.9, beta=0.9, cover_block=block)
    names = [name for name, _ in model.named_parameters()]
    converted = from_adamw(adamw.state_dict(), names, cover_block=block)
    set_optimizer_state_dict(model, ours, converted, options=FULL)
    a = model.get_parameter("a")
    squares = adamw.state[a]["exp_avg_sq"]
    found = ours.state[a]
    assert ours.param_groups[0]["lr"] == 0.2
    assert found["step"] == 3
    assert not found["momentum_buffer"].any()
    if block is None:
        assert torch.equal(found["accumulator_0"], squares.amax(1))
        assert torch.equal(found["accumulator_1"], squares.amax(0))
    else:
        assert torch.equal(found["accumulator_0"], torch.stack([squares[:, :2].amax(1), squares[:, 2]], 1))
    take_steps(ours, list(model.parameters()), 1)
    sums = from_adamw(adamw.state_dict(), names, sums=True)
    assert torch.equal(sums["state"]["b"]["accumulator_0"], adamw.state[model.get_parameter("b")]["exp_avg_sq"] * 3)


def test_foreign_states_that_are_not_what_they_should_be() -> None:
    model = holder()
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    take_steps(sgd, list(model.parameters()), 1)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="no exp_avg_sq"):
        from_adamw(sgd.state_dict(), names)
    with pytest.raises(ValueError, match="no accumulator_0"):
        from_torch_sm3(sgd.state_dict(), names)
    with pytest.raises(ValueError, match="2 names for 3 parameters"):
        from_adamw(sgd.state_dict(), iter(names[:2]))
    with pytest.raises(ValueError, match="by number; pass names="):
        from_adamw(sgd.state_dict())
    rows_alone = {"state": {0: {"step": 1, "accumulator_0": torch.ones(4, 1)}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=r"accumulators of the rows alone \(sparse gradients\)"):
        from_torch_sm3(rows_alone, ["a"])
    in_blocks = SM3([torch.ones(4, 3)], cover_block=64)
    group = in_blocks.state_dict()["param_groups"][0]
    with pytest.raises(ValueError, match="but this optimizer needs accumulator_0, accumulator_1, accumulator_2"):
        in_blocks.load_state_dict({**rows_alone, "param_groups": [group]})


@pytest.mark.parametrize("make", [SM3.adamw_like, torch.optim.AdamW])
def test_state_by_position_is_not_taken_for_one_by_name(make: Callable[..., Any]) -> None:
    model = holder()
    optimizer = make(model.parameters())
    take_steps(optimizer, list(model.parameters()), 1)
    with pytest.raises(ValueError, match=r"by position, as optimizer.state_dict\(\) has it, .*from_adamw does"):
        set_optimizer_state_dict(model, SM3(model.parameters()), optimizer.state_dict())


Make = Callable[[nn.Module], Any]


def one_group(model: nn.Module) -> SM3:
    return SM3.adamw_like(model.parameters())


def two_groups(model: nn.Module) -> SM3:
    matrix, *others = model.parameters()
    return SM3([{"params": [matrix], "cover_block": 4}, {"params": others, "lr": 0.5}])


OTHERS: dict[str, tuple[Make, Make]] = {
    "SGD": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), one_group),
    "SGD with momentum": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), one_group),
    "Adagrad": (lambda model: torch.optim.Adagrad(model.parameters()), one_group),
    "one group for two": (one_group, two_groups),
    "two groups for one": (two_groups, one_group),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_of_another_optimizer_or_of_other_param_groups_is_refused(case: str) -> None:
    """SGD's momentum was taken for SM3's; PyTorch's function leaves a group without options, or with another's."""
    model, other = holder(), holder()
    make, ours = OTHERS[case]
    optimizer, mine = make(model), ours(other)
    take_steps(optimizer, list(model.parameters()), 2)
    take_steps(mine, list(other.parameters()), 1)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match=r"no beta: it was saved by another|but this optimizer needs accumulator_0"):
        by_torch.set_optimizer_state_dict(other, mine, by_torch.get_optimizer_state_dict(model, optimizer))
    assert str(mine.state_dict()) == str(before)


def test_parameters_in_another_order_are_refused() -> None:
    model = holder()
    first, second, third = model.named_parameters()
    saved = SM3([first, second, third]).state_dict()
    optimizer = SM3([first, third, second])
    with pytest.raises(ValueError, match="number 1 of the parameters in param group 0 is 'c', but was 'b'"):
        optimizer.load_state_dict(saved)
    in_ddp = SM3((f"module.{name}", param) for name, param in (first, second, third))
    in_ddp.load_state_dict(saved)
    assert in_ddp.param_groups[0]["param_names"] == ["module.a", "module.b", "module.c"]
