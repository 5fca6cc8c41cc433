"""torch.amp.GradScaler: gradients unscaled by it or, on demand, within the step; no step where one rank overflowed."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sm3_dist import SM3, kernels
from sm3_dist.step.param_groups import ADAMW_LIKE

BACKENDS = [name for name, reason in kernels.available().items() if reason is None and name != "triton"]


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))


def losses(model: nn.Module, steps: int):
    for step in range(steps):
        yield model(torch.randn(5, 9, generator=torch.Generator().manual_seed(step))).square().mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, ADAMW_LIKE | {"cover_block": 4}], ids=["plain", "momentum", "recipe"]
)
def test_the_step_unscales_as_the_scaler_would_have(backend: str, options: dict[str, Any]) -> None:
    expected, actual = two_layers(), two_layers()
    plain = SM3(expected.parameters(), backend="eager", **options)
    fused = SM3(actual.parameters(), backend=backend, unscale_in_step=True, **options)
    first, second = (GradScaler("cpu", init_scale=3e4 / 7) for _ in range(2))  # not a power of 2: rounding shows
    for one, other in zip(losses(expected, 4), losses(actual, 4), strict=True):
        first.scale(one).backward()
        first.unscale_(plain)
        plain.step()  # past the scaler: nothing is unscaled here
        first.update()
        second.scale(other).backward()
        second.step(fused)
        second.update()
        assert actual[0].bias.grad.norm() > 1000 * expected[0].bias.grad.norm()  # still scaled: no pass of its own
        plain.zero_grad()
        fused.zero_grad()
    for p, q in zip(expected.parameters(), actual.parameters(), strict=True):
        assert torch.equal(q, p)
        for key, value in plain.state[p].items():
            assert torch.equal(fused.state[q][key], value), key


def test_gradients_may_be_clipped_unless_the_step_unscales_them() -> None:
    expected, actual = two_layers(), two_layers()
    plain, optimizer = SM3.adamw_like(expected.parameters()), SM3.adamw_like(actual.parameters())
    scaler = GradScaler("cpu", init_scale=8.0)
    for one, other in zip(losses(expected, 3), losses(actual, 3), strict=True):
        one.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        plain.step()
        scaler.scale(other).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(actual.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        optimizer.zero_grad()
    assert all(torch.equal(q, p) for p, q in zip(expected.parameters(), actual.parameters(), strict=True))


in_step = pytest.mark.parametrize("unscale_in_step", [False, True])


@in_step
def test_where_gradients_are_unscaled_survives_a_copy(unscale_in_step: bool) -> None:
    optimizer = copy.deepcopy(SM3(two_layers().parameters(), unscale_in_step=unscale_in_step))
    assert optimizer._step_supports_amp_scaling is unscale_in_step  # what torch and Lightning look at


@in_step
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_the_scaler_has_unscaled_are_not_unscaled_again(backend: str, unscale_in_step: bool) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = SM3([weight], backend=backend, unscale_in_step=unscale_in_step)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * 0.5).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[weight]["accumulator_0"], torch.full((4,), 0.25))


@in_step
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_skips_the_step(backend: str, value: float, unscale_in_step: bool) -> None:
    model = two_layers()
    optimizer = SM3(model.parameters(), backend=backend, momentum=0.9, unscale_in_step=unscale_in_step)
    scaler = GradScaler("cpu", init_scale=8.0)
    for loss in losses(model, 2):
        before = {
            p: [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())] for p in model.parameters()
        }
        scaler.scale(loss).backward()
        if before[model[0].weight][1:]:  # the second step
            model[2].bias.grad[1] = value
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4.0
    for p, (weight, *state) in before.items():
        assert torch.equal(p, weight)
        assert all(torch.equal(new, old) for new, old in zip(optimizer.state[p].values(), state, strict=True))


def overflow_on_one_rank(unscale_in_step: bool) -> list[tuple[float, float, float]]:
    model = two_layers()
    fully_shard(model)
    optimizer = SM3(model.parameters(), unscale_in_step=unscale_in_step)
    scaler = GradScaler("cpu", init_scale=8.0)
    seen = []
    for number, loss in enumerate(losses(model, 3)):
        scaler.scale(loss).backward()
        if number == 1 and dist.get_rank() == dist.get_world_size() - 1:
            grad = model[0].weight.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weight = model[0].weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        seen.append((whole.sum().item(), optimizer.state[weight]["step"].item(), scaler.get_scale()))
    return seen


@in_step
def test_an_overflow_on_one_rank_skips_the_step_on_every_rank(workers: Pool, unscale_in_step: bool) -> None:
    first, *others = workers(2).run(overflow_on_one_rank, unscale_in_step)
    assert others == [first]
    weights, steps, scales = zip(*first, strict=True)
    assert weights[0] == weights[1] != weights[2]
    assert steps == (1.0, 1.0, 2.0)
    assert scales == (8.0, 4.0, 4.0)


def flags_on_one_rank() -> list[float]:
    """A scaler that knows nothing of other ranks tells each rank what it found there."""
    model = two_layers()
    fully_shard(model)
    optimizer = SM3(model.parameters())
    counts = []
    for who in (0, 1, None):
        next(losses(model, 1)).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(dist.get_rank() == who))
        optimizer.step()
        counts.append(optimizer.state[model[0].weight]["step"].item())
    return counts


def test_ranks_agree_even_if_the_scaler_does_not(workers: Pool) -> None:
    assert workers(2).run(flags_on_one_rank) == [[0.0, 0.0, 1.0]] * 2
