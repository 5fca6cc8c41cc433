"""The numbers: to the last bit against NumPy, to a few units in the last place against other implementations."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SM3 as torch_sm3
import torch
from torch import Tensor

from sm3_dist import SM3
from sm3_dist.maths.reference import ReferenceState, reference_step

SHAPES = [
    (),
    (1,),
    (7,),
    (3, 5),
    (1, 9),
    (8, 1),
    (33, 17),
    (2, 3, 4),
    (5, 1, 3),
    (2, 3, 2, 5),
    (2, 2, 1, 2, 3),
    (0,),
    (0, 4),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def ulps(a: Tensor, b: Tensor) -> float:
    """Largest difference in units in the last place of the larger operand."""
    spacing = torch.from_numpy(np.spacing(torch.maximum(a.abs(), b.abs()).numpy()))
    return float(((a - b).abs() / spacing).max()) if a.numel() else 0.0


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def trained(weight: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Any]]:
    param = torch.nn.Parameter(weight.clone())
    optimizer = SM3([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) <= 4 and 0 not in shape])
def test_equals_numpy_to_the_last_bit(shape: tuple[int, ...]) -> None:
    lr, eps = np.float32(0.3), np.float32(1e-30)
    grads = gradients(shape, 5)
    w = np.ones(shape, np.float32)
    axes = range(max(1, len(shape)))
    others = {i: tuple(d for d in range(len(shape)) if d != i) for i in axes}
    mu = [np.zeros([n if d == i else 1 for d, n in enumerate(shape)], np.float32) for i in axes]
    for g in (grad.numpy() for grad in grads):
        smallest = mu[0]
        for other in mu[1:]:
            smallest = np.minimum(smallest, other)
        nu = smallest + g * g
        u = g * (np.float32(1) / np.sqrt(nu + eps))
        w = w - lr * u
        mu = [nu.max(axis=others[i], keepdims=True) if len(shape) > 1 else nu for i in axes]
    weight, state = trained(torch.ones(shape), grads, lr=0.3)
    assert torch.equal(weight, torch.from_numpy(np.asarray(w)))
    for i in axes:
        assert torch.equal(state[f"accumulator_{i}"], torch.from_numpy(np.asarray(mu[i])).reshape(shape[i : i + 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_to_the_last_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = gradients(shape, 4, dtype)
    start = torch.linspace(-1, 1, max(1, grads[0].numel()))[: grads[0].numel()].view(shape).to(dtype)
    for momentum, beta, decay, maximize in itertools.product([0.0, 0.9], [0.0, 0.95], [0.0, 0.1], [False, True]):
        options = {"lr": 0.2, "momentum": momentum, "beta": beta, "weight_decay": decay, "maximize": maximize}
        expected, state = start.clone(), ReferenceState.zeros(start)
        for grad in grads:
            reference_step(expected, grad, state, **options)
        weight, got = trained(start, grads, **options)
        assert torch.equal(weight, expected), options
        for i, accumulator in enumerate(state.accumulators):
            assert torch.equal(got[f"accumulator_{i}"], accumulator), options
        if momentum:
            assert torch.equal(got["momentum_buffer"], state.momentum_buffer), options


@pytest.mark.parametrize(
    "shape", [(700, 900), (3, 300_000), (300_000, 3), (400_000,), (1, 300_000), (60, 70, 80)], ids=str
)
def test_chunks_do_not_show(shape: tuple[int, ...]) -> None:
    grads = gradients(shape, 2)
    expected, state = torch.zeros(shape), ReferenceState.zeros(torch.zeros(shape))
    for grad in grads:
        reference_step(expected, grad, state, momentum=0.9, beta=0.9)
    weight, got = trained(torch.zeros(shape), grads, momentum=0.9, beta=0.9)
    assert torch.equal(weight, expected)
    assert all(torch.equal(got[f"accumulator_{i}"], mu) for i, mu in enumerate(state.accumulators))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (2, 3, 2, 5)], ids=str)
def test_agrees_with_torch_sm3(shape: tuple[int, ...], momentum: float) -> None:
    """Sums only: with ``beta > 0`` torch-SM3 takes the maximum with the old accumulator: its average never decays."""
    grads = gradients(shape, 6)
    theirs = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch_sm3.SM3([theirs], lr=0.1, momentum=momentum)
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    ours, _ = trained(torch.zeros(shape), grads, lr=0.1, momentum=momentum)
    # A weight is a sum of six updates of up to 0.1; units are those of a single update.
    assert (ours - theirs.detach()).abs().max() <= 4 * np.spacing(np.float32(0.6))


RECORDED = json.loads(Path(__file__).with_name("data").joinpath("optax_sm3.json").read_text())


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"b1={case['b1']}-b2={case['b2']}")
def test_agrees_with_optax(case: dict[str, Any]) -> None:
    """Against recorded values; data/make_optax_sm3.py made them. With ``b2 = 1`` optax sums."""
    beta = 0.0 if case["b2"] == 1.0 else case["b2"]
    updates = torch.tensor(case["updates"])
    param = torch.nn.Parameter(torch.zeros(updates.shape[1:]))
    optimizer = SM3([param], lr=1.0, momentum=case["b1"], beta=beta, eps=case["eps"])
    for grad, update in zip(torch.tensor(case["grads"]), updates, strict=True):
        with torch.no_grad():
            param.zero_()
        param.grad = grad
        optimizer.step()
        if case["b1"] == 0:
            assert ulps(-param.detach(), update) <= 4
        else:  # terms of a moving average cancel: compare with the size of its terms
            assert (-param.detach() - update).abs().max() <= 4 * np.spacing(np.float32(1))


def test_low_precision_parameters_do_not_stall() -> None:
    """Accumulators in bfloat16 would stop growing at 256: 256 + 1 rounds to 256."""
    param = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = SM3([param], lr=0.0)
    for _ in range(400):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert torch.equal(optimizer.state[param]["accumulator_0"], torch.full((2,), 400.0))


def test_a_zero_gradient_in_float16_changes_nothing() -> None:
    weight, _ = trained(torch.ones(3, 2, dtype=torch.float16), [torch.zeros(3, 2, dtype=torch.float16)])
    assert torch.equal(weight, torch.ones(3, 2, dtype=torch.float16))


def test_the_moving_average_decays() -> None:
    grads = [torch.ones(2, 3)] + [torch.zeros(2, 3)] * 3
    _, state = trained(torch.zeros(2, 3), grads, beta=0.5)
    assert torch.equal(state["accumulator_0"], torch.full((2,), 0.5**4))


def test_nan_and_infinity_reach_weights_and_accumulators() -> None:
    grad = torch.tensor([[1.0, float("nan"), 2.0], [3.0, 4.0, float("inf")]])
    weight, state = trained(torch.zeros(2, 3), [grad])
    assert torch.equal(weight.isnan(), torch.tensor([[False, True, False], [False, False, True]]))  # inf / inf
    assert state["accumulator_0"].isnan().tolist() == [True, False]
    assert state["accumulator_0"][1] == float("inf")
    assert state["accumulator_1"].isnan().tolist() == [False, True, False]
