"""Sets of options, and the comparison of a wrapped module with the reference: to the last bit."""

from typing import Any

import torch
from layouts import LAYOUTS, Tensors, give, same
from test_layouts import STEPS, gradient
from torch import Tensor

from sm3_dist import SM3
from sm3_dist.maths.reference import ReferenceState, reference_step

EVERYTHING: dict[str, Any] = {
    "momentum": 0.9,
    "beta": 0.95,
    "weight_decay": 0.1,
    "bias_correction": True,
    "nesterov": True,
    "update_rms": 0.2,
    "cover_block": 2,
    "cover_product": True,
}
OPTIONS: list[dict[str, Any]] = [
    EVERYTHING,
    {"momentum": 0.9, "beta": 0.95, "bias_correction": True},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
    {"beta": 0.95, "update_rms": 0.2},
    {"momentum": 0.9, "update_rms": 0.01, "cover_block": 3},
    {"cover_block": 3, "cover_product": True},
    {"momentum": 0.9},
    {"beta": 0.9, "cover_block": 1},
    {"momentum": 0.5, "cover_block": 100},
]


def some_gradient(step: int, number: int, shape: torch.Size) -> Tensor | None:
    """Of the first parameter one element alone has a gradient at first: when all have, ``update_rms`` cuts them off."""
    grad = gradient(step, number, shape)
    if number == 0 and grad is not None and step < STEPS - 1:
        grad.view(-1)[1:] = 0
    return grad


def compare_with_reference(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    rounding_seed: int | None = None,
    **keywords: Any,
) -> None:
    """Train a wrapped module and whole tensors side by side."""
    layout, block = LAYOUTS[name], options.get("cover_block")
    whole = [weight.detach().clone() for weight in Tensors(layout.shapes, dtype).parameters()]
    states = [ReferenceState.zeros(weight, block, keywords.get("momentum_dtype")) for weight in whole]
    model = layout.wrap(Tensors(layout.shapes, dtype))
    if rounding_seed is not None:
        keywords |= {"stochastic_rounding": True, "rounding_seed": rounding_seed}
    optimizer = SM3(model.named_parameters(), lr=0.3, **options, **keywords)
    for step in range(STEPS):
        for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
            grad = some_gradient(step, number, weight.shape)
            grad = None if grad is None else grad.to(dtype)
            give(param, grad)
            if grad is not None:
                rounding = None if rounding_seed is None else (rounding_seed, number)
                reference_step(weight, grad, state, lr=0.3, rounding=rounding, **options)
        optimizer.step()
    held, plan = optimizer.state, optimizer._current_plan()
    for entry, param, weight, state in zip(plan.entries, model.parameters(), whole, states, strict=True):
        where = f"{name}, {options}, shape {tuple(weight.shape)}"
        assert same(param, weight), where
        for i, (part, accumulator) in enumerate(zip(entry.accumulators, state.accumulators, strict=True)):
            rectangle = entry.shard.stored[i]
            grid = [n if d == i else 1 for d, n in enumerate(weight.shape)] if block is None else accumulator.shape
            expected = accumulator.view(grid)[tuple(map(slice, rectangle.start, rectangle.stop))]
            assert torch.equal(part, expected), f"{where}, accumulator {i}, entries {rectangle}"
        if options.get("momentum"):
            for box, moment in zip(entry.shard.boxes, entry.shard.state_views(entry.momentum_buffer), strict=True):
                expected = state.momentum_buffer.view(entry.shard.shape)[tuple(map(slice, box.start, box.stop))]
                assert moment.dtype == expected.dtype
                assert torch.equal(moment, expected), f"{where}, momentum of {box}"
        if options.get("update_rms") and (entry.shard.boxes or not entry.shard.replicated):
            assert held[param]["update_square_average"].item() == state.update_square_average, where
