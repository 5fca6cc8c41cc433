"""The kernel of everything else: vectors, and tensors whose covers are whole slices. A program steps a tile of a box.

Rows count the leading dimensions, columns the trailing ones, which are contiguous. The maxima of nu over the tile go to
a buffer aside by atomic maxima of their bit patterns, which are ordered like the values and exact in any order; in the
end they overwrite the accumulators. Division and square root round to nearest, and multiplications are not fused with
additions, so that the results are those of ``update_box``.

What a program needs to know lies in tables on the device: addresses, strides, hyperparameters. Their fields are
declared here; :class:`sm3_dist.kernels.triton.backend.TritonKernel` fills them in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from sm3_dist.kernels.fused import DIMS
from sm3_dist.kernels.triton.matrix import (
    CARRIER,
    DECAY,
    FACTOR_FIELDS,
    GRAIN,
    GROUP_FIELDS,
    LR,
    NEW,
    OLD,
    SCALE,
    UNSCALE,
)
from sm3_dist.kernels.triton.values import (
    bits_of,
    grains,
    inverse_root,
    noise_of,
    rounded,
    rounded_randomly,
    unspecialized,
    widened,
)

# Fields of the tables. Those of dimensions, accumulators (one per dimension) and operands (weight, gradient, momentum)
# stand for the first of several.
BOX_TENSOR, BOX_NUMBER, BOX_ROWS, BOX_COLUMNS, BOX_OFFSET = map(tl.constexpr, range(5))
BOX_ROW_PLACE, BOX_COLUMN_PLACE = map(tl.constexpr, (7, 8))
BOX_SHAPE, BOX_START, BOX_ROW_STEP, BOX_COLUMN_STEP, BOX_WEIGHT_STRIDE, BOX_GRAD_STRIDE, BOX_MOMENT_STRIDE = (
    tl.constexpr(9 + i * DIMS) for i in range(7)
)
BOX_FIRST_TILE, BOX_FIELDS = tl.constexpr(9 + 7 * DIMS), tl.constexpr(10 + 7 * DIMS)
TENSOR_PARAM, TENSOR_GROUP, TENSOR_MOMENT, TENSOR_PARTIAL, TENSOR_NUMBER, TENSOR_ACCUMULATOR = map(
    tl.constexpr, range(6)
)
TENSOR_ASIDE, TENSOR_FIELDS = tl.constexpr(5 + DIMS), tl.constexpr(5 + 2 * DIMS)


@unspecialized
def step_tiles(
    tiles,  # int32, one per program: its box
    boxes,  # int64, BOX_FIELDS per box
    tensors,  # int64, TENSOR_FIELDS per tensor
    addresses,  # int64, of weight and gradient of each parameter; gradient 0: there is none
    settings,  # float32, GROUP_FIELDS per param group
    factors,  # float32, FACTOR_FIELDS per tensor
    counts,  # int32, how many steps each tensor has taken before
    momentum,
    fresh,  # what updates are multiplied with that are not scaled: 1 - momentum, with the sign of maximize
    eps,
    limit,
    seed_low,
    seed_high,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,  # None: no momentum
    UNSCALED: tl.constexpr,  # whether gradients are to be multiplied with an inverse loss scale
    AVERAGE: tl.constexpr,  # whether nu is a moving average, and not a sum
    SQUARES: tl.constexpr,  # 0: updates are not scaled; else they are, and 64 bits add up their squares
    NESTEROV: tl.constexpr,
    NORMAL_RANGE: tl.constexpr,  # whether eps is at least 2^-100
    RANDOM: tl.constexpr,  # whether bfloat16 is rounded stochastically
    NDIM: tl.constexpr,
    LEAD: tl.constexpr,  # leading dimensions, which count rows
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Step one tile: ``update_box``, and the maxima."""
    box = boxes + tl.load(tiles + tl.program_id(0)).to(tl.int64) * BOX_FIELDS
    entry = tl.load(box + BOX_NUMBER)
    tensor = tensors + tl.load(box + BOX_TENSOR) * TENSOR_FIELDS
    factor = factors + entry * FACTOR_FIELDS
    address = addresses + tl.load(tensor + TENSOR_PARAM) * 2
    grad_address = tl.load(address + 1)
    if grad_address == 0:
        return
    group = settings + tl.load(tensor + TENSOR_GROUP) * GROUP_FIELDS

    # Which elements.
    tile = tl.program_id(0).to(tl.int64) - tl.load(box + BOX_FIRST_TILE)
    row_count, column_count = tl.load(box + BOX_ROWS), tl.load(box + BOX_COLUMNS)
    across = (column_count + WIDE - 1) // WIDE
    rows = (tile // across) * TALL + tl.arange(0, TALL).to(tl.int64)
    columns = (tile % across) * WIDE + tl.arange(0, WIDE).to(tl.int64)
    is_row, is_column = rows < row_count, columns < column_count
    there = is_row[:, None] & is_column[None, :]

    # Where they lie in memory and in the tensor, and the least accumulator entry that covers each.
    w_rows, g_rows, m_rows = rows * 0, rows * 0, rows * 0
    row_places = (rows * 0)[:, None] + (columns * 0)[None, :] + tl.load(box + BOX_ROW_PLACE)
    column_places = (rows * 0)[:, None] + (columns * 0)[None, :] + tl.load(box + BOX_COLUMN_PLACE)
    floor = tl.full((TALL, WIDE), float("inf"), tl.float32)
    rest = rows
    for i in tl.static_range(LEAD - 1, -1, -1):
        length = tl.load(box + BOX_SHAPE + i)
        index = rest % length
        rest = rest // length
        w_rows += index * tl.load(box + BOX_WEIGHT_STRIDE + i)
        g_rows += index * tl.load(box + BOX_GRAD_STRIDE + i)
        m_rows += index * tl.load(box + BOX_MOMENT_STRIDE + i)
        row_places += (index * tl.load(box + BOX_ROW_STEP + i))[:, None]
        column_places += (index * tl.load(box + BOX_COLUMN_STEP + i))[:, None]
        entries = tl.load(tensor + TENSOR_ACCUMULATOR + i).to(tl.pointer_type(tl.float32))
        cover = tl.load(entries + tl.load(box + BOX_START + i) + index, mask=is_row, other=0.0)
        floor = tl.minimum(floor, cover[:, None], propagate_nan=tl.PropagateNan.ALL)
    rest = columns
    for i in tl.static_range(NDIM - 1, LEAD - 1, -1):
        length = tl.load(box + BOX_SHAPE + i)
        index = rest % length
        rest = rest // length
        row_places += (index * tl.load(box + BOX_ROW_STEP + i))[None, :]
        column_places += (index * tl.load(box + BOX_COLUMN_STEP + i))[None, :]
        entries = tl.load(tensor + TENSOR_ACCUMULATOR + i).to(tl.pointer_type(tl.float32))
        cover = tl.load(entries + tl.load(box + BOX_START + i) + index, mask=is_column, other=0.0)
        floor = tl.minimum(floor, cover[None, :], propagate_nan=tl.PropagateNan.ALL)

    # The update, line by line that of update_box; factors that are not asked for are 1, and exact.
    g_at = grad_address.to(tl.pointer_type(GRAD)) + tl.load(box + BOX_OFFSET + 1) + g_rows[:, None] + columns[None, :]
    grad = widened(tl.load(g_at, mask=there, other=0.0), GRAD)
    if UNSCALED:
        grad = grad * tl.load(group + UNSCALE)
    nu = grad * grad
    if AVERAGE:
        nu = nu * tl.load(factor + NEW)
        floor = floor * tl.load(factor + OLD)
    nu = nu + floor
    update = inverse_root(nu + eps, NORMAL_RANGE) * grad
    if SQUARES > 0:
        squares = grains(tl.where(there, update, 0.0), tl.load(factor + CARRIER)).to(tl.int64)
        total = tl.sum(tl.ravel(squares)) * tl.load(factor + GRAIN).to(tl.int64)
        tl.atomic_add(tl.load(tensor + TENSOR_PARTIAL).to(tl.pointer_type(tl.int64)), total, sem="relaxed")
        update = update * tl.load(factor + SCALE)
        update = tl.maximum(update, -limit, propagate_nan=tl.PropagateNan.ALL)
        update = tl.minimum(update, limit, propagate_nan=tl.PropagateNan.ALL)
    else:
        update = update * fresh
    if RANDOM or tl.int8 == MOMENT:
        number, count = tl.load(tensor + TENSOR_NUMBER), tl.load(counts + entry)
        w_noise, m_noise = noise_of(column_places, row_places, number, count, seed_low, seed_high)
    if MOMENT is not None:
        m_at = tl.load(tensor + TENSOR_MOMENT).to(tl.pointer_type(MOMENT)) + tl.load(box + BOX_OFFSET + 2)
        m_at = m_at + m_rows[:, None] + columns[None, :]
        mean = widened(tl.load(m_at, mask=there, other=0), MOMENT) * momentum + update
        if tl.int8 == MOMENT or (RANDOM and tl.bfloat16 == MOMENT):
            tl.store(m_at, rounded_randomly(mean, m_noise, MOMENT), mask=there)
        else:
            tl.store(m_at, rounded(mean, MOMENT), mask=there)
        if NESTEROV:  # noqa: SIM108
            update = update + mean * momentum
        else:
            update = mean
    w_at = tl.load(address).to(tl.pointer_type(WEIGHT)) + tl.load(box + BOX_OFFSET) + w_rows[:, None] + columns[None, :]
    weight = widened(tl.load(w_at, mask=there, other=0.0), WEIGHT) * tl.load(group + DECAY)
    weight = weight - update * tl.load(group + LR)
    if RANDOM and tl.bfloat16 == WEIGHT:
        tl.store(w_at, rounded_randomly(weight, w_noise, WEIGHT), mask=there)
    else:
        tl.store(w_at, rounded(weight, WEIGHT), mask=there)

    # The maxima. A vector's accumulator has an entry for each element.
    peak = tl.where(there, bits_of(nu), 0)
    if NDIM == 1:
        entries = tl.load(tensor + TENSOR_ACCUMULATOR).to(tl.pointer_type(tl.int32)) + tl.load(box + BOX_START)
        tl.store(entries + columns, tl.max(peak, axis=0), mask=is_column)
    else:
        of_row, of_column = tl.max(peak, axis=1), tl.max(peak, axis=0)
        rest = rows
        for i in tl.static_range(LEAD - 1, -1, -1):
            length = tl.load(box + BOX_SHAPE + i)
            entries = tl.load(tensor + TENSOR_ASIDE + i).to(tl.pointer_type(tl.int32)) + tl.load(box + BOX_START + i)
            tl.atomic_max(entries + rest % length, of_row, mask=is_row, sem="relaxed")
            rest = rest // length
        rest = columns
        for i in tl.static_range(NDIM - 1, LEAD - 1, -1):
            length = tl.load(box + BOX_SHAPE + i)
            entries = tl.load(tensor + TENSOR_ASIDE + i).to(tl.pointer_type(tl.int32)) + tl.load(box + BOX_START + i)
            tl.atomic_max(entries + rest % length, of_column, mask=is_column, sem="relaxed")
            rest = rest // length
