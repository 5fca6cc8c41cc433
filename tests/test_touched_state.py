"""The state that a person sees is the state that is used, whoever moves, replaces, edits or reinterprets it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from against_eager import needs_c
from harness import Pool
from layouts import Tensors, give, same
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sm3_dist import SM3
from sm3_dist.checkpoint import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from sm3_dist.ranks.bucket import MaxBucket
from sm3_dist.step.param_groups import ADAMW_LIKE
from sm3_dist.step.plan import StepPlan

OPTIONS: dict[str, dict[str, Any]] = {"paper": {"momentum": 0.9}, "recipe": ADAMW_LIKE}
SHAPES = [(100, 70), (4, 3, 3, 3), (70,)]
FULL = StateDictOptions(full_state_dict=True)
FACTORS = {"accumulator_0": 0.25, "accumulator_1": 0.5, "accumulator_2": 0.75}  # change products of covers too


def replace_all(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> None:
    for key, value in state.items():
        state[key] = change(value)


def share(state: dict[str, Any]) -> None:
    for value in state.values():
        value.share_memory_()


def move(state: dict[str, Any]) -> None:
    for value in state.values():
        value.data = value.data.clone()


def offload(state: dict[str, Any]) -> None:
    replace_all(state, torch.clone)


def widen(state: dict[str, Any]) -> None:
    replace_all(state, lambda value: value.double() if value.is_floating_point() else value)


def widen_in_place(state: dict[str, Any]) -> None:
    for value in state.values():
        value.data = value.data.double() if value.is_floating_point() else value.data


def spread(state: dict[str, Any]) -> None:
    """Other strides, which no kernel takes."""
    replace_all(state, lambda value: torch.stack([value, value], dim=-1)[..., 0])


CHANGES = [share, move, offload, widen, widen_in_place, spread]


def train(optimizer: SM3, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in optimizer.param_groups[0]["params"]:
            give(param, torch.randn(param.shape, generator=generator).to(param.dtype))
        optimizer.step()


def optimizer_of(model: nn.Module, options: str, **others: Any) -> SM3:
    return SM3(model.parameters(), lr=0.1, **OPTIONS[options], **others)


def differences(optimizer: SM3, other: SM3) -> list[str]:
    """What differs in weights, state and ``state_dict()``."""
    found = []
    saved = optimizer.state_dict()["state"]
    for number, pair in enumerate(zip(*(each.param_groups[0]["params"] for each in (optimizer, other)), strict=True)):
        (param, wanted), shape = pair, tuple(pair[0].shape)
        found += [] if same(param, wanted.detach()) else [f"weight of {shape}"]
        for key, value in other.state[wanted].items():
            for state in (optimizer.state[param], saved[number]):
                found += [] if same(state[key], value) else [f"{key} of {shape}"]
    return found


@pytest.mark.parametrize("backend", ["eager", pytest.param("c", marks=needs_c)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_steps_go_on(change: Callable[[dict[str, Any]], None], options: str, backend: str) -> None:
    model, untouched = (optimizer_of(Tensors(SHAPES), options, backend=backend) for _ in range(2))
    train(untouched, range(4))
    train(model, range(2))
    for state in model.state.values():
        change(state)
    strangers = [torch.full(shape, 7.0) for shape in SHAPES for _ in range(9)]
    train(model, range(2, 4))
    assert differences(model, untouched) == []
    assert all(bool((stranger == 7).all()) for stranger in strangers)


@pytest.mark.parametrize("backend", ["eager", pytest.param("c", marks=needs_c)])
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_laid_out_anew(options: str, backend: str) -> None:
    module, other = (Tensors([(8, 6, 5, 5), (6, 6)]) for _ in range(2))
    model, untouched = (optimizer_of(each, options, backend=backend) for each in (module, other))
    for step in range(4):
        if step == 2:
            convolution, square = module.parameters()
            convolution.data = convolution.data.contiguous(memory_format=torch.channels_last)
            square.data.copy_(square.data.t().clone())  # at the same address, other strides
            square.data = square.data.t()
        for optimizer in (model, untouched):
            train(optimizer, range(step, step + 1))
    assert differences(model, untouched) == []


@pytest.mark.parametrize("backend", ["eager", pytest.param("c", marks=needs_c)])
@pytest.mark.parametrize("options", OPTIONS)
def test_state_laid_out_anew_where_it_is(options: str, backend: str) -> None:
    """What a person sees then, transposed, is what is used."""
    model, copied = (optimizer_of(Tensors([(6, 6)]), options, backend=backend) for _ in range(2))
    for optimizer in (model, copied):
        train(optimizer, range(2))
    ((state, wanted),) = zip(model.state.values(), copied.state.values(), strict=True)
    state["momentum_buffer"].t_()
    wanted["momentum_buffer"].copy_(wanted["momentum_buffer"].t().clone())
    for optimizer in (model, copied):
        train(optimizer, range(2, 4))
    assert differences(model, copied) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_of_another_type(options: str, dtype: torch.dtype) -> None:
    """The state follows, as that of an optimizer made for this type would when it is loaded."""
    module, other = Tensors(SHAPES), Tensors(SHAPES, dtype)
    optimizer, loaded = (optimizer_of(each, options) for each in (module, other))
    train(optimizer, range(2))
    module.to(dtype)
    loaded.load_state_dict(optimizer.state_dict())
    other.load_state_dict(module.state_dict())
    for each in (optimizer, loaded):
        each.zero_grad()
        train(each, range(2, 4))
    assert differences(optimizer, loaded) == []


def test_a_state_of_another_shape_is_refused() -> None:
    optimizer = optimizer_of(Tensors(SHAPES), "recipe")
    train(optimizer, range(1))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["momentum_buffer"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 .* has shape \(3, 3\)"):
        train(optimizer, range(1, 2))


@pytest.mark.parametrize("backend", ["eager", pytest.param("c", marks=needs_c)])
def test_reset(backend: str) -> None:
    """Entries set to zero, or deleted, are zero."""
    optimizer, fresh = (optimizer_of(Tensors(SHAPES), "paper", backend=backend) for _ in range(2))
    train(optimizer, range(2))
    for (param, state), new in zip(optimizer.state.items(), fresh.param_groups[0]["params"], strict=True):
        replace_all(state, torch.zeros_like)
        del state["step"]
        new.data.copy_(param.data)
    train(optimizer, range(2, 4))
    train(fresh, range(2, 4))
    assert differences(optimizer, fresh) == []


def sharded(way: str, backend: str) -> list[str]:
    """Blocks of 64 rows are cut; each way of editing is done to one process's state too."""
    modules = fully_shard(Tensors(SHAPES)), Tensors(SHAPES)
    model, whole = (optimizer_of(module, "recipe", backend=backend) for module in modules)
    for module, optimizer in zip(modules, (model, whole), strict=True):
        train(optimizer, range(2))
        if way == "loaded":  # after gradients that made all accumulators larger than those loaded
            saved = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=FULL))
            for param in module.parameters():
                give(param, torch.full(param.shape, 100.0))
            optimizer.step()
            set_optimizer_state_dict(module, optimizer, saved, options=FULL)
        if way == "frozen":  # a plan is made anew, and what the one before worked out is in the state
            optimizer.param_groups[0]["params"][2].requires_grad_(False)
            optimizer._current_plan()
            continue
        for state in optimizer.state.values():
            for key in state:
                if way == "in place" and key in FACTORS:
                    state[key].mul_(FACTORS[key])
                elif way == "replaced" and key in FACTORS:
                    state[key] = state[key] * FACTORS[key]
                elif way == "moved here" and dist.get_rank() == 0 and not isinstance(state[key], DTensor):
                    state[key] = state[key].clone()
                elif way == "moved here" and dist.get_rank() == 0:
                    local = state[key].to_local()
                    local.untyped_storage().share_memory_()
        if way == "read":
            optimizer.state_dict()
        train(optimizer, range(2, 4))
    return differences(model, whole)


