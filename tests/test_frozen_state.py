"""State of parameters that are frozen when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import Tensors, give, same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

from sm3_dist import SM3, MuonLikeSM3
from sm3_dist.checkpoint import TrainState, get_optimizer_state_dict, load, set_optimizer_state_dict
from sm3_dist.layout.describe import local_tensor

SHAPES = [(100, 70), (5, 3), (70,)]


def start() -> tuple[nn.Module, SM3, list[nn.Parameter]]:
    model: nn.Module = Tensors(SHAPES)
    if dist.is_initialized():
        model = fully_shard(model)
    return model, SM3.adamw_like(model.parameters(), lr=0.1), list(model.parameters())


def train(optimizer: SM3, params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        give(param, grad if param.requires_grad else None)
    optimizer.step()
    optimizer.zero_grad()


def thawed(way: str, folder: Path) -> list[str]:
    """Save with two of three frozen, one of which never had state; load with them frozen; thaw and go on."""
    model, optimizer, params = start()
    params[2].requires_grad_(False)
    for step in range(2):
        train(optimizer, params, step)
    params[0].requires_grad_(False)
    train(optimizer, params, 2)
    other_model, other, other_params = start()
    for frozen in (0, 2):
        other_params[frozen].requires_grad_(False)
    if way == "checkpoint":
        save({"train": TrainState(model, optimizer)}, checkpoint_id=folder)
        load({"train": TrainState(other_model, other)}, folder)
    else:
        options = StateDictOptions(full_state_dict=way == "whole")
        set_optimizer_state_dict(
            other_model, other, get_optimizer_state_dict(model, optimizer, options=options), options=options
        )
        other_model.load_state_dict(model.state_dict())
    found = [] if (other_params[0] in other.state, other_params[2] in other.state) == (True, False) else ["states"]
    for each in (params, other_params):
        each[0].requires_grad_(True)
    for step in range(3, 5):
        train(optimizer, params, step)
        train(other, other_params, step)
    for one, two in zip(params, other_params, strict=True):
        pairs = [(one, two), *((optimizer.state[one][key], other.state[two][key]) for key in optimizer.state[one])]
        found += [
            f"{tuple(a.shape)}" for a, b in pairs if not torch.equal(*map(local_tensor, (a.detach(), b.detach())))
        ]
    return found


@pytest.mark.parametrize("way", ["checkpoint", "live", "whole"])
def test_frozen_state_is_restored(workers: Pool, tmp_path: Path, way: str) -> None:
    assert workers(2).run(thawed, way, tmp_path) == [[], []]


def test_nothing_is_left_of_a_load_that_failed() -> None:
    model, optimizer, params = start()
    train(optimizer, params, 0)
    saved = get_optimizer_state_dict(model, optimizer)
    name = next(iter(saved["state"]))
    saved["state"][name]["momentum_buffer"] = torch.zeros(2, 2)
    other_model, other, other_params = start()
    other_params[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"momentum_buffer of .* has shape \(2, 2\)"):
        set_optimizer_state_dict(other_model, other, saved)
    assert other_params[0] not in other.state


def thawed_with_sharded_covers(recipe: str) -> list[str]:
    """Names of what is not as in one process after a plan that was made anew, for which the ranks exchange words."""
    make = {"paper": SM3, "recipe": SM3.adamw_like, "orthogonal": MuonLikeSM3}[recipe]
    models = [fully_shard(Tensors(SHAPES)), Tensors(SHAPES)]
    optimizers = [
        make(model.named_parameters(), lr=0.1, shard_covers=covers)
        for model, covers in zip(models, (True, False), strict=True)
    ]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            params = list(model.parameters())
            params[1].requires_grad_(step > 2)
            train(optimizer, params, step)
    sharded, whole = optimizers
    found = []
    for (name, param), alone in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        pairs = [(name, param, alone.detach())]
        pairs += [(f"{key} of {name}", sharded.state[param][key], value) for key, value in whole.state[alone].items()]
        found += [what for what, tensor, expected in pairs if not same(tensor, expected)]
    return found


@pytest.mark.parametrize("recipe", ["paper", "recipe", "orthogonal"])
def test_with_sharded_covers_a_thawed_parameter_costs_the_others_nothing(workers: Pool, recipe: str) -> None:
    assert workers(2).run(thawed_with_sharded_covers, recipe) == [[], []]
