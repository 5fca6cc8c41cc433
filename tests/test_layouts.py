"""Layout invariance: weights and state equal one process's to the last bit, however the parameters are cut."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import LAYOUTS, Tensors, cases, full, give, same
from sampling import crossed
from torch import Tensor

from sm3_dist import SM3
from sm3_dist.maths.reference import ReferenceState, reference_step

STEPS = 5
OPTIONS: list[dict[str, Any]] = [
    {"momentum": momentum, "beta": beta, "weight_decay": decay, "maximize": maximize}
    for momentum, beta, (decay, maximize) in itertools.product([0.0, 0.9], [0.0, 0.95], [(0.0, False), (0.1, True)])
]


def gradient(step: int, number: int, shape: torch.Size) -> Tensor | None:
    """The full gradient of a parameter in a step. Some parameters have none now and then, one never has any."""
    if (step + number) % 4 == 3 or number == 4:
        return None
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(shape, generator=generator) * 10 ** (number % 3 - 1)


def compare_with_reference(name: str, dtype: torch.dtype, options: dict[str, Any], **keywords: Any) -> None:
    """Train a wrapped module and whole tensors side by side."""
    layout = LAYOUTS[name]
    whole = [weight.detach().clone() for weight in Tensors(layout.shapes, dtype).parameters()]
    states = [ReferenceState.zeros(weight) for weight in whole]
    model = layout.wrap(Tensors(layout.shapes, dtype))
    optimizer = SM3(model.named_parameters(), lr=0.3, **options, **keywords)
    for step in range(STEPS):
        for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
            grad = gradient(step, number, weight.shape)
            grad = None if grad is None else grad.to(dtype)
            give(param, grad)
            if grad is not None:
                reference_step(weight, grad, state, lr=0.3, **options)
        optimizer.step()
    for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
        where = f"{name}, {options}, parameter {number} of shape {tuple(weight.shape)}"
        assert same(param, weight), where
        held = optimizer.state[param]
        for i, accumulator in enumerate(state.accumulators):
            assert same(held[f"accumulator_{i}"], accumulator), f"{where}, accumulator {i}"
        if options["momentum"]:
            assert same(held["momentum_buffer"], state.momentum_buffer), where
        assert held["step"] == sum(gradient(step, number, weight.shape) is not None for step in range(STEPS)), where


SHARDED_COVERS = [("fsdp2", 4), ("fsdp2", 3), ("hsdp", 4), ("tp-2d", 4), ("fsdp2-tp", 4)]
TYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.sampled("name, world_size, options", crossed(cases(), range(len(OPTIONS))))
def test_equals_one_process(workers: Pool, name: str, world_size: int, options: int) -> None:
    workers(world_size).run(compare_with_reference, name, torch.float32, OPTIONS[options])


@pytest.mark.sampled("name, world_size, options", crossed(SHARDED_COVERS, range(len(OPTIONS))))
def test_equals_one_process_with_sharded_covers(workers: Pool, name: str, world_size: int, options: int) -> None:
    workers(world_size).run(compare_with_reference, name, torch.float32, OPTIONS[options], shard_covers=True)


@pytest.mark.sampled("name, world_size, dtype", crossed([("fsdp2", 3), ("fsdp2-tp", 4)], TYPES), ids=str)
def test_equals_one_process_in_other_types(workers: Pool, name: str, world_size: int, dtype: torch.dtype) -> None:
    workers(world_size).run(compare_with_reference, name, dtype, OPTIONS[-1])


def states_of_a_mixed_model(shard_covers: bool) -> None:
    """float32 and float64 parameters share one bucket."""
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(Tensors([(5, 3)]), Tensors([(4, 7)], torch.float64))
    whole = [p.detach().clone() for p in model.parameters()]
    states = [ReferenceState.zeros(w) for w in whole]
    for part in model:
        fully_shard(part)
    optimizer = SM3(model.parameters(), shard_covers=shard_covers)
    for step in range(3):
        for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
            grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step + 10 * number)).to(
                weight.dtype
            )
            give(param, grad)
            reference_step(weight, grad, state)
        optimizer.step()
    assert len(optimizer._current_plan().buckets) == 1
    for param, weight, state in zip(model.parameters(), whole, states, strict=True):
        assert same(param, weight)
        for i, accumulator in enumerate(state.accumulators):
            assert same(optimizer.state[param][f"accumulator_{i}"], accumulator)


@pytest.mark.parametrize("shard_covers", [False, True])
def test_parameters_of_several_types(workers: Pool, shard_covers: bool) -> None:
    workers(2).run(states_of_a_mixed_model, shard_covers)


def carry_nan(name: str) -> None:
    """A NaN that one rank meets must reach the accumulators of all, whatever its sign bit."""
    model = LAYOUTS[name].wrap(Tensors([(4, 3), (2,)]))
    optimizer = SM3(model.parameters())
    grad = torch.ones(4, 3)
    grad[0, 1] = float("nan") if name == "tp" else -float("nan")
    weight, bias = model.parameters()
    give(weight, grad)
    give(bias, torch.ones(2))
    optimizer.step()
    assert full(optimizer.state[weight]["accumulator_0"]).isnan().tolist() == [True, False, False, False]
    assert full(optimizer.state[weight]["accumulator_1"]).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["fsdp2", "tp"])
def test_nan_reaches_every_rank(workers: Pool, name: str) -> None:
    workers(3).run(carry_nan, name)


def stored_entries() -> tuple[list[int], int]:
    model = LAYOUTS["fsdp2"].wrap(Tensors([(8, 4), (6, 3)]))
    optimizer = SM3(model.parameters())
    for param in model.parameters():
        give(param, torch.ones(param.shape))
    optimizer.step()
    locals_ = [state[f"accumulator_{i}"].to_local() for state in optimizer.state.values() for i in (0, 1)]
    return [t.numel() for t in locals_], dist.get_rank()


def test_a_rank_stores_only_its_rows(workers: Pool) -> None:
    for sizes, rank in workers(4).run(stored_entries):
        assert sizes == [2, 4, [2, 2, 2, 0][rank], 3]


def real_backward() -> list[Tensor]:
    """The same data on every rank: gradients are the same numbers whatever the layout."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    if dist.get_world_size() > 1:
        fully_shard(model)
    optimizer = SM3(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.5 * losses[0]
    return [full(p) for p in model.parameters()]


def test_training_with_fsdp2_follows_one_process(workers: Pool) -> None:
    (alone,) = workers(1).run(real_backward)
    # Two equal gradients, added and halved, are the gradient again: even here not a bit differs.
    for together in workers(2).run(real_backward):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
