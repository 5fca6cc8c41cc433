"""What PyTorch itself offers for saving optimizers works on SM3, and loses nothing."""

from __future__ import annotations

import io
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from moving import LAYOUTS, STEPS, Wrapped, build, differences, expected, spoil, train, trained, with_recipe
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from sm3_dist.checkpoint import get_optimizer_state_dict as get_state_dict_by_name
from sm3_dist.checkpoint import set_optimizer_state_dict as set_state_dict_by_name

BY_TORCH = ("ddp", "fsdp2", "hsdp", "tp_fsdp2")
FSDP1 = ("fsdp1", "fsdp1_flat")


def save_with_torch(folder: Path, name: str, world: int) -> None:
    wrapped = build(name, world)
    train(wrapped, range(STEPS))
    model, optimizer = get_state_dict(*wrapped)
    save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def load_with_torch(folder: Path, name: str, world: int) -> list[str]:
    wrapped = build(name, world)
    model, optimizer = get_state_dict(*wrapped)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    load(state, checkpoint_id=folder)
    set_state_dict(*wrapped, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = differences(wrapped, expected(STEPS))
    train(wrapped, range(STEPS, 2 * STEPS))
    return found + differences(wrapped, expected(2 * STEPS))


@pytest.mark.parametrize("source", BY_TORCH)
def test_distributed_checkpoint_of_torch(workers: Pool, tmp_path: Path, source: str) -> None:
    workers(4).run(save_with_torch, tmp_path, source, 4)
    for target in BY_TORCH:
        assert workers(2).run(load_with_torch, tmp_path, target, 2) == [[], []], target


def whole_and_back(world: int) -> list[str]:
    """Gather whole tensors with torch's function in every layout that it knows, and set them in every other."""
    found = []
    options = StateDictOptions(full_state_dict=True)
    for source in BY_TORCH:
        wrapped = build(source, world)
        train(wrapped, range(STEPS))
        model, optimizer = get_state_dict(*wrapped, options=options)
        for target in ("ddp", "fsdp2", "hsdp"):  # torch cannot set whole tensors of uneven size under tp_fsdp2
            other = build(target, world)
            set_state_dict(*other, model_state_dict=dict(model), optim_state_dict=optimizer, options=options)
            found += [f"{source} to {target}: {what}" for what in differences(other, expected(STEPS))]
    return found


def test_whole_tensors_of_torch(workers: Pool) -> None:
    assert workers(4).run(whole_and_back, 4) == [[]] * 4


def from_run_to_run(world: int, options: StateDictOptions) -> list[str]:
    """Load with torch's functions what was saved after such a load."""
    found = []
    for name in ("ddp", "fsdp2", "hsdp"):
        wrapped = build(name, world)
        train(wrapped, range(STEPS))
        for start in (STEPS, 2 * STEPS):
            model, optimizer = get_state_dict(*wrapped, options=options)
            wrapped = build(name, world)
            set_state_dict(*wrapped, model_state_dict=model, optim_state_dict=optimizer, options=options)
            train(wrapped, range(start, start + STEPS))
        found += [f"{name}: {what}" for what in differences(wrapped, expected(3 * STEPS))]
    return found


@pytest.mark.parametrize("full", [True, False])
def test_a_run_that_was_resumed_is_resumed_again(workers: Pool, full: bool) -> None:
    assert workers(2).run(from_run_to_run, 2, StateDictOptions(full_state_dict=full)) == [[], []]


def test_what_pytorch_adds_to_defaults_is_not_saved() -> None:
    """Nor kept, where it was saved before; a group that is added later would differ from the others in it."""
    model, optimizer = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["differentiable"] = False
    optimizer.load_state_dict(saved)
    named = get_state_dict_by_name(model, optimizer)
    for group in (*optimizer.param_groups, *optimizer.state_dict()["param_groups"], *named["param_groups"]):
        assert "differentiable" not in group
    named["param_groups"][0]["differentiable"] = False
    set_state_dict_by_name(model, optimizer, named)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert not any("differentiable" in group for group in optimizer.param_groups)


def through_fsdp1(source: str, target: str, world: int, full: bool) -> list[str]:
    """Save with ``FSDP.optim_state_dict`` and load with ``FSDP.optim_state_dict_to_load``."""
    first, second = build(source, world), build(target, world)
    train(first, range(STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for wrapped in (first, second):
            kind: Any = (StateDictType.SHARDED_STATE_DICT,)
            if full:
                # Offloading to the CPU from the CPU, torch returns one buffer for all states: try AdamW.
                offload = {"offload_to_cpu": False}
                configs = FullStateDictConfig(**offload), FullOptimStateDictConfig(**offload)
                kind = (StateDictType.FULL_STATE_DICT, *configs)
            FullyShardedDataParallel.set_state_dict_type(wrapped.model, *kind)
        weights = first.model.state_dict()
        state = FullyShardedDataParallel.optim_state_dict(*first)
        second.model.load_state_dict(weights)
        loadable = FullyShardedDataParallel.optim_state_dict_to_load(second.model, second.optimizer, state)
    second.optimizer.load_state_dict(loadable)
    second.optimizer.state_dict()  # may be saved again before a step
    found = differences(second, expected(STEPS)) + scalars(second, STEPS)
    train(second, range(STEPS, 2 * STEPS))
    return found + differences(second, expected(2 * STEPS)) + scalars(second, 2 * STEPS)


def scalars(wrapped: Wrapped, steps: int) -> list[str]:
    """Averages of squares that this rank would save and one process would not. Any rank may be the one that saves."""
    groups = wrapped.optimizer.state_dict()["param_groups"]
    saved = {name: value for group in groups for name, value in group.get("update_square_averages", {}).items()}
    key = "update_square_average"
    wanted = {name: state[key].item() for name, state in expected(steps).state.items() if key in state}
    return [] if saved == wanted else [f"saves {saved} and not {wanted}"]


# Recipe and target in one column, and the recipe on several ranks: some then hold none of a tensor, but its average.
THROUGH_FSDP1 = [
    (options, source, world, full)
    for options, source, world, full in product(product(["recipe", "paper"], FSDP1), FSDP1, [1, 2, 3, 4], [True, False])
    if options[0] == "paper" or world > 1
]


@pytest.mark.sampled(
    "options, source, world, full",
    THROUGH_FSDP1,
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else {True: "full", False: "sharded"}.get(value),
)
def test_fsdp1_of_torch(workers: Pool, options: tuple[str, str], source: str, world: int, full: bool) -> None:
    recipe, target = options[0] == "recipe", options[1]
    with_settings = (with_recipe,) if recipe else ()
    what = (*with_settings, through_fsdp1, source, target, world, full)
    assert workers(world).run(*what) == [[]] * world


def without_averages(world: int) -> None:
    _, optimizer = build("fsdp1", world)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": 1.0, "cover_minimum": torch.zeros_like(optimizer.param_groups[0]["params"][0])}}
    optimizer.load_state_dict(saved)


def test_a_state_of_flattened_parameters_without_averages_is_refused(workers: Pool) -> None:
    match = "update_rms=1.0, but its update_square_averages have nothing of"
    workers(2).run_raises(ValueError, with_recipe, without_averages, 2, match=match)


def through_torch_save(world: int) -> list[str]:
    """``torch.save`` and a ``torch.load`` that runs nothing, in every layout but OSS, which must consolidate first."""
    found = []
    for name in LAYOUTS:
        if name == "oss":  # see test_flat_oss.py
            continue
        wrapped = build(name, world)
        train(wrapped, range(STEPS))
        file = io.BytesIO()
        torch.save(wrapped.optimizer.state_dict(), file)
        file.seek(0)
        spoil(wrapped, weights_too=False)
        wrapped.optimizer.load_state_dict(torch.load(file, weights_only=True))
        found += [f"{name}: {what}" for what in differences(wrapped, expected(STEPS))]
        train(wrapped, range(STEPS, 2 * STEPS))
        found += [f"{name} went on: {what}" for what in differences(wrapped, expected(2 * STEPS))]
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_torch_save_and_load_of_state_dict(workers: Pool, world: int) -> None:
    assert workers(world).run(through_torch_save, world) == [[]] * world


def dummy_step(world: int, names: tuple[str, ...]) -> list[Any]:
    """Have torch make the state of a fresh optimizer. What is not as it was."""
    found = []
    for name in names:
        wrapped = build(name, world)
        state = get_optimizer_state_dict(*wrapped)
        if not state["state"]:
            found.append(f"{name}: torch took no step")
        found += [f"{name}: {what}" for what in differences(wrapped, expected(0))]
    return found


def test_step_that_torch_takes_to_make_the_state_changes_nothing(workers: Pool) -> None:
    assert workers(3).run(dummy_step, 3, (*BY_TORCH, *FSDP1)) == [[]] * 3
