"""Recipes as classes: made from params and keywords alone, and the same as the methods of SM3 that they stand for."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import sm3_dist
from sm3_dist import SM3, AdamWLikeSM3

RECIPES = [pytest.param(AdamWLikeSM3, SM3.adamw_like, id="adamw_like")]
recipes = pytest.mark.parametrize(("recipe", "method"), RECIPES)


def trained(make: Callable[..., SM3], **options: object) -> tuple[SM3, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(70, 66)
    optimizer = make(model.parameters(), **options)
    for _ in range(3):
        train_once(model, optimizer)
    return optimizer, model


def train_once(model: nn.Module, optimizer: SM3) -> None:
    model(torch.linspace(-1, 1, 140).view(2, 70)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@recipes
@pytest.mark.parametrize(
    "options", [{}, {"lr": 2e-3, "momentum_dtype": torch.int8}, {"momentum": 0.0, "weight_decay": 0.1}]
)
def test_a_class_trains_as_its_method(recipe: type[SM3], method: Callable[..., SM3], options: dict) -> None:
    by_class, model = trained(recipe, **options)
    by_method, other = trained(method, **options)
    assert type(by_class) is recipe
    assert by_class.defaults == by_method.defaults
    assert torch.equal(model.weight, other.weight)


@recipes
def test_a_class_is_pickled_copied_and_loads_what_its_method_saved(
    recipe: type[SM3], method: Callable[..., SM3]
) -> None:
    by_class, model = trained(recipe)
    again = pickle.loads(pickle.dumps(by_class))
    assert type(again) is type(copy.deepcopy(by_class)) is recipe
    assert again.defaults.items() >= by_class.defaults.items()  # torch adds one of its own
    other = copy.deepcopy(model)
    by_method = method(other.parameters())
    by_method.load_state_dict(by_class.state_dict())
    train_once(model, by_class)
    train_once(other, by_method)
    assert torch.equal(model.weight, other.weight)


@recipes
def test_a_class_is_found_by_name_and_takes_groups(recipe: type[SM3], method: Callable[..., SM3]) -> None:
    assert getattr(sm3_dist, recipe.__name__) is recipe
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0, "lr": 0.5}]
    optimizer = recipe(groups, lr=1e-3, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1), (0.5, 0.0)]