@pytest.mark.parametrize("way", ["in place", "replaced", "moved here", "read", "frozen", "loaded"])
def test_sharded(workers: Pool, way: str) -> None:
    assert workers(3).run(sharded, way, "auto") == [[]] * 3


def replaced_while_maxima_travel() -> tuple[list[bool], list[str]]:
    """And with another layout, of which the buckets in which they travel tell the other ranks next."""
    under_way: list[bool] = []
    tell = StepPlan.tell

    def noted(plan: StepPlan, event: str, words: str) -> None:
        under_way.extend(bucket.pending for bucket in plan.buckets if isinstance(bucket, MaxBucket))
        tell(plan, event, words)

    optimizers = []
    for model in (fully_shard(Tensors([(6, 4)] * 3)), Tensors([(6, 4)] * 3)):
        *early, late = model.parameters()
        optimizers.append(SM3(early))
        train(optimizers[-1], range(2))
        optimizers[-1].state = defaultdict(dict)
        optimizers[-1].param_groups[0]["params"].append(late)
        with patch.object(StepPlan, "tell", noted):
            train(optimizers[-1], range(2, 4))
    return under_way, differences(*optimizers)


def test_a_state_that_is_replaced_while_maxima_travel(workers: Pool) -> None:
    assert workers(2).run(replaced_while_maxima_travel) == [([False], [])] * 2
