"""The Triton kernel: one program steps one tile of rows and columns of one box.

Rows count the leading dimensions, columns the trailing ones, which are contiguous. The maxima of nu over the tile go to
a buffer aside by atomic maxima of their bit patterns, which are ordered like the values and exact in any order; in the
end they overwrite the accumulators. Division and square root round to nearest, and multiplications are not fused with
additions, so that the results are those of ``update_box``.

With block covers an entry speaks for indices side by side. Tiles are therefore laid so that groups of rows and columns
lie within a block, and only the maximum of each group goes to the buffer: one atomic operation for many elements.

What a program needs to know lies in tables on the device: addresses, strides, hyperparameters. Their fields are
declared here; :class:`sm3_dist.kernels.triton.backend.TritonKernel` fills them in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sm3_dist.kernels.fused import DIMS

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported without, and says so
    triton = None

INSTALLED = triton is not None
constexpr: Callable[[Any], Any] = tl.constexpr if INSTALLED else int
jit: Callable[[Any], Any] = triton.jit if INSTALLED else lambda function: function

# Fields of the tables. Those of dimensions, accumulators (one per dimension, and that of tiles) and operands (weight,
# gradient, momentum) stand for the first of several.
BOX_TENSOR, BOX_FIRST_TILE, BOX_ROWS, BOX_COLUMNS, BOX_OFFSET = map(constexpr, (0, 1, 2, 3, 4))
BOX_FIRST_COLUMN, BOX_FIRST_INDEX, BOX_STOP_INDEX = map(constexpr, (7, 8, 9))
BOX_SHAPE, BOX_START, BOX_IN_BLOCKS, BOX_WEIGHT_STRIDE, BOX_GRAD_STRIDE, BOX_MOMENT_STRIDE, BOX_FIELDS = (
    constexpr(10 + i * DIMS) for i in range(7)
)
DIMENSIONS = constexpr(DIMS)
TENSOR_PARAM, TENSOR_GROUP, TENSOR_MOMENT, TENSOR_PARTIAL, TENSOR_ACCUMULATOR = map(constexpr, (0, 1, 2, 3, 4))
TENSOR_ASIDE, TENSOR_GRID = constexpr(4 + DIMS + 1), constexpr(4 + 2 * (DIMS + 1))
TENSOR_FIELDS = constexpr(4 + (2 + DIMS) * (DIMS + 1))
LR, DECAY, MOMENTUM, FRESH, BETA, ONE_MINUS_BETA, EPS, UNSCALE, LIMIT, GROUP_FIELDS = map(constexpr, range(10))
CORRECTION, SCALE, PER_ONE, CAP, FACTOR_FIELDS = map(constexpr, range(5))

TINY, HUGE = constexpr(torch.finfo(torch.float32).tiny), constexpr(torch.finfo(torch.float32).max)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@jit
def widened(x, TYPE: tl.constexpr):
    """A value in float32. From bfloat16 by hand: Triton's interpreter gets denormals wrong."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@jit
