"""The kernels at both ends of a step: what depends on the steps taken so far, and the maxima that went aside."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sm3_dist.kernels.triton.matrix import CARRIER, FACTOR_FIELDS, GRAIN, NEW, OLD, SCALE
from sm3_dist.kernels.triton.values import LONGEST_SQUARE, OF_CARRIER
from sm3_dist.maths import rms

# Fields of the tables.
P_STEP, P_FIRST, P_TENSORS, PARAM_FIELDS = map(tl.constexpr, range(4))
F_BETA, F_CORRECTED, F_RMS, F_FIRST_SQUARE, F_UNIT, F_PER_ONE, MADE_OF_FIELDS = map(tl.constexpr, range(7))
PIECE_PARAM, PIECE_FROM, PIECE_TO, PIECE_LENGTH, PIECE_FIELDS = map(tl.constexpr, range(5))
PIECE = tl.constexpr(1024)
"""Entries that a program brings."""
LANES = tl.constexpr(32)
"""Parameters that a program counts the steps of."""
EXPONENT, CARRIED = tl.constexpr(rms.EXPONENT), tl.constexpr(float(rms.CARRIED))
WITHOUT_AVERAGE = tl.constexpr(rms.WITHOUT_AVERAGE)


@triton.jit
def begin_step(
    parameters,  # int64, PARAM_FIELDS each: where its steps are counted, its first tensor, how many tensors
    param_count,  # int32, one number
    averages,  # int64, of each tensor where its average of sums of squares lies; 0: it has none
    made_of,  # float64, MADE_OF_FIELDS per tensor
    addresses,  # int64, of weight and gradient of each parameter; gradient 0: there is none
    factors,  # float32, FACTOR_FIELDS per tensor
    counts,  # int32, how many steps each tensor has taken before
):
    """Note the steps taken and what depends on them, and count one more: the weights in ``nu``, scale and carrier.

    (A power is made of a logarithm. In float64 it is within its last bits, of which none is left in float32.)
    """
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = number < tl.load(param_count)
    there &= tl.load(addresses + number * 2 + 1, mask=there, other=0) != 0
    param = parameters + number * PARAM_FIELDS
    steps = tl.load(param + P_STEP, mask=there, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=there, other=0.0)
    first = tl.load(param + P_FIRST, mask=there, other=0)
    tensors = tl.load(param + P_TENSORS, mask=there, other=0)
    for i in range(tl.max(tensors, axis=0)):
        these = there & (i < tensors)
        of = made_of + (first + i) * MADE_OF_FIELDS
        beta = tl.load(of + F_BETA, mask=these, other=0.0)
        power = tl.exp2(tl.log2(tl.where(beta > 0, beta, 0.5)) * (step.to(tl.float64) + 1))
        is_corrected = tl.load(of + F_CORRECTED, mask=these, other=0.0) > 0
        new = tl.where(is_corrected, tl.where(step > 0, (1 - beta) / (1 - power), 1.0), 1 - beta)
        old = tl.where(is_corrected, 1 - new, tl.where(beta > 0, beta, 1.0))
        at = tl.load(averages + first + i, mask=these, other=0)
        average = tl.load(at.to(tl.pointer_type(tl.int64)), mask=these & (at != 0), other=0)
        first_square = tl.load(of + F_FIRST_SQUARE, mask=these, other=1.0)
        known = average.to(tl.float64) / tl.load(of + F_UNIT, mask=these, other=1.0)
        mean = tl.where(average > 0, known, first_square)
        scale = (1 / tl.sqrt(mean)) * tl.load(of + F_RMS, mask=these, other=1.0)
        so_far = tl.where(average > 0, known, first_square * WITHOUT_AVERAGE)
        power = (so_far.to(tl.int64, bitcast=True) & EXPONENT).to(tl.float64, bitcast=True)
        per_one = tl.load(of + F_PER_ONE, mask=these, other=1.0)
        carrier = tl.maximum(tl.minimum(power * CARRIED, 2 * LONGEST_SQUARE), (1 / per_one) * OF_CARRIER)
        factor = factors + (first + i) * FACTOR_FIELDS
        tl.store(factor + OLD, old.to(tl.float32), mask=these)
        tl.store(factor + NEW, new.to(tl.float32), mask=these)
        tl.store(factor + SCALE, scale.to(tl.float32), mask=these)
        tl.store(factor + CARRIER, carrier.to(tl.float32), mask=these)
        tl.store(factor + GRAIN, (carrier * (per_one / OF_CARRIER)).to(tl.float32), mask=these)
        tl.store(counts + first + i, step.to(tl.int32), mask=these)
    tl.store(steps, step + 1.0, mask=there)


@triton.jit
def end_step(
    pieces,  # int64, PIECE_FIELDS per program
    addresses,  # int64, of weight and gradient of each parameter; gradient 0: there is none
):
    """Overwrite accumulators with the maxima from aside, which is left as it was before the step: 0."""
    piece = pieces + tl.program_id(0) * PIECE_FIELDS
    if tl.load(addresses + tl.load(piece + PIECE_PARAM) * 2 + 1) == 0:
        return
    at = tl.arange(0, PIECE)
    there = at < tl.load(piece + PIECE_LENGTH)
    aside = tl.load(piece + PIECE_FROM).to(tl.pointer_type(tl.int32)) + at
    maxima = tl.load(aside, mask=there, other=0)
    tl.store(tl.load(piece + PIECE_TO).to(tl.pointer_type(tl.int32)) + at, maxima, mask=there)
    tl.store(aside, maxima * 0, mask=there)
