"""Kernels of single values beside PyTorch: root and reciprocal, codes of momentum, squares, of any bit patterns."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sm3_dist.kernels.triton import ends, matrix, values
from sm3_dist.maths.momentum_code import decode, encode
from sm3_dist.maths.rms import square_sum
from sm3_dist.maths.update import _inverse_root

BLOCK = 1024
CARRIERS = [2.0**-29, 2.0**-18, 0.5, 64.0, 2048.0, 2.0**21]
"""The least, of one element; others; the largest where no limit is in its way; and that of 2^50 elements."""
FIRST_SHORT = 127 - 100 << 23
"""The bits of 2^-100, from where on the short path is taken."""


@triton.jit
def inverse_roots(numbers, results, count, SHORT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numbers + at, mask=at < count, other=1.0)
    tl.store(results + at, values.inverse_root(x, SHORT), mask=at < count)


@triton.jit
def codes(numbers, noise, results, again, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numbers + at, mask=at < count, other=0.0)
    code = values.encoded(x, tl.load(noise + at, mask=at < count, other=0))
    tl.store(results + at, code, mask=at < count)
    tl.store(again + at, values.decoded(code), mask=at < count)


@triton.jit
def squares(numbers, results, carrier, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numbers + at, mask=at < count, other=0.0)
    tl.store(results + at, values.grains(x, carrier), mask=at < count)


def bits_from(start: int, count: int, device: str) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.int64, device=device).to(torch.int32)


def check_roots(start: int, count: int, device: str) -> None:
    """``1 / sqrt(x)`` of the positive numbers with so many bit patterns from ``start`` on, each rounded to nearest.

    The definition's own on the device, and of some of them in float64 on the CPU: rounding twice is exact there.
    """
    numbers = bits_from(start, count, device).view(torch.float32)
    expected = _inverse_root(numbers.clone())
    some = numbers[:: max(1, count // 4096)].cpu()
    in_float64 = 1 / some.double().sqrt().float().double()
    assert torch.equal(in_float64.float(), expected[:: max(1, count // 4096)].cpu())
    for short in (False, True):
        if short and start < FIRST_SHORT:
            if start + count <= FIRST_SHORT:
                continue
            numbers, expected = numbers[FIRST_SHORT - start :], expected[FIRST_SHORT - start :]
        found = torch.empty_like(numbers)
        inverse_roots[(-(-len(numbers) // BLOCK),)](numbers, found, len(numbers), short, BLOCK, enable_fp_fusion=False)
        differ = found.view(torch.int32) != expected.view(torch.int32)
        assert not differ.any(), (short, numbers[differ][:5], found[differ][:5], expected[differ][:5])


def check_codes(start: int, count: int, device: str) -> None:
    """Codes of all numbers with so many bit patterns from ``start`` on, with noise of many values, and back."""
    bits = bits_from(start, count, device)
    numbers, noise = bits.view(torch.float32), (bits * -1640531527 >> 7) & 0xFFFF
    found, again = torch.empty(count, dtype=torch.int8, device=device), torch.empty_like(numbers)
    codes[(-(-count // BLOCK),)](numbers, noise, found, again, count, BLOCK, enable_fp_fusion=False)
    expected = encode(numbers, noise)
    differ = found != expected
    assert not differ.any(), (numbers[differ][:5], noise[differ][:5], found[differ][:5], expected[differ][:5])
    assert torch.equal(again.view(torch.int32)[found != -128], decode(expected).view(torch.int32)[found != -128])
    assert again[found == -128].isnan().all()


def lengths(carrier: float) -> list[float]:
    """Updates around whose squares something changes: a grain, four of them, half the largest that counts, and that."""
    grain, largest = carrier * 2.0**-23, min(carrier / 2, 32.0**2)
    return [math.sqrt(square) for square in (grain, 4 * grain, largest / 2, largest)]


def check_squares(start: int, count: int, device: str, carrier: float) -> None:
    """Squares in grains, of all numbers with so many bit patterns from ``start`` on.

    Each is what a division in float64 says, rounded up, and their sum is that of the definition: of a tensor of so
    many elements that a grain is one unit.
    """
    numbers = bits_from(start, count, device).view(torch.float32)
    found = torch.empty(count, dtype=torch.int32, device=device)
    squares[(-(-count // BLOCK),)](numbers, found, carrier, count, BLOCK, enable_fp_fusion=False)
    square = (numbers * numbers).nan_to_num(nan=math.inf).double().clamp(max=min(carrier / 2, 32.0**2))
    differ = found != (square / (carrier * 2.0**-23)).ceil()
    assert not differ.any(), (carrier, numbers[differ][:5], found[differ][:5], square[differ][:5])
    expected = square_sum((int(carrier * 2**29),), torch.zeros((), dtype=torch.int64, device=device))
    expected.add(numbers, torch.tensor(carrier, dtype=torch.float64, device=device))
    assert found.sum().item() == expected.partial.item()


def check_carriers(device: str) -> None:
    """What a step finds of each tensor before it begins, of averages of any size."""
    averages = [0, -1, 1, *(n + d for n in (1 << 20, 3 << 30, 1 << 40, 1 << 53, 1 << 61) for d in (-1, 0, 1))]
    first = 1 / math.sqrt(1 - 0.9)  # as without bias correction
    for numel in (1, 999, 1 << 22, 10**9, 1 << 45):
        sums = [square_sum((numel,), torch.tensor(average, device=device)) for average in averages]
        steps, addresses = torch.zeros(1, device=device), torch.ones(1, 2, dtype=torch.int64, device=device)
        param = torch.tensor([steps.data_ptr(), 0, len(sums)], device=device)
        lies = torch.tensor([each.average.data_ptr() for each in sums], device=device)
        numbers = [[0.9, 0.0, 1.0, first**2, each.unit, each.per_one] for each in sums]
        made_of = torch.tensor(numbers, dtype=torch.float64, device=device)
        factors = torch.zeros(len(sums), int(matrix.FACTOR_FIELDS), device=device)
        one, counts = (torch.ones(n, dtype=torch.int32, device=device) for n in (1, len(sums)))
        ends.begin_step[(1,)](param, one, lies, made_of, addresses, factors, counts, enable_fp_fusion=False)
        for each, row in zip(sums, factors.tolist(), strict=True):
            carrier = each.carrier(first).item()
            assert row[int(matrix.CARRIER)] == carrier
            assert row[int(matrix.GRAIN)] == carrier * each.per_one / 2**23 >= 1
