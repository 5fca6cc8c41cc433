"""Momentum in 8 bits: the published table, right on average, and moved between types, wrappers and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import moving
import pytest
import test_torch_state_dict
import torch
from harness import Pool
from test_maths import gradients, trained
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save

from sm3_dist import SM3
from sm3_dist.checkpoint import CheckpointError, TrainState, get_optimizer_state_dict, load, set_optimizer_state_dict
from sm3_dist.maths.momentum_code import converted, decode, encode
from sm3_dist.maths.reference import code_values

CODES = torch.arange(-128, 128).to(torch.int8)
EIGHT_BITS: dict[str, Any] = {"momentum": 0.9, "momentum_dtype": torch.int8}


def test_the_table_is_that_of_the_specification() -> None:
    values = torch.tensor(code_values())[CODES.long()]
    assert torch.equal(decode(CODES).nan_to_num(9), values.nan_to_num(9))
    assert values[0].isnan()
    assert torch.equal(values[1:], values[1:].sort().values)
    for noise in (0, 1, 65535):
        assert torch.equal(encode(decode(CODES), torch.full(CODES.shape, noise, dtype=torch.int32)), CODES)


def test_a_value_goes_to_one_of_its_neighbours_and_is_right_on_average() -> None:
    """With all 2^16 values of the noise: not by chance."""
    noise = torch.arange(1 << 16, dtype=torch.int32)
    table = torch.tensor(code_values()[:128]).double()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.cat([1.9375 * torch.exp2(-22 * torch.rand(30, generator=generator)), table[1:-1:7] + 2**-18])
    for length in lengths.float().tolist():
        at = int((table <= length).sum()) - 1
        low, high = table[at], table[at + 1]
        for sign in (1, -1):
            values = sign * decode(encode(torch.full(noise.shape, sign * length), noise)).double()
            assert bool(((values == low) | (values == high)).all())
            assert abs(values.mean() - length) <= (high - low) / 2**16


def test_what_is_out_of_range() -> None:
    values = [1.9375, 2.0, torch.inf, -8.0, -torch.inf, torch.nan, 1e-40, -0.0]
    for noise in (0, 65535):
        codes = encode(torch.tensor(values), torch.full((8,), noise, dtype=torch.int32))
        assert codes.tolist() == [127, 127, 127, -127, -127, -128, 0, 0]


def test_it_is_rounded_stochastically_whatever_becomes_of_bfloat16() -> None:
    """Each step adds less than half the distance between two codes: to the nearest, momentum would stand still."""
    grads = [torch.ones(200, 200, dtype=torch.bfloat16)] * 40
    start = torch.ones(200, 200, dtype=torch.bfloat16)
    options: dict[str, Any] = {"momentum": 0.99, "beta": 0.5, "lr": 1e-4}
    _, wide = trained(start, grads, **options)
    weight, narrow = trained(start, grads, momentum_dtype=torch.int8, **options)
    expected = wide["momentum_buffer"].double().mean().item()
    assert decode(narrow["momentum_e3m4"]).double().mean().item() == pytest.approx(expected, rel=0.005)
    assert torch.equal(weight, start)  # rounded to the nearest: these steps are lost
    stochastic, _ = trained(start, grads, momentum_dtype=torch.int8, stochastic_rounding=True, **options)
    assert not torch.equal(stochastic, start)


def test_state_is_loaded_in_the_type_of_the_optimizer() -> None:
    model = nn.Linear(4, 3, bias=False)

    def optimizer(dtype: torch.dtype) -> SM3:
        return SM3(model.named_parameters(), momentum=0.9, momentum_dtype=dtype)

    for source in (torch.float32, torch.bfloat16, torch.int8):
        saved = optimizer(source)
        (model.weight.grad,) = gradients((3, 4), 1)
        saved.step()
        (momentum,) = [value for key, value in saved.state[model.weight].items() if "momentum" in key]
        for target in (torch.float32, torch.bfloat16, torch.int8):
            key = "momentum_e3m4" if target == torch.int8 else "momentum_buffer"
            by_position, by_name = optimizer(target), optimizer(target)
            by_position.load_state_dict(saved.state_dict())
            set_optimizer_state_dict(model, by_name, get_optimizer_state_dict(model, saved))
            for loaded in (by_position, by_name):
                (found,) = [value for name, value in loaded.state[model.weight].items() if "momentum" in name]
                assert found is loaded.state[model.weight][key]
                assert found.dtype == target
                assert torch.equal(found, converted(momentum, target))
    assert decode(converted(momentum, torch.int8)).abs().max() > 0.05


def test_codes_are_not_taken_for_values(tmp_path: Path) -> None:
    """torch.distributed.checkpoint casts silently what it loads in place."""
    model = nn.Linear(4, 3)
    save({"train": TrainState(model, SM3(model.parameters(), momentum=0.9))}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match="momentum_e3m4"):
        load({"train": TrainState(model, SM3(model.parameters(), **EIGHT_BITS))}, tmp_path, no_dist=True)


class OfAnotherTable(TrainState):
    """Saves momentum as releases did that had another table."""

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for state in found["optimizer"]["state"].values():
            state["momentum_code"] = state.pop("momentum_e3m4")
        return found


def trained_in(options: dict[str, Any]) -> tuple[nn.Linear, SM3]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = SM3(model.parameters(), **EIGHT_BITS | options)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": None}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("way", ["load_state_dict", "set_optimizer_state_dict", "load"])
def test_codes_of_another_table_are_refused(way: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = trained_in({})
    other, loading = trained_in(options)
    by_position, by_name = copy.deepcopy((optimizer.state_dict(), get_optimizer_state_dict(model, optimizer)))
    for saved in (by_position, by_name):
        for state in saved["state"].values():
            state["momentum_code"] = state.pop("momentum_e3m4")
    save({"train": OfAnotherTable(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    ways: dict[str, Callable[[], None]] = {
        "load_state_dict": lambda: loading.load_state_dict(by_position),
        "set_optimizer_state_dict": lambda: set_optimizer_state_dict(other, loading, by_name),
        "load": lambda: load({"train": TrainState(other, loading)}, tmp_path, no_dist=True),
    }
    before = {key: value.clone() for key, value in loading.state[other.weight].items()}
    with pytest.raises(CheckpointError if way == "load" else ValueError, match=r"has momentum_code, .* 3 of mantissa"):
        ways[way]()
    assert all(torch.equal(loading.state[other.weight][key], value) for key, value in before.items())


def test_what_is_said_to_do_with_codes_of_another_table(tmp_path: Path) -> None:
    """Zeros in their place, or a checkpoint without them: momentum starts at 0, and the rest is there."""
    model, optimizer = trained_in({})
    by_position, by_name = copy.deepcopy((optimizer.state_dict(), get_optimizer_state_dict(model, optimizer)))
    for saved in (by_position, by_name):
        for state in saved["state"].values():
            state["momentum_e3m4"] = torch.zeros_like(state["momentum_e3m4"])
    save({"train": OfAnotherTable(model, optimizer, step=7)}, checkpoint_id=tmp_path, no_dist=True)
    expected = optimizer.state[model.weight]
    for way in range(3):
        other = nn.Linear(4, 3)
        loading = SM3(other.parameters(), **EIGHT_BITS)
        if way == 0:
            loading.load_state_dict(by_position)
        elif way == 1:
            set_optimizer_state_dict(other, loading, by_name)
        else:
            state = TrainState(other, loading)
            planner = DefaultLoadPlanner(allow_partial_load=True)
            torch_load({"train": state}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
            assert state.step == 7
            assert torch.equal(other.weight, model.weight)
        found = loading.state[other.weight]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected if key != "momentum_e3m4")
        assert found["momentum_e3m4"].count_nonzero() == 0
        assert expected["momentum_e3m4"].count_nonzero() == 12


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 4, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(NotImplementedError, match="momentum=0"):
        SM3(embedding.parameters(), **EIGHT_BITS).step()
    before = embedding.weight.detach().clone()
    SM3([{"params": embedding.parameters(), "momentum": 0.0}], **EIGHT_BITS).step()
    assert not torch.equal(embedding.weight, before)


FLAT = ("fsdp1", "fsdp1_flat")
# Flat ranges, rectangles, replicas and rows, that cut elsewhere each.
SOURCES = [("fsdp1", 3), ("zero", 3), ("tp_fsdp2", 4)]
TARGETS = [("single", 1), ("fairscale", 2), ("fsdp2", 3), ("fsdp1_flat", 4)]


def through_fsdp1(source: str, target: str, full: bool) -> list[str]:
    with patch.dict(moving.SETTINGS, EIGHT_BITS):
        return test_torch_state_dict.through_fsdp1(source, target, 3, full)


def test_fsdp1_of_torch_gathers_and_cuts_it(workers: Pool) -> None:
    """It wants one type for all state: the codes pass as their values."""
    for full, (source, target) in zip((True, False), (FLAT, FLAT[::-1]), strict=True):
        assert workers(3).run(through_fsdp1, source, target, full) == [[]] * 3


def save_one(folder: Path, name: str, world: int) -> list[str]:
    with patch.dict(moving.SETTINGS, EIGHT_BITS):
        wrapped = moving.build(name, world)
        moving.train(wrapped, range(moving.STEPS))
        writer = FileSystemWriter(folder / f"{name}-{world}", sync_files=False)
        save({"train": TrainState(*wrapped, step=moving.STEPS)}, storage_writer=writer)
        return moving.differences(wrapped, moving.expected(moving.STEPS))


def load_one(folder: Path, world: int, name: str) -> list[str]:
    with patch.dict(moving.SETTINGS, EIGHT_BITS):
        return moving.load_all(folder, world, name)


def test_checkpoints_hold_codes_and_move(workers: Pool, tmp_path: Path) -> None:
    for name, world in SOURCES:
        assert workers(world).run(save_one, tmp_path, name, world) == [[]] * world
    for name, world in TARGETS:
        assert workers(world).run(load_one, tmp_path, world, name) == [[]] * world
