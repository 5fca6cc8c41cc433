"""Kernels of single values beside PyTorch: root and reciprocal, and codes of momentum, of any bit patterns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sm3_dist.kernels.triton import values
from sm3_dist.maths.momentum_code import decode, encode
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
