"""The comparison of a backend with the eager one, which is the definition: the same bits after every step."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sm3_dist import SM3, kernels
from sm3_dist.kernels.eager import EagerKernel
from sm3_dist.layout.box import flat_boxes
from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.rms import square_sum
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import HYPERPARAMETERS, Entry
from sm3_dist.step.param_groups import averaging

# Where there is a compiler, a library that is not there is a failure and no reason to skip.
COMPILER = shutil.which("gcc") or shutil.which("clang")
needs_c = pytest.mark.skipif(
    kernels.available()["c"] is not None and COMPILER is None, reason=str(kernels.available()["c"])
)
# Ranks 0 to 6; rows that end in every place of a vector; long and short rows; few rows that threads must share.
SHAPES = [
    *[(), (1,), (7,), (1025,), (5000,), (0,)],
    *[(64, 64), (33, 17), (3, 1000), (1, 3000), (3000, 1), (200, 7), (60, 8500), (6, 9000), (1, 1)],
    *[(0, 5), (5, 0), (3, 0, 2)],
    *[(2, 3, 5), (40, 8, 700), (9, 1, 130), (64, 32, 3, 3), (64, 1, 3, 3), (4, 5, 6, 7, 8), (2, 2, 2, 2, 2, 2)],
]
RECIPE = {"momentum": 0.9, "beta": 0.95, "bias_correction": True, "update_rms": 0.2}
SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    {"beta": 0.95, "weight_decay": 0.1, "maximize": True},
    {"beta": 0.9, "momentum": 0.8, "maximize": True, "eps": 1e-8, "weight_decay": 0.01},
    {"eps": 0.0},
    {"lr": torch.tensor(0.3), "maximize": True},
    {"momentum": 0.9, "beta": 0.95, "bias_correction": True, "nesterov": True, "weight_decay": 0.1},
    {"beta": 0.9, "update_rms": 0.2, "maximize": True, "eps": 0.0},
    RECIPE,
    RECIPE | {"momentum_dtype": torch.bfloat16, "nesterov": True, "maximize": True, "weight_decay": 0.1},
    RECIPE | {"cover_block": 32, "cover_product": True},
    {"beta": 0.95, "cover_block": 3, "eps": 0.0},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG_BLOCKS = [128, 256]
"""Rows whose squares the Triton kernel adds up in 32 bits at most, and that need more."""


def assert_same(actual: Tensor, expected: Tensor, what: object) -> None:
    """Equal to the bit, but that one NaN is as good as another."""
    assert actual.dtype == expected.dtype, what
    assert torch.equal(actual.isnan(), expected.isnan()), f"NaN in different places: {what}"
    same = actual.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    assert torch.equal(same, expected.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)), what


def gradient(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, special: bool = False) -> Tensor:
    """Values of all magnitudes, zeros and denormals among them; ``special``: also infinities and NaN."""
    values = torch.randn(shape, generator=generator)
    which = torch.rand(shape, generator=generator)
    limits = torch.finfo(dtype)
    for low, high, factor in [(0.0, 0.1, 0.0), (0.1, 0.2, limits.smallest_normal / 64), (0.2, 0.3, limits.max / 8)]:
        values = torch.where((which >= low) & (which < high), values * factor, values)
    if special:
        for low, value in [(0.500, torch.nan), (0.501, torch.inf), (0.502, -torch.inf)]:
            values = values.masked_fill((which >= low) & (which < low + 0.001), value)
    return values.to(dtype)


@contextmanager
def threads(number: int):
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(1)


def compare(
    weights: list[Tensor], grads: list[list[Tensor | None]], fused: str = "c", device: str = "cpu", **settings
) -> None:
    """Step copies of the weights in both backends, and compare everything after every step.

    Args:
        weights: on the CPU, where eager PyTorch steps them.
        grads: of each step.
        fused: the other backend.
        device: where that steps them.
        settings: of both.
    """
    expected = [nn.Parameter(w.clone()) for w in weights]
    actual = [
        nn.Parameter(torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=device).copy_(w)) for w in weights
    ]
    optimizers = SM3(expected, backend="eager", **settings), SM3(actual, backend=fused, **settings)
    for number, of_step in enumerate(grads):
        for p, q, grad in zip(expected, actual, of_step, strict=True):
            p.grad, q.grad = (None, None) if grad is None else (grad.clone(), grad.to(device))
        optimizers[0].step()
        with threads((1, 2, 5, 3)[number % 4]):
            optimizers[1].step()
        for p, q in zip(expected, actual, strict=True):
            assert_same(q.detach().cpu(), p.detach(), ("weight", number, tuple(p.shape)))
            state = optimizers[1].state[q]
            for key, value in optimizers[0].state[p].items():
                assert_same(state[key].cpu(), value, (key, number, tuple(p.shape)))


def compare_without_elements(fused: str = "c", device: str = "cpu", **settings) -> None:
    """Tensors without elements, into whose accumulators somebody has written."""
    shapes = [(0,), (0, 5), (5, 0), (0, 0), (3, 0, 2), (0, 3, 2), (3, 2, 0), (2, 0, 2, 3), (0, 200_000)]
    weights = [torch.empty(shape) for shape in shapes] + [torch.empty(0, 5).t(), torch.empty(2, 3, 0).permute(2, 0, 1)]
    states = []
    for backend, place in (("eager", "cpu"), (fused, device)):
        params = [nn.Parameter(weight.to(place)) for weight in weights]
        params += [nn.Parameter(torch.ones(3, 4, device=place)), nn.Parameter(torch.empty(0, 5, device=place))]
        optimizer = SM3(params, backend=backend, **settings)
        for step in range(3):
            for param in params[:-1]:
                param.grad = torch.ones_like(param)
            optimizer.step()
            for state in (optimizer.state[param] for param in params if step == 0):
                for i in range(sum(key.startswith("accumulator") for key in state)):
                    state[f"accumulator_{i}"].fill_(7)
        states.append([optimizer.state[param] for param in params])
    for number, (expected, actual) in enumerate(zip(*states, strict=True)):
        for key, value in expected.items():
            assert_same(actual[key].cpu(), value, (key, number))
    assert [states[0][i]["accumulator_1"].max() for i in (1, 8, -1)] == [0, 0, 7]


def compare_longest(rows: int, settings: dict[str, Any], fused: str, device: str) -> None:
    """Blocks of so many rows, in which every square counts for as much as any can."""
    weights = [torch.ones(rows, 128, dtype=dtype) for dtype in DTYPES[:2]]  # threads take four elements, and eight
    grads = [torch.full_like(weight, torch.nan) for weight in weights]
    compare(weights, [grads, grads], fused, device, **settings | {"cover_block": rows})


def compare_views(weights: list[Tensor], grads: list[list[Tensor]], fused: str = "c", **settings) -> None:
    """As ``compare``, but the actual weights are views with gaps, whose surroundings must stay as they are."""
    expected = [nn.Parameter(w.clone()) for w in weights]
    bases = [(w._base if w._base is not None else w).clone() for w in weights]
    actual = [
        nn.Parameter(base.as_strided(w.shape, w.stride(), w.storage_offset()))
        for base, w in zip(bases, weights, strict=True)
    ]
    before = [base.clone() for base in bases]
    optimizers = SM3(expected, backend="eager", **settings), SM3(actual, backend=fused, **settings)
    for of_step in grads:
        for p, q, grad in zip(expected, actual, of_step, strict=True):
            p.grad, q.grad = grad.clone(), grad
        for optimizer in optimizers:
            optimizer.step()
    for p, q, base, old in zip(expected, actual, bases, before, strict=True):
        assert_same(q.detach(), p.detach(), q.stride())
        inside = torch.zeros_like(base, dtype=torch.bool)
        inside.as_strided(q.shape, q.stride(), q.storage_offset()).fill_(True)
        assert torch.equal(base[~inside], old[~inside])


@torch.no_grad()
def compare_boxes(
    shape: tuple[int, ...],
    replicated: bool,
    fused: Callable[[Sequence[Entry]], kernels.Kernel],
    ranges: int,
    block: int | None = None,
    is_product: bool = False,
    is_random: bool = False,
) -> None:
    """Boxes of flat ranges; ``is_random``: of bfloat16 weights and 8-bit momentum, rounded stochastically."""
    generator = torch.Generator().manual_seed(len(shape))
    numel = torch.Size(shape).numel()
    for _ in range(ranges):
        a, b = sorted(torch.randint(0, numel + 1, (2,), generator=generator).tolist())
        boxes = tuple(flat_boxes(shape, a, b))
        if not boxes:
            continue
        shard = LocalShard(shape, boxes, 3, replicated=replicated, cover_block=block)
        compare_shard(shard, shape if replicated else (b - a + 5,), fused, generator, is_product, is_random)


@torch.no_grad()
def compare_shard(
    shard: LocalShard,
    size: tuple[int, ...],
    fused: Callable[[Sequence[Entry]], kernels.Kernel],
    generator: torch.Generator,
    is_product: bool = False,
    is_random: bool = False,
    is_spoiled: bool = False,
) -> None:
    """A local tensor of this size; ``is_spoiled``: with NaN in an accumulator."""
    weight, grad = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    if is_random:
        weight, grad = weight.bfloat16(), grad.bfloat16()
    group = dict.fromkeys(HYPERPARAMETERS) | {"momentum": 0.9, "beta": 0.0, "bias_correction": False}
    if is_product:  # then as the recipe has it: updates are scaled, and their squares added up
        group |= {"beta": 0.95, "bias_correction": True, "update_rms": 1.0}
    group |= {"stochastic_rounding": is_random, "rounding_seed": 7}
    old, new = averaging(group, 0)
    settings = Settings(0.1, 0.9, 1e-30, 0.1, False, cover_product=is_product, old=old, new=new)
    results = []
    for work in (EagerKernel, fused):
        param = nn.Parameter(weight.clone())
        param.grad = grad.clone()
        accumulators = [
            torch.rand(s.shape, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shard.stored)
        ]
        if is_spoiled:
            accumulators[0].view(-1)[0] = torch.nan
        held = (sum(box.numel for box in shard.boxes),) if shard.replicated else size
        moment = torch.zeros(held, dtype=torch.int8 if is_random else torch.float32)
        squares = square_sum(shard.shape, torch.zeros((), dtype=torch.int64)) if is_product else None
        entry = Entry(param, group, shard, accumulators, moment, torch.ones(()), squares, "x")
        running = work([entry])
        for number in (2, 5):
            with threads(number):
                running.update({id(group): settings})
            if squares is not None:
                squares.average.copy_(squares.partial)
        sums = [] if squares is None else [squares.partial]
        results.append([param.detach(), *accumulators, moment, entry.step, *sums])
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_same(actual, expected, (i, shard.boxes))
