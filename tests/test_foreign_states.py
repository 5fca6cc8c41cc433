"""The states of other optimizers go on here."""

from __future__ import annotations

from typing import Any

import pytest
import SM3 as torch_sm3
import torch
from torch import Tensor, nn

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
        from_adamw(sgd.state_dict(), names[:2])
    with pytest.raises(ValueError, match="by number; pass names="):
        from_adamw(sgd.state_dict())
