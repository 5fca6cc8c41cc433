"""What the GPU kernels share of arithmetic on single values: types, rounding, random numbers, codes, exact sums.

Each function gives the bits of its twin in :mod:`sm3_dist.maths`. Where the machine has an instruction that Triton's
interpreter lacks, or gets wrong, there are two ways to the same bits, and ``INTERPRETED`` says which is taken.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from sm3_dist.maths.rms import GRAINS, LONGEST

SEED = ["seed_low", "seed_high"]
unspecialized = triton.jit(do_not_specialize=SEED)
"""For kernels with a seed, another value of which is to give no other machine code."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""Whether kernels run in Triton's interpreter. It is decided when this module is imported, as in Triton itself."""

TINY, HUGE = tl.constexpr(torch.finfo(torch.float32).tiny), tl.constexpr(torch.finfo(torch.float32).max)
LONGEST_SQUARE, OF_CARRIER = tl.constexpr(float(LONGEST**2)), tl.constexpr(float(GRAINS))
NORMAL = tl.constexpr(2.0**-6)
NORMAL_BITS = tl.constexpr(127 - 6 << 23)
"""From here on codes of momentum are further apart, see ``maths/momentum_code.py``."""


@triton.jit
def widened(x, TYPE: tl.constexpr):
    """A value in float32."""
    if TYPE == tl.int8:  # noqa: SIM300
        wide = decoded(x)
    elif tl.bfloat16 == TYPE:  # by hand: Triton's interpreter gets denormals wrong
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """The nearest value of a type."""
    if INTERPRETED and tl.bfloat16 == TYPE:  # it cuts bits off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        near = tl.where(x != x, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        near = x.to(TYPE)
    return near


@triton.jit
def rounded_randomly(x, noise, TYPE: tl.constexpr):
    """One of the two neighbours in a type, as ``maths/rounding.py`` and ``maths/momentum_code.py`` have it."""
    if TYPE == tl.int8:  # noqa: SIM300
        near = encoded(x, noise)
    else:
        bits = (x.to(tl.int32, bitcast=True) + noise) >> 16
        near = tl.where(x != x, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return near


@triton.jit
def decoded(code):
    """The value of a code. With ``y`` the float whose bits are the code's, shifted: ``y - max(y / 2, 2^-6)``."""
    wide = code.to(tl.int32)
    y = ((tl.abs(wide) << 19) + NORMAL_BITS).to(tl.float32, bitcast=True)
    value = y - tl.maximum(y * 0.5, NORMAL)
    value = tl.where(wide < 0, -value, value)
    return tl.where(wide == -128, float("nan"), value)


@triton.jit
def encoded(x, noise):
    """The code of one of the two neighbours: the longer one if the noise carries over."""
    length = tl.abs(x)
    if INTERPRETED:
        fixed = (tl.minimum(length, NORMAL) * 67108864.0).to(tl.int32) << 3
        code = tl.where(length < NORMAL, fixed, length.to(tl.int32, bitcast=True) - (NORMAL_BITS - (1 << 23)))
    else:  # the same in one sum, towards 0: below 2^-6 of fixed point, from there on of twice the length
        code = tl.inline_asm_elementwise(
            "add.rz.f32 $0, $1, $2;", "=f,f,f", [length, tl.maximum(length, NORMAL)], tl.float32, True, 1
        )
        code = code.to(tl.int32, bitcast=True) - NORMAL_BITS
    code = tl.minimum((code + (noise << 3)) >> 19, 127)
    sign = x.to(tl.int32, bitcast=True) >> 31
    return tl.where(x != x, -128, (code ^ sign) - sign).to(tl.int8)


@triton.jit
def inverse_root(x, NORMAL_RANGE: tl.constexpr):
    """``1 / sqrt(x)``, each rounded to nearest.

    The compiler makes of either a short path for most numbers, which is correct, a test, and a call for the others.
    Where it is promised that ``x`` is at least 2^-100 or NaN (``NORMAL_RANGE``), only infinity is among the others, and
    what stands here is the compiler's own short path, of root and reciprocal, without the tests.
    """
    if INTERPRETED:
        inverse = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))
    elif NORMAL_RANGE:
        inverse = tl.inline_asm_elementwise(
            """{
            .reg .f32 y, s, h, e;
            rsqrt.approx.ftz.f32 y, $1;
            mul.rn.f32 s, $1, y;
            mul.rn.f32 h, y, 0f3F000000;
            neg.f32 e, s;
            fma.rn.f32 e, e, s, $1;
            fma.rn.f32 s, e, h, s;
            rcp.approx.ftz.f32 y, s;
            fma.rn.f32 e, y, s, 0fBF800000;
            neg.f32 e, e;
            fma.rn.f32 $0, y, e, y;
            }""",
            "=f,f",
            [x],
            tl.float32,
            True,
            1,
        )
        inverse = tl.where(x > HUGE, 0.0, inverse)
    else:
        root = tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        inverse = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [root], tl.float32, True, 1)
    return inverse


