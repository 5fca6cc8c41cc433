"""Flattened parameters: weights and state equal one process's to the last bit, through each real wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flat_layouts import LAYOUTS, FlatLayout, Model, cases, clean, exact_gradient
from harness import Pool
from sampling import crossed
from torch import Tensor

from sm3_dist import SM3
from sm3_dist.layout.cover import grid
from sm3_dist.maths.reference import ReferenceState, reference_step

STEPS = 5
RECIPE: dict[str, Any] = {
    "momentum": 0.9,
    "beta": 0.95,
    "bias_correction": True,
    "nesterov": True,
    "update_rms": 0.2,
    "cover_block": 2,
    "cover_product": True,
}
OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.0, "beta": 0.0, "weight_decay": 0.0},
    {"momentum": 0.9, "beta": 0.95, "weight_decay": 0.1},
    RECIPE,
]


def wanted(layout: FlatLayout, step: int, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The gradients of a step. Some tensors have none now and then, and some blocks as a whole."""
    if layout.complete:
        return {name: exact_gradient(step, name, shape) for name, shape in shapes.items()}
    absent = {name for number, name in enumerate(shapes) if (step + number) % 4 == 3}
    absent |= {name for name in shapes if step == 3 and name.startswith("blocks.0.")}
    return {name: exact_gradient(step, name, shape) for name, shape in shapes.items() if name not in absent}


def received(layout: FlatLayout, grads: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """What the wrapper makes of it: zeros for the tensors that were flattened together with one that has a gradient."""
    units = {layout.unit(name) for name in grads}
    return grads | {
        name: torch.zeros(shape) for name, shape in shapes.items() if name not in grads and layout.unit(name) in units
    }


def compare_with_reference(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    rounding_seed: int | None = None,
    **keywords: Any,
) -> None:
    layout, block, momentum_dtype = LAYOUTS[name], options.get("cover_block"), keywords.get("momentum_dtype")
    whole = {key: weight.detach().clone() for key, weight in Model(layout.blocks, dtype).named_parameters()}
    shapes = {key: weight.shape for key, weight in whole.items()}
    numbers = {key: number for number, key in enumerate(whole)}
    states = {key: ReferenceState.zeros(weight, block, momentum_dtype) for key, weight in whole.items()}
    model = layout.wrap(Model(layout.blocks, dtype))
    if rounding_seed is not None:
        keywords |= {"stochastic_rounding": True, "rounding_seed": rounding_seed}
    optimizer = SM3(model.named_parameters(), lr=0.3, model=model, **options, **keywords)
    for step in range(STEPS):
        grads = wanted(layout, step, shapes)
        if grads:
            model(grads).backward()
        optimizer.step()
        optimizer.zero_grad(layout.set_to_none)
        for key, grad in received(layout, grads, shapes).items():
            rounding = None if rounding_seed is None else (rounding_seed, numbers[key])
            reference_step(whole[key], grad.to(dtype), states[key], lr=0.3, rounding=rounding, **options)
    for key, weight in layout.gather(model).items():
        assert torch.equal(weight, whole[key]), f"{name}, {options}, {key}"
    compare_states(optimizer, states, options)


def compare_states(optimizer: SM3, states: dict[str, ReferenceState], options: dict[str, Any]) -> None:
    """What this rank holds of accumulators and momentum are the slices of the reference's that it says they are."""
    assert optimizer.state  # waits for what is on its way
    for entry in optimizer._current_plan().entries:
        (state,) = [states[key] for key in states if f"({key})" in entry.label or f"'{key}'" in clean(entry.label)]
        for i, (part, stored) in enumerate(zip(entry.accumulators, entry.shard.stored, strict=True)):
            whole = state.accumulators[i].view(grid(entry.shard.shape, i, entry.shard.cover_block))
            expected = whole[tuple(map(slice, stored.start, stored.stop))]
            assert torch.equal(part, expected), f"{entry.describe()}, accumulator {i}"
        if entry.squares is not None and entry.shard.boxes:
            assert entry.squares.average == state.update_square_average, entry.describe()
        if options["momentum"]:
            assert entry.momentum_buffer is not None
            for box, moment in zip(entry.shard.boxes, entry.shard.state_views(entry.momentum_buffer), strict=True):
                at = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
                assert torch.equal(moment, state.momentum_buffer[at]), entry.describe()


@pytest.mark.sampled("name, world_size", list(cases()))
def test_the_recipe_equals_one_process(workers: Pool, name: str, world_size: int) -> None:
    """In every layout, of which edges cut its blocks."""
    workers(world_size).run(compare_with_reference, name, RECIPE)


@pytest.mark.sampled("name, world_size, options", crossed(cases(), range(len(OPTIONS))))
def test_equals_one_process(workers: Pool, name: str, world_size: int, options: int) -> None:
    workers(world_size).run(compare_with_reference, name, OPTIONS[options])


SHARDED_COVERS = [("fsdp1-nested", 3), ("fsdp1-flat-hybrid-shard", 4), ("fairscale-nested", 2)]


@pytest.mark.sampled("name, world_size, options", crossed(SHARDED_COVERS, range(len(OPTIONS))))
def test_equals_one_process_with_sharded_covers(workers: Pool, name: str, world_size: int, options: int) -> None:
    workers(world_size).run(compare_with_reference, name, OPTIONS[options], shard_covers=True)


NAMES_AND_TYPES = crossed(["fsdp1-nested", "fsdp1-flat-nested"], [torch.bfloat16, torch.float64])


@pytest.mark.sampled("name, dtype", NAMES_AND_TYPES, ids=str)
def test_equals_one_process_in_other_types(workers: Pool, name: str, dtype: torch.dtype) -> None:
    workers(2).run(compare_with_reference, name, OPTIONS[1], dtype)