def rounded(x, TYPE: tl.constexpr):
    """The nearest value of a type. Of bfloat16 by hand: Triton's interpreter cuts bits off."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        near = tl.where(x != x, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        near = x.to(TYPE)
    return near


@jit
def units(update, per_one, cap):
    """The squares of updates as integers, as :meth:`~sm3_dist.maths.rms.SquareSum.add` has them; of NaN the cap."""
    square = update * update * per_one
    square = tl.where(square < cap, square, cap)
    # Numbers from 2^23 on are integers. Others the addition rounds to an integer, half to even.
    return tl.where(square < 8388608.0, (square + 8388608.0) - 8388608.0, square).to(tl.int64)


@jit
def along_grid(box, tensor, numbers, A: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr):
    """How far along the grid of accumulator A rows or columns lie. They count the dimensions from FIRST to STOP.

    The grid tells the indices of dimension A apart, and of all other dimensions the blocks.
    """
    along = numbers * 0
    for i in tl.static_range(STOP - 1, FIRST - 1, -1):
        length = tl.load(box + BOX_SHAPE + i)
        if i == A:
            place = tl.load(box + BOX_START + i) + numbers % length
        else:
            place = (tl.load(box + BOX_IN_BLOCKS + i) + numbers % length) // BLOCK
        along += place * tl.load(tensor + TENSOR_GRID + A * DIMENSIONS + i)
        numbers = numbers // length
    return along


@jit
def covering(
    box, tensor, rows, columns, there, A: tl.constexpr, NDIM: tl.constexpr, LEAD: tl.constexpr, BLOCK: tl.constexpr
):
    """The entries of accumulator A, one of block covers, that cover the elements of a tile."""
    entries = tl.load(tensor + TENSOR_ACCUMULATOR + A).to(tl.pointer_type(tl.float32))
    of_row = along_grid(box, tensor, rows, A, 0, LEAD, BLOCK)
    of_column = along_grid(box, tensor, columns, A, LEAD, NDIM, BLOCK)
    return tl.load(entries + of_row[:, None] + of_column[None, :], mask=there, other=0.0)


@jit
def step_tiles(
    tiles,  # int32, one per program: its box
    boxes,  # int64, BOX_FIELDS per box
    tensors,  # int64, TENSOR_FIELDS per tensor
    addresses,  # int64, of weight and gradient of each parameter; gradient 0: there is none
    settings,  # float32, GROUP_FIELDS per param group
    factors,  # float32, FACTOR_FIELDS per tensor
    aside,  # int32, bits of the new accumulators, 0 before
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,  # None: no momentum
    NDIM: tl.constexpr,
    LEAD: tl.constexpr,  # leading dimensions, which count rows
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    CORRECT: tl.constexpr,  # whether nu is corrected for its start at 0
    SQUARES: tl.constexpr,  # whether updates are scaled, and their squares added up
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,  # indices per block of the covers; 0: covers are whole slices
    PRODUCT: tl.constexpr,  # hexadecimal digits: where in memory order each dimension comes; -1: minimum, no product
    ROWS: tl.constexpr,  # so many rows side by side differ by nothing but indices of one block of one dimension
    COLUMNS: tl.constexpr,  # likewise
):
    """Step one tile: ``update_box``, and the maxima."""
    box = boxes + tl.load(tiles + tl.program_id(0)).to(tl.int64) * BOX_FIELDS
    tensor = tensors + tl.load(box + BOX_TENSOR) * TENSOR_FIELDS
    factor = factors + tl.load(box + BOX_TENSOR) * FACTOR_FIELDS
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
    if BLOCK > 0:  # tiles begin where groups of indices do, which may be before the box
        index = rows % tl.load(box + BOX_SHAPE + LEAD - 1)
        is_row &= (index >= tl.load(box + BOX_FIRST_INDEX)) & (index < tl.load(box + BOX_STOP_INDEX))
        is_column &= columns >= tl.load(box + BOX_FIRST_COLUMN)
    there = is_row[:, None] & is_column[None, :]

    # Where they lie in memory, and the least accumulator entry that covers each.
    w_rows, g_rows, m_rows = rows * 0, rows * 0, rows * 0
    floor = tl.full((TALL, WIDE), float("inf"), tl.float32)
    rest = rows
    for i in tl.static_range(LEAD - 1, -1, -1):
        length = tl.load(box + BOX_SHAPE + i)
        index = rest % length
        rest = rest // length
        w_rows += index * tl.load(box + BOX_WEIGHT_STRIDE + i)
        g_rows += index * tl.load(box + BOX_GRAD_STRIDE + i)
        m_rows += index * tl.load(box + BOX_MOMENT_STRIDE + i)
        if BLOCK == 0:
            entries = tl.load(tensor + TENSOR_ACCUMULATOR + i).to(tl.pointer_type(tl.float32))
            cover = tl.load(entries + tl.load(box + BOX_START + i) + index, mask=is_row, other=0.0)
            floor = tl.minimum(floor, cover[:, None], propagate_nan=tl.PropagateNan.ALL)
    if BLOCK == 0:
        rest = columns
        for i in tl.static_range(NDIM - 1, LEAD - 1, -1):
            length = tl.load(box + BOX_SHAPE + i)
            entries = tl.load(tensor + TENSOR_ACCUMULATOR + i).to(tl.pointer_type(tl.float32))
            cover = tl.load(entries + tl.load(box + BOX_START + i) + rest % length, mask=is_column, other=0.0)
            floor = tl.minimum(floor, cover[None, :], propagate_nan=tl.PropagateNan.ALL)
            rest = rest // length
    elif PRODUCT < 0:
        for i in tl.static_range(NDIM + 1):
            cover = covering(box, tensor, rows, columns, there, i, NDIM, LEAD, BLOCK)
            floor = tl.minimum(floor, cover, propagate_nan=tl.PropagateNan.ALL)
    else:  # as _product() in update.py, in the order of the dimensions
        of_tile = covering(box, tensor, rows, columns, there, NDIM, NDIM, LEAD, BLOCK)
        of_tile = tl.where(of_tile < TINY, TINY, tl.where(of_tile > HUGE, HUGE, of_tile))
        floor = covering(box, tensor, rows, columns, there, PRODUCT & 15, NDIM, LEAD, BLOCK)
        floor = tl.where(floor > HUGE, HUGE, floor)
        for i in tl.static_range(1, NDIM):
            cover = covering(box, tensor, rows, columns, there, (PRODUCT >> 4 * i) & 15, NDIM, LEAD, BLOCK)
            floor = floor * tl.div_rn(tl.where(cover > HUGE, HUGE, cover), of_tile)

    # The update, line by line that of update_box; factors that are not asked for are 1, and exact.
    g_at = grad_address.to(tl.pointer_type(GRAD)) + tl.load(box + BOX_OFFSET + 1) + g_rows[:, None] + columns[None, :]
    grad = widened(tl.load(g_at, mask=there, other=0.0), GRAD) * tl.load(group + UNSCALE)
    nu = grad * grad * tl.load(group + ONE_MINUS_BETA) + floor * tl.load(group + BETA)
    corrected = nu
    if CORRECT:
        corrected = nu * tl.load(factor + CORRECTION)
    root = tl.sqrt_rn(corrected + tl.load(group + EPS))
    update = tl.div_rn(tl.full((TALL, WIDE), 1.0, tl.float32), root) * grad
    if SQUARES:
        squares = tl.where(there, units(update, tl.load(factor + PER_ONE), tl.load(factor + CAP)), 0)
        tl.atomic_add(
            tl.load(tensor + TENSOR_PARTIAL).to(tl.pointer_type(tl.int64)), tl.sum(tl.ravel(squares)), sem="relaxed"
        )
        update = update * tl.load(factor + SCALE)
        limit = tl.load(group + LIMIT)
        update = tl.where(update < -limit, -limit, update)  # NaN stays
        update = tl.where(update > limit, limit, update)
    update = update * tl.load(group + FRESH)
    if MOMENT is not None:
        m_at = tl.load(tensor + TENSOR_MOMENT).to(tl.pointer_type(MOMENT)) + tl.load(box + BOX_OFFSET + 2)
        m_at = m_at + m_rows[:, None] + columns[None, :]
        mean = widened(tl.load(m_at, mask=there, other=0.0), MOMENT) * tl.load(group + MOMENTUM) + update
        tl.store(m_at, rounded(mean, MOMENT), mask=there)
        if NESTEROV:  # noqa: SIM108
            update = update + mean * tl.load(group + MOMENTUM)
        else:
            update = mean
    w_at = tl.load(address).to(tl.pointer_type(WEIGHT)) + tl.load(box + BOX_OFFSET) + w_rows[:, None] + columns[None, :]
    weight = widened(tl.load(w_at, mask=there, other=0.0), WEIGHT) * tl.load(group + DECAY)
    tl.store(w_at, rounded(weight - update * tl.load(group + LR), WEIGHT), mask=there)

    # The maxima, without the sign that a NaN may have. A vector's accumulator has an entry for each element.
    peak = tl.where(there, nu.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    if NDIM == 1:
        entries = tl.load(tensor + TENSOR_ACCUMULATOR).to(tl.pointer_type(tl.int32)) + tl.load(box + BOX_START)
        tl.store(entries + columns, tl.max(peak, axis=0), mask=is_column)
    elif BLOCK > 0:
        # Of each group of columns, of rows, and of both: the first stands for all, for they lie in one block.
        of_columns = tl.max(tl.reshape(peak, (TALL, WIDE // COLUMNS, COLUMNS)), axis=2)
        of_rows = tl.max(tl.reshape(peak, (TALL // ROWS, ROWS, WIDE)), axis=1)
        of_both = tl.max(tl.reshape(of_columns, (TALL // ROWS, ROWS, WIDE // COLUMNS)), axis=1)
        some_rows = (tile // across) * TALL + tl.arange(0, TALL // ROWS).to(tl.int64) * ROWS
        some_columns = (tile % across) * WIDE + tl.arange(0, WIDE // COLUMNS).to(tl.int64) * COLUMNS
        are_rows = (some_rows < row_count) & (
            some_rows % tl.load(box + BOX_SHAPE + LEAD - 1) < tl.load(box + BOX_STOP_INDEX)
        )
        are_columns = some_columns < column_count
        for i in tl.static_range(NDIM + 1):
            entries = aside + tl.load(tensor + TENSOR_ASIDE + i)
            if i == LEAD - 1:
                at_row = along_grid(box, tensor, rows, i, 0, LEAD, BLOCK)
                at_column = along_grid(box, tensor, some_columns, i, LEAD, NDIM, BLOCK)
                inside = is_row[:, None] & are_columns[None, :]
                tl.atomic_max(entries + at_row[:, None] + at_column[None, :], of_columns, mask=inside, sem="relaxed")
            elif i == LEAD:
                at_row = along_grid(box, tensor, some_rows, i, 0, LEAD, BLOCK)
                at_column = along_grid(box, tensor, columns, i, LEAD, NDIM, BLOCK)
                inside = are_rows[:, None] & is_column[None, :]
                tl.atomic_max(entries + at_row[:, None] + at_column[None, :], of_rows, mask=inside, sem="relaxed")
            else:
                at_row = along_grid(box, tensor, some_rows, i, 0, LEAD, BLOCK)
                at_column = along_grid(box, tensor, some_columns, i, LEAD, NDIM, BLOCK)
                inside = are_rows[:, None] & are_columns[None, :]
                tl.atomic_max(entries + at_row[:, None] + at_column[None, :], of_both, mask=inside, sem="relaxed")
    else:
        of_row, of_column = tl.max(peak, axis=1), tl.max(peak, axis=0)
        rest = rows
        for i in tl.static_range(LEAD - 1, -1, -1):
            length = tl.load(box + BOX_SHAPE + i)
            entries = aside + tl.load(tensor + TENSOR_ASIDE + i) + tl.load(box + BOX_START + i)
            tl.atomic_max(entries + rest % length, of_row, mask=is_row, sem="relaxed")
            rest = rest // length
        rest = columns
        for i in tl.static_range(NDIM - 1, LEAD - 1, -1):
            length = tl.load(box + BOX_SHAPE + i)
            entries = aside + tl.load(tensor + TENSOR_ASIDE + i) + tl.load(box + BOX_START + i)
            tl.atomic_max(entries + rest % length, of_column, mask=is_column, sem="relaxed")
            rest = rest // length


def type_of(dtype: torch.dtype | None) -> Any:
    """What Triton calls a dtype; ``None``: it is not there."""
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return None if dtype is None else names[dtype]
