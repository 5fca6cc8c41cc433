"""``skip_nonfinite``: a gradient that is not finite changes nothing, on every rank that holds part of its parameter.

NaN or infinity is in one element, so that one rank alone sees it. The reference is one process that leaves it out.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import flat_layouts
import pytest
import replicas
import torch
import torch.distributed as dist
from flat_layouts import exact_gradient
from harness import Pool
from layouts import LAYOUTS, Tensors, cases, give, same
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sm3_dist import SM3, PlanMismatchError, kernels, step_in_backward
from sm3_dist.maths.reference import ReferenceState, reference_step
from sm3_dist.ranks import bucket
from sm3_dist.step import guard
from sm3_dist.step.param_groups import ADAMW_LIKE

STEPS = 4
BAD = {(1, 0): math.nan, (2, 1): -math.inf, (2, 3): math.nan, (3, 0): math.inf}
"""By step and number of the parameter. The first element lies on one rank."""
OPTIONS: dict[str, dict[str, Any]] = {"recipe": ADAMW_LIKE | {"cover_block": 2}, "paper": {"momentum": 0.9}}
MODES = ("parameter", "step")
FLAT = ["fsdp1-nested", "fsdp1-flat-nested", "fsdp1-hybrid-shard", "fairscale-nested", "fairscale-separate-nested"]
BACKENDS = [name for name, reason in kernels.available().items() if reason is None and name != "triton"]
said = pytest.mark.filterwarnings("ignore:the gradient of .* is not finite")


def gradient(step: int, number: int, shape: Sequence[int]) -> Tensor:
    grad = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(100 * step + number))
    if (step, number) in BAD:
        grad.view(-1)[-1 if number == 3 else 0] = BAD[step, number]
    return grad


def stepped(mode: str, step: int, number: int) -> bool:
    """Whether a parameter takes a step."""
    return (step, number) not in BAD if mode == "parameter" else step not in {bad for bad, _ in BAD}


def sharded(name: str, mode: str, options: dict[str, Any]) -> int:
    layout = LAYOUTS[name]
    whole = [weight.detach().clone() for weight in Tensors(layout.shapes).parameters()]
    states = [ReferenceState.zeros(weight, options.get("cover_block")) for weight in whole]
    model = layout.wrap(Tensors(layout.shapes))
    optimizer = SM3(model.named_parameters(), lr=0.3, skip_nonfinite=mode, **options)
    for step in range(STEPS):
        for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
            grad = gradient(step, number, weight.shape)
            give(param, grad)
            if stepped(mode, step, number):
                reference_step(weight, grad, state, lr=0.3, skip_nonfinite=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert all(param.grad is not None for param in model.parameters())
    for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
        held = optimizer.state[param]
        assert same(param, weight), f"parameter {number} of shape {tuple(weight.shape)}"
        for i, accumulator in enumerate(state.accumulators):
            assert same(held[f"accumulator_{i}"], accumulator), f"accumulator {i} of {number}"
        assert same(held["momentum_buffer"], state.momentum_buffer), f"momentum of {number}"
        assert held["step"] == state.step
    return optimizer.nonfinite_steps


@pytest.mark.sampled(
    ("name", "world_size", "mode", "options"),
    [(*case, mode, options) for case in cases() for mode in MODES for options in OPTIONS],
)
def test_equals_one_process(workers: Pool, name: str, world_size: int, mode: str, options: str) -> None:
    assert workers(world_size).run(sharded, name, mode, OPTIONS[options]) == [3] * world_size


def flattened(name: str, mode: str, options: dict[str, Any]) -> int:
    """What was flattened into one parameter is skipped as one."""
    layout = flat_layouts.LAYOUTS[name]
    one = layout.unit if name in ("fsdp1-flat-nested", "fairscale-nested") else flat_layouts.by_tensor
    whole = {key: weight.detach().clone() for key, weight in flat_layouts.Model(layout.blocks).named_parameters()}
    states = {key: ReferenceState.zeros(weight, options.get("cover_block")) for key, weight in whole.items()}
    model = layout.wrap(flat_layouts.Model(layout.blocks))
    optimizer = SM3(model.named_parameters(), lr=0.3, model=model, skip_nonfinite=mode, **options)
    for step in range(STEPS):
        grads = {key: exact_gradient(step, key, weight.shape) for key, weight in whole.items()}
        bad = set()
        for number, key in enumerate(list(grads)[:4]):
            if (step, number) in BAD:
                grads[key].view(-1)[0] = BAD[step, number]
                bad.add(one(key))
        model(grads).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        optimizer.zero_grad()
        for key, grad in grads.items():
            if not (bad if mode == "step" else one(key) in bad):
                reference_step(whole[key], grad, states[key], lr=0.3, **options)
    for key, weight in layout.gather(model).items():
        assert torch.equal(weight, whole[key]), key
    return optimizer.nonfinite_steps


@pytest.mark.sampled(
    ("name", "mode", "options"),
    [(name, mode, options) for name in FLAT for mode in MODES for options in OPTIONS],
)
def test_flattened_parameters_equal_one_process(workers: Pool, name: str, mode: str, options: str) -> None:
    world_size = max(flat_layouts.LAYOUTS[name].worlds)
    assert workers(world_size).run(flattened, name, mode, OPTIONS[options]) == [3] * world_size


def replicated(mode: str, options: dict[str, Any]) -> int:
    """ZeRO-1: every rank has the whole gradient, and nobody asks another."""
    params = replicas.params_of()
    whole = replicas.copies(params)
    optimizer = SM3(params, lr=0.3, shard_over=dist.group.WORLD, skip_nonfinite=mode, **options)
    alone = SM3(whole, lr=0.3, **options)
    for step in range(STEPS):
        for number, (param, weight) in enumerate(zip(params, whole, strict=True)):
            param.grad = gradient(step, number, weight.shape)
            weight.grad = param.grad.clone() if stepped(mode, step, number) else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        if mode == "parameter" or all(weight.grad is not None for weight in whole):
            alone.step()
        replicas.assert_same(params, whole, optimizer, alone, where=step)
    return optimizer.nonfinite_steps


@pytest.mark.parametrize(("mode", "options"), [("parameter", "recipe"), ("step", "paper")])
def test_zero_equals_one_process(workers: Pool, mode: str, options: str) -> None:
    assert workers(3).run(replicated, mode, OPTIONS[options]) == [3] * 3


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))


@said
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [*OPTIONS, "orthogonal"])
def test_every_backend_leaves_all_as_it_was(backend: str, mode: str, options: str) -> None:
    model = two_layers()
    chosen = OPTIONS.get(options, {"momentum": 0.95, "orthogonalize": True})
    optimizer = SM3(model.parameters(), backend=backend, skip_nonfinite=mode, **chosen)
    for value in (1.0, math.nan, math.inf, -math.inf, 1.0):
        before = copy.deepcopy([[p.detach(), dict(optimizer.state[p])] for p in model.parameters()])
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        model[1].weight.grad[2, 5] = value
        optimizer.step()
        for param, (weight, state) in zip(model.parameters(), before, strict=True):
            kept = value != 1 and (mode == "step" or param is model[1].weight)
            assert torch.equal(param, weight) is kept
            assert not state or all(torch.equal(optimizer.state[param][k], v) for k, v in state.items()) is kept
        assert math.isnan(value) is bool(model[1].weight.grad.isnan().any())  # the gradient stays where it is
    assert optimizer.nonfinite_steps == 3


def test_it_is_said_once() -> None:
    weight, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SM3([("a", weight), ("b", other)], skip_nonfinite="parameter")
    weight.grad, other.grad = torch.full((2,), math.nan), torch.full((2,), math.inf)
    with pytest.warns(UserWarning, match=r"parameter 'a' and of 1 more parameters is not finite .* its update is skip"):
        optimizer.step()
    optimizer.step()
    assert optimizer.nonfinite_steps == 2
    assert copy.deepcopy(optimizer).nonfinite_steps == 2


@said
def test_sparse_gradients_and_values_of_one_index_that_are_finite_alone() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = SM3([weight], skip_nonfinite="parameter")
    for value, kept in ((3e38, True), (1.0, False)):
        weight.grad = torch.sparse_coo_tensor([[1, 1]], torch.full((2, 2), value), (3, 2), check_invariants=True)
        optimizer.step()
        assert torch.equal(weight, torch.ones(3, 2)) is kept


@pytest.mark.parametrize("mode", [None, *MODES])
def test_finite_gradients_give_the_same_bits(mode: str | None) -> None:
    """A gradient whose square is infinite is finite."""
    expected, actual = two_layers(), two_layers()
    optimizers = [SM3.adamw_like(expected.parameters()), SM3.adamw_like(actual.parameters(), skip_nonfinite=mode)]
    for step in range(3):
        for number, (p, q) in enumerate(zip(expected.parameters(), actual.parameters(), strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number)) * 10.0 ** (
                30 * step - 30
            )
            q.grad = None if step == number == 1 else p.grad.clone()
            p.grad = None if q.grad is None else p.grad
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), actual.parameters(), strict=True))
    assert optimizers[1].nonfinite_steps == 0


@said
@pytest.mark.parametrize("clip_value", [None, 1.0])
def test_steps_in_backward(clip_value: float | None) -> None:
    model, alone = two_layers(), two_layers()
    optimizer = SM3.adamw_like(model.parameters(), skip_nonfinite="parameter")
    whole = SM3.adamw_like(alone.parameters())
    with step_in_backward(model, optimizer, clip_value=clip_value):
        for step in range(3):
            grads = [torch.full_like(p, 0.5 + step) for p in alone.parameters()]
            grads[0][3, 3], grads[3][0] = (math.nan, -math.inf) if step == 1 else (0.5, 0.5)
            sum((p * g).sum() for p, g in zip(model.parameters(), grads, strict=True)).backward()
            assert all(param.grad is None for param in model.parameters())
            optimizer.step()
            for number, (param, grad) in enumerate(zip(alone.parameters(), grads, strict=True)):
                clipped = grad if clip_value is None else grad.clamp(-clip_value, clip_value)
                param.grad = clipped if clipped.isfinite().all() else None
                assert (param.grad is None) is (step == 1 and number in ((0,) if clip_value else (0, 3)))
            whole.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))
    assert optimizer.nonfinite_steps == 1


def refused_in_backward() -> None:
    model = fully_shard(two_layers())
    optimizer = SM3(model.parameters(), skip_nonfinite="parameter")
    with pytest.raises(ValueError, match="in the midst of backward"):
        step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="after backward alone"):
        step_in_backward(model, SM3(model.parameters(), skip_nonfinite="step"))


def test_steps_in_backward_are_refused_where_ranks_would_have_to_ask(workers: Pool) -> None:
    workers(2).run(refused_in_backward)


def asked_on_one_rank_alone() -> None:
    model = fully_shard(two_layers())
    optimizer = SM3(model.parameters(), skip_nonfinite="step" if dist.get_rank() else None)
    optimizer.step()


def test_ranks_must_agree_on_it(workers: Pool) -> None:
    workers(2).run_raises(PlanMismatchError, asked_on_one_rank_alone, match="differ in skip_nonfinite=None and skip_")


def collectives(mode: str | None) -> int:
    """How many all-reduces a step takes, with whole tensors among those that are cut."""
    model = fully_shard(two_layers())
    optimizer = SM3.adamw_like(model.parameters(), skip_nonfinite=mode)
    reduce, calls = dist.all_reduce, 0

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return reduce(*given, **more)

    for step in range(2):
        for param in model.parameters():
            give(param, torch.ones(param.shape))
        bucket.dist.all_reduce = guard.dist.all_reduce = counted if step else reduce
        optimizer.step()
    dist.all_reduce = reduce
    return calls


@pytest.mark.parametrize(("mode", "extra"), [(None, 0), ("parameter", 1), ("step", 1)])
def test_it_costs_one_exchange_of_integers(workers: Pool, mode: str | None, extra: int) -> None:
    assert workers(2).run(collectives, mode) == [2 + extra] * 2


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="must be None, 'parameter' or 'step', but is 'tensor'"):
        SM3([nn.Parameter(torch.ones(2))], skip_nonfinite="tensor")


@said
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_the_faq_says_of_one_gradient(value: float) -> None:
    rows = {
        "AdamW": (torch.optim.AdamW, [1, 1, 1, 1, 1]),
        "paper": (lambda params: SM3(params, momentum=0.9), [1, 511, 65536, 65536, 65536]),
        "recipe": (SM3.adamw_like, [1, 4096, 4096, 4096, 4096]),
        "guarded": (lambda params: SM3.adamw_like(params, skip_nonfinite="step"), [0, 0, 0, 0, 0]),
    }
    for name, (make, counts) in rows.items():
        weight = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
        optimizer, found = make([weight]), []
        for step in range(6):
            weight.grad = torch.randn(256, 256, generator=torch.Generator().manual_seed(step))
            if step == 1:
                weight.grad[3, 2] = value
            optimizer.step()
            found.append(int(weight.isnan().sum()))
        spreads = math.isnan(value) or name == "guarded"
        assert found == [0, *(counts if spreads else [1] * 5)], name
