"""The optimizer is made first and the model wrapped after, as frameworks do: ``attach`` says where the shapes are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_layouts import LAYOUTS, Model, exact_gradient
from harness import Pool
from torch import Tensor, nn

from sm3_dist import SM3

GRADS = {name: exact_gradient(0, name, param.shape) for name, param in Model().named_parameters()}
METHODS = pytest.mark.parametrize("method", ["adamw_like", "__call__"], ids=["recipe", "paper"])


def made(method: str, params: Any, **options: Any) -> SM3:
    options |= {"cover_block": 2} if method == "adamw_like" else {"momentum": 0.9}
    make: Callable[..., SM3] = SM3.adamw_like if method == "adamw_like" else SM3
    return make(params, lr=0.5, **options)


def train(model: nn.Module, optimizer: SM3) -> dict[str, Tensor]:
    for _ in range(3):
        model(GRADS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return LAYOUTS["fsdp1-nested"].gather(model)


def attached(method: str, read_before: bool) -> list[str]:
    """Names of weights that differ from those of an optimizer made after wrapping."""
    late = LAYOUTS["fsdp1-nested"].wrap(Model())
    expected = train(late, made(method, late.named_parameters(), model=late))
    model = Model()
    optimizer = made(method, model.named_parameters(), model=model if read_before else None)
    model = LAYOUTS["fsdp1-nested"].wrap(model)  # use_orig_params=True: the parameters stay the same objects
    model(GRADS).backward()
    with pytest.raises(ValueError, match=r"optimizer\.attach\(model\)"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.attach(model)
    actual = train(model, optimizer)
    assert actual.keys() == expected.keys()
    return [name for name, weight in actual.items() if not torch.equal(weight, expected[name])]


@METHODS
@pytest.mark.parametrize("read_before", [False, True], ids=["no model", "the model before it was wrapped"])
def test_an_optimizer_made_before_wrapping_trains_once_attached(workers: Pool, method: str, read_before: bool) -> None:
    assert workers(3).run(attached, method, read_before) == [[]] * 3


def exchanged(method: str) -> list[str]:
    """With ``use_orig_params=False`` other parameters take the place of those that the optimizer was made with."""
    late = LAYOUTS["fsdp1-flat-nested"].wrap(Model())
    expected = train(late, made(method, late.named_parameters(), model=late))
    model = Model()
    optimizer = made(method, model.parameters())
    model = LAYOUTS["fsdp1-flat-nested"].wrap(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.attach(model)
    actual = train(model, optimizer)
    return [name for name, weight in actual.items() if not torch.equal(weight, expected[name])]


@METHODS
def test_flat_parameters_that_came_in_exchange_train_once_attached(workers: Pool, method: str) -> None:
    assert workers(2).run(exchanged, method) == [[]] * 2


def attached_after_a_step() -> None:
    model = LAYOUTS["fsdp1-nested"].wrap(Model())
    optimizer = SM3(model.parameters(), model=model)
    train(model, optimizer)
    before = {name: weight.clone() for name, weight in LAYOUTS["fsdp1-nested"].gather(model).items()}
    optimizer.attach(model)  # the same one: everything goes on
    after = train(model, optimizer)
    assert all(not torch.equal(after[name], before[name]) for name in GRADS)
    assert all(optimizer.state[param]["step"] == 6 for param in model.parameters() if param.numel())


def test_attaching_the_model_that_is_attached_changes_nothing(workers: Pool) -> None:
    workers(2).run(attached_after_a_step)


def attached_too_late() -> None:
    model = Model()
    optimizer = SM3.adamw_like(model.parameters(), cover_block=2)
    model(GRADS).backward()
    optimizer.step()
    optimizer.zero_grad()
    model = LAYOUTS["fsdp1-nested"].wrap(model)
    model(GRADS).backward()
    optimizer.attach(model)
    optimizer.step()


def test_state_that_was_made_before_wrapping_is_refused(workers: Pool) -> None:
    workers(2).run_raises(ValueError, attached_too_late, match="laid out otherwise than when its state was made")


def test_tensors_are_numbered_by_the_model_from_attach_on() -> None:
    """Their numbers are what random bits are drawn by."""

    def weights(first_step: bool) -> list[Tensor]:
        model = Model(dtype=torch.bfloat16)
        optimizer = SM3(list(model.parameters())[::-1], lr=0.5, stochastic_rounding=True)
        if first_step:
            optimizer.step()  # without gradients: a plan, but no update
        optimizer.attach(model)
        for name, param in model.named_parameters():
            param.grad = GRADS[name].bfloat16()
        optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert all(map(torch.equal, weights(False), weights(True)))
