"""Kernels of single values beside PyTorch: root and reciprocal, and codes of momentum, of any bit patterns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sm3_dist.kernels.triton import values
from sm3_dist.maths.momentum_code import decode, encode
from sm3_dist.maths.rms import square_sum
from sm3_dist.maths.update import _inverse_root

BLOCK = 1024
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
def squares(numbers, wholes, uppers, lowers, per_one, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numbers + at, mask=at < count, other=0.0)
    upper, lower = values.halves(x, per_one)
    tl.store(wholes + at, values.units(x, per_one), mask=at < count)
    tl.store(uppers + at, upper, mask=at < count)
    tl.store(lowers + at, lower, mask=at < count)


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


def check_squares(start: int, count: int, device: str, numel: int) -> None:
    """Squares of all numbers with so many bit patterns from ``start`` on as integers, whole and in halves.

    Args:
        start: the bits of the first number.
        count: how many there are.
        device: where it is done.
        numel: elements of the tensor whose updates they are; halves are for large ones.
    """
    numbers = bits_from(start, count, device).view(torch.float32)
    expected = square_sum((numel,), torch.zeros((), dtype=torch.int64))
    found = [torch.empty(count, dtype=kind, device=device) for kind in (torch.int64, torch.int32, torch.int32)]
    programs = -(-count // BLOCK)
    squares[(programs,)](numbers, *found, expected.per_one, count, BLOCK, enable_fp_fusion=False)
    whole, upper, lower = found
    assert torch.equal(whole, (upper.long() << int(values.HALF)) + lower)
    expected.add(numbers.cpu())
    assert whole.sum().item() == expected.partial.item()