@triton.jit
def quotient(x, y):
    """``x / y``, rounded to nearest. Up to Triton 3.5 its own division and square root flush denormals to 0."""
    if INTERPRETED:
        result = tl.div_rn(x, y)
    else:
        result = tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    return result


@triton.jit
def bits_of(nu):
    """The bits of non-negative numbers and NaN, ordered like the numbers; a sign, which x86's NaN has, is dropped."""
    bits = nu.to(tl.int32, bitcast=True)
    if INTERPRETED:
        bits = bits & 0x7FFFFFFF
    return bits


@triton.jit
def grains(update, carrier):
    """The squares of updates in grains, as :meth:`~sm3_dist.maths.rms.SquareSum.add` has them: at most 2^22."""
    square = tl.minimum(update * update, tl.minimum(carrier * 0.5, LONGEST_SQUARE))
    if INTERPRETED:
        number = tl.ceil(square * ((1 / carrier) * OF_CARRIER)).to(tl.int32)
    else:  # the last bit of the carrier is worth a grain
        carried = tl.inline_asm_elementwise("add.rp.f32 $0, $1, $2;", "=f,f,f", [square, carrier], tl.float32, True, 1)
        number = carried.to(tl.int32, bitcast=True) - carrier.to(tl.int32, bitcast=True)
    return number


@triton.jit
def random_words(octet, row, tensor, step, seed_low, seed_high):
    """Four random words for each eight elements of a row: Philox4x32-7, see ``maths/rounding.py``."""
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    c0, c1, c2, c3 = octet.to(tl.uint32), row.to(tl.uint32), tensor.to(tl.uint32), step.to(tl.uint32)
    for _ in tl.static_range(7):
        high, low = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        c0, c1 = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0, c2 * 0xCD9E8D57
        c2, c3 = high ^ c3 ^ k1, low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def noise_of(columns, rows, number, count, seed_low, seed_high):
    """16 random bits for the weight and 16 for the momentum of each element, wherever it lies, by a call for each."""
    w0, w1, w2, w3 = random_words(columns >> 3, rows, number, count, seed_low, seed_high)
    which = columns & 7
    word = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
    lower, upper = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    is_lower = (which & 1) == 0
    return tl.where(is_lower, lower, upper), tl.where(is_lower, upper, lower)


@triton.jit
def noise_at(
    places,
    rows,
    number,
    count,
    seed_low,
    seed_high,
    VECTOR: tl.constexpr,
    TALL: tl.constexpr,
    GROUPS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """As ``noise_of``, for the elements of a tile; VECTOR: ``places`` are those of eights, which one call serves."""
    if VECTOR > 1:
        w0, w1, w2, w3 = random_words(places[None, :, :], rows, number, count, seed_low, seed_high)
        # Pairs are joined from the last bit of an element's place to the first.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        lower, upper = (words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32)
        of_weight = tl.reshape(tl.join(lower, upper), (TALL, GROUPS, SIDE))
        of_moment = tl.reshape(tl.join(upper, lower), (TALL, GROUPS, SIDE))
    else:
        of_weight, of_moment = noise_of(places[None, :, :], rows, number, count, seed_low, seed_high)
    return of_weight, of_moment


def type_of(dtype: torch.dtype | None) -> Any:
    """What Triton calls a dtype; ``None``: it is not there."""
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
    return None if dtype is None else names[dtype]
