"""The recipe that makes matrices orthogonal, through a checkpoint from two ranks to three: PyTorch's, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as torch_way
from harness import Pool
from layouts import LAYOUTS, Tensors, give, same
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import sm3_dist.checkpoint as our_way
from sm3_dist import MuonLikeSM3

SHAPES = [(10, 6), (3, 7), (9,), (3, 5, 2)]  # two matrices and others
WAYS: dict[str, Any] = {"torch": torch_way, "sm3_dist": our_way}
NARROW = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
STEPS = 2


def start(layout: str, momentum: str) -> tuple[nn.Module, MuonLikeSM3]:
    model = LAYOUTS[layout].wrap(Tensors(SHAPES)) if layout else Tensors(SHAPES)
    options: dict[str, Any] = {"lr": 0.1, "cover_block": 2, "momentum_dtype": NARROW[momentum]}
    optimizer = MuonLikeSM3(model.named_parameters(), model=model, stochastic_rounding=True, **options)
    assert [len(group["params"]) for group in optimizer.param_groups if group["orthogonalize"]] == [2]
    return model, optimizer


def train(model: nn.Module, optimizer: MuonLikeSM3, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            give(param, torch.randn(param.shape, generator=generator))
        optimizer.step()


def differences(model: nn.Module, optimizer: MuonLikeSM3, momentum: str, steps: int) -> list[str]:
    """What this rank has otherwise than one process after so many steps."""
    whole, alone = start("", momentum)
    train(whole, alone, range(steps))
    found = []
    for (name, param), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
        state, expected = optimizer.state[param], alone.state[wanted]
        assert state.keys() == expected.keys()
        found += [f"{key} of {name}" for key in state if not same(state[key], expected[key])]
        found += [] if same(param, wanted.detach()) else [name]
    return found


def save_it(folder: Path, way: str, momentum: str) -> list[str]:
    model, optimizer = start("fsdp2", momentum)
    train(model, optimizer, range(STEPS))
    weights, state = WAYS[way].get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return differences(model, optimizer, momentum, STEPS)


def load_it(folder: Path, way: str, momentum: str) -> list[str]:
    model, optimizer = start("fsdp2", momentum)
    weights, state = WAYS[way].get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    (our_way.load if way == "sm3_dist" else load)(loaded, checkpoint_id=folder)
    WAYS[way].set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    found = differences(model, optimizer, momentum, STEPS)
    train(model, optimizer, range(STEPS, STEPS + 1))
    return found + [f"{what}, later" for what in differences(model, optimizer, momentum, STEPS + 1)]


@pytest.mark.parametrize(("way", "momentum"), [("torch", "int8"), ("sm3_dist", "int8"), ("sm3_dist", "bfloat16")])
def test_from_two_ranks_to_three(workers: Pool, tmp_path: Path, way: str, momentum: str) -> None:
    assert workers(2).run(save_it, tmp_path, way, momentum) == [[]] * 2
    assert workers(3).run(load_it, tmp_path, way, momentum) == [[]] * 3
