"""Arguments and states of other optimizers: refused at once, with what to do instead."""

from typing import Any

import pytest
import torch
from torch import nn

from sm3_dist import SM3, AdamWLikeSM3, step_in_backward


@pytest.mark.parametrize("make", [SM3, SM3.adamw_like, AdamWLikeSM3])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.95)}, r"no argument betas: pass momentum=betas\[0\] and beta=betas\[1\]"),
        ({"fused": True}, "no argument fused: leave it out"),
        ({"foreach": False}, "no argument foreach: leave it out"),
        ({"capturable": True}, "no argument capturable: leave it out"),
        ({"momentun": 0.9}, "no argument momentun"),
        ({"lr": "1e-3"}, "lr must be a number, but is the str '1e-3'"),
        ({"weight_decay": None}, "weight_decay must be a number"),
        ({"maximize": "false"}, "maximize must be True or False, but is the str 'false'"),
        ({"stochastic_rounding": "no"}, "stochastic_rounding must be True or False, but is the str 'no'"),
    ],
)
def test_arguments_of_other_optimizers(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(nn.Linear(4, 3).parameters(), **options)


def test_betas_of_a_param_group() -> None:
    with pytest.raises(TypeError, match="no argument betas"):
        SM3([{"params": nn.Linear(4, 3).parameters(), "betas": (0.9, 0.95)}])


def test_the_state_of_adam() -> None:
    layer = nn.Linear(4, 3)
    adamw, optimizer = torch.optim.AdamW(layer.parameters()), SM3(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    adamw.step()
    with pytest.raises(ValueError, match=r"is that of Adam .*from_adamw"):
        optimizer.load_state_dict(adamw.state_dict())


def test_a_step_in_backward_of_another_optimizer() -> None:
    model = nn.Linear(4, 3)
    for arguments in ((model, torch.optim.AdamW(model.parameters())), (SM3(model.parameters()), model)):
        with pytest.raises(TypeError, match=r"takes a module and SM3 itself, .* but got"):
            step_in_backward(*arguments)  # type: ignore[arg-type]


def test_an_aborted_backward_pass_under_step_in_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = SM3(model.parameters())

    def run_out(*_: Any) -> None:
        raise MemoryError

    with step_in_backward(model, optimizer):
        hook = model[0].weight.register_hook(run_out)
        with pytest.raises(MemoryError):
            model(torch.ones(2, 4)).sum().backward()
        hook.remove()
        with pytest.raises(RuntimeError, match=r"aborted .*call optimizer\.step"):
            model(torch.ones(2, 4)).sum().backward()
        optimizer.zero_grad()
        optimizer.step()
        before = [param.detach().clone() for param in model.parameters()]
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
