"""The Triton kernels on a GPU: the bits of eager PyTorch on the CPU, memory, synchronization, single values."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from against_eager import DTYPES, LONG_BLOCKS, RECIPE, SETTINGS, SHAPES, compare, compare_longest, gradient
from single_values import CARRIERS, check_carriers, check_codes, check_roots, check_squares
from torch import nn

from sm3_dist import SM3
from sm3_dist.maths.finite import not_finite
from sm3_dist.maths.orthogonal import batch_is_exact, orthogonalized, orthogonalized_together

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")

# What an int8 code is rounded with, a matrix whose strips end anywhere, one of the widths of models, and many rows.
MORE = [(66, 128), (24, 192), (70, 64), (370, 370), (512, 384), (3000, 128)]
BLOCKS = RECIPE | {"cover_block": 64, "cover_product": True, "nesterov": True, "weight_decay": 0.1}
RANDOM = {"stochastic_rounding": True, "rounding_seed": (1 << 63) + 12345}
OPTIONS: list[dict[str, Any]] = [
    *SETTINGS,
    BLOCKS,
    BLOCKS | {"momentum_dtype": torch.bfloat16},
    BLOCKS | RANDOM | {"momentum_dtype": torch.int8},
    BLOCKS | RANDOM | {"momentum_dtype": torch.int8, "cover_block": 3},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16} | RANDOM,
]


@pytest.mark.sampled("number, dtype", list(itertools.product(range(len(OPTIONS)), DTYPES)))
def test_the_kernels_give_the_bits_of_eager(number: int, dtype: torch.dtype) -> None:
    """Some shapes for each set of options: a few kernels are compiled for each."""
    settings = dict(OPTIONS[number])
    if dtype == torch.float16:
        settings.pop("stochastic_rounding", None)
    shapes = [*SHAPES[number % 4 :: 4], MORE[number % 6], MORE[(number + 3) % 6]]
    generator = torch.Generator().manual_seed(number)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads: list[list[Any]] = [[gradient(s, dtype, generator, special) for s in shapes] for special in (False, True)]
    grads.append([gradient(shape, dtype, generator) for shape in shapes])
    grads[1][number % len(shapes)] = None
    compare(weights, grads, "triton", "cuda", **settings)


@pytest.mark.parametrize("options", [BLOCKS, BLOCKS | RANDOM | {"momentum_dtype": torch.int8}, {}], ids=str)
def test_a_model_goes_to_the_gpu_and_back_between_steps(options: dict[str, Any]) -> None:
    """Its state follows it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in [(66, 128), (30,), (8, 4, 3, 3)]]
    stay, go = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    optimizers = SM3(stay, **options), SM3(go, **options)
    for device in ("cpu", "cpu", "cuda", "cuda", "cpu", "cuda"):
        for p, q in zip(stay, go, strict=True):
            grad = torch.randn(p.shape, generator=generator)
            q.grad = None
            q.data = q.data.to(device)
            p.grad, q.grad = grad, grad.to(device)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(stay, go, strict=True):
            assert torch.equal(p, q.cpu())
            for key, value in optimizers[0].state[p].items():
                assert torch.equal(value, optimizers[1].state[q][key].cpu()), key


def test_root_and_reciprocal_are_exact_for_every_number() -> None:
    """All float32 from the smallest on, and those from 2^-100 on by the short path; in chunks of 2^26."""
    chunk = 1 << 26
    for start in range(0, 0x7F800000, chunk):
        check_roots(start, min(chunk, 0x7F800001 - start), "cuda")


def test_codes_of_momentum_are_those_of_pytorch_for_every_number() -> None:
    chunk = 1 << 26
    for start in range(-(1 << 31), 1 << 31, chunk):
        check_codes(start, chunk, "cuda")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_squares_are_those_of_pytorch_for_every_number(carrier: float) -> None:
    chunk = 1 << 26
    for start in range(0, 1 << 31, chunk):  # negative numbers have the same squares
        check_squares(start, chunk, "cuda", carrier)


def test_carriers_are_those_of_pytorch() -> None:
    check_carriers("cuda")


@pytest.mark.parametrize("rows", LONG_BLOCKS)
def test_a_sum_of_the_largest_squares_does_not_overflow(rows: int) -> None:
    compare_longest(rows, BLOCKS, "triton", "cuda")


def params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
    for param in made:
        param.grad = torch.randn_like(param)
    return made


@pytest.mark.parametrize("number", [0, 1, len(SETTINGS), len(SETTINGS) + 2])
def test_a_steady_step_takes_no_memory_and_waits_for_nothing(number: int) -> None:
    optimizer = SM3(params([(512, 384), (384,), (16, 8, 3, 3)], torch.bfloat16), backend="triton", **OPTIONS[number])
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    # Averages of a few numbers for each tensor are made and dropped.
    assert torch.cuda.max_memory_allocated() - before <= 1 << 14


def test_one_warning_names_what_is_left_to_eager() -> None:
    wide = nn.Parameter(torch.randn(64, 64, dtype=torch.float64, device="cuda"))
    wide.grad = torch.randn_like(wide)
    optimizer = SM3([*params([(64, 64)], torch.float32), wide])
    with pytest.warns(UserWarning, match=r"steps 1 of 2 tensors on the GPU in eager.*\n.*float64") as told:
        optimizer.step()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert math.isfinite(wide.sum().item())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_what_is_not_finite_is_found(dtype: torch.dtype) -> None:
    tensors = [torch.randn(70, 33, device="cuda").to(dtype) for _ in range(4)]
    tensors[1][3, 5], tensors[2][69, 32], tensors[3][0, 0], tensors[3][1, 1] = math.nan, -math.inf, math.nan, math.inf
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype, device="cuda")
    strided = torch.randn(64, 32, device="cuda").to(dtype).T[1:, ::2]
    mixed = [torch.full((5,), math.inf, device="cuda"), torch.ones(3, device="cuda")]
    found = not_finite([*tensors, largest, largest[:0], strided, *mixed])
    assert found.tolist() == [0, 1, 1, 1, 0, 0, 0, 1, 0]


SHAPES_OF_BATCHES = [(8, 8), (64, 256), (256, 64), (64, 4096), (768, 768), (3072, 768), (768, 3072), (100, 36), (7, 9)]


@pytest.mark.parametrize("count", [2, 3, 12])
def test_matrices_that_are_worked_on_together_have_the_bits_of_each_alone(count: int) -> None:
    updates = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES_OF_BATCHES for _ in range(count)]
    for result, update in zip(orthogonalized_together(updates), updates, strict=True):
        assert torch.equal(result, orthogonalized(update))
        singular = torch.linalg.svdvals(result.float())
        assert 0.5 < singular[0] < 1.4
    assert batch_is_exact(count, 768, 3072, torch.device("cuda", torch.cuda.current_device()))
