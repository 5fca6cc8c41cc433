"""``torch.compile`` around ``step()``: a call that is not looked into, without a word."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sm3_dist import SM3


@pytest.mark.parametrize("make", [SM3, SM3.adamw_like], ids=["paper", "recipe"])
def test_a_compiled_step_gives_the_bits_of_a_step(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    losses: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for compiled, net in ((False, model), (True, copy.deepcopy(model))):
        optimizer = make(net.parameters(), lr=0.1)
        hooked: list[Any] = []
        optimizer.register_step_post_hook(lambda *_, hooked=hooked: hooked.append(None))
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        step = (
            torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager") if compiled else optimizer.step
        )
        for number in range(3):
            loss = net(torch.full((2, 8), 1.0 + number)).square().mean()
            losses[compiled].append(loss.detach())
            loss.backward()
            step()
            optimizer.zero_grad()
            scheduler.step()
        assert len(hooked) == 3
        assert optimizer.state[net.weight]["step"] == 3
    assert torch.equal(torch.stack(losses[True]), torch.stack(losses[False]))
    assert losses[True][2] != losses[True][0]
    assert capfd.readouterr().err == ""  # the compiler warns there, and not as Python does
