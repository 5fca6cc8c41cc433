"""The kernel of matrices: a program walks down a strip of rows, with the maxima of its columns in registers.

Most elements of a model lie in matrices whose rows are contiguous, and with block covers every tensor counts as one.
Everything but addresses is in 32 bits, and is found in a table that has one line for each strip.

A strip of a tensor with block covers lies in one row of blocks. Where its program alone knows of the entries that cover
it, it overwrites them when it is through: each was read before by all that goes into its new maximum. Entries that
several programs know of, those of whole rows and columns above all, go to a buffer aside (``ASIDE``), from which
``ends.py`` brings them.

A tile is ``TALL`` rows of ``GROUPS`` groups of ``SIDE`` columns, each in one block. ``VECTOR`` promises that columns
begin and end at multiples of so many elements, and of 16 bytes in memory (8 for codes), that all operands have the same
distance from row to row, and that blocks are as long as groups.

While a tile is worked on, the next one comes from memory to the L2 cache, which takes no registers. With more tiles
ahead, thousands of programs would drive out of it what they are about to read.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sm3_dist.kernels.triton.values import (
    HUGE,
    INTERPRETED,
    TINY,
    bits_of,
    grains,
    inverse_root,
    noise_at,
    quotient,
    rounded,
    rounded_randomly,
    unspecialized,
    widened,
)

# Fields of the tables. A matrix counts its rows and columns from 0. Origins are where its first element lies from the
# beginning of each operand, lines how far it is from row to row, places those of its first element in the tensor.
STRIP_MATRIX, STRIP_ROW, STRIP_ROWS, STRIP_ROW_BLOCK = map(tl.constexpr, range(4))
STRIP_COLUMN, STRIP_STOP, STRIP_COLUMN_BLOCK, STRIP_FIELDS = map(tl.constexpr, range(4, 8))
M_TENSOR, M_PARAM, M_GROUP, M_MOMENT, M_PARTIAL, M_NUMBER, M_COLUMNS, M_LENGTH = map(tl.constexpr, range(8))
M_WEIGHT_ORIGIN, M_GRAD_ORIGIN, M_MOMENT_ORIGIN, M_WEIGHT_LINE, M_GRAD_LINE, M_MOMENT_LINE = map(
    tl.constexpr, range(8, 14)
)
M_ROW_PLACE, M_COLUMN_PLACE, M_ROW_COVERS, M_COLUMN_COVERS, M_TILE_COVERS = map(tl.constexpr, range(14, 19))
M_ROW_LINE, M_COLUMN_LINE, M_ROW_ASIDE, M_COLUMN_ASIDE, M_TILE_ASIDE, M_TABLE = map(tl.constexpr, range(19, 25))
MATRIX_FIELDS = tl.constexpr(25)
LR, DECAY, UNSCALE, GROUP_FIELDS = map(tl.constexpr, range(4))
OLD, NEW, SCALE, CARRIER, GRAIN, FACTOR_FIELDS = map(tl.constexpr, range(6))


@triton.jit
def start_of(address, origin, row, line, column, TYPE: tl.constexpr):
    """Where a row of a strip begins in memory."""
    at = address + (origin + row.to(tl.int64) * line + column) * (TYPE.primitive_bitwidth // 8)
    return at.to(tl.pointer_type(TYPE))


@triton.jit
def tile_at(start, down, offsets, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Where the elements of a tile lie in memory."""
    first = start + down
    if VECTOR > 1:
        first = tl.multiple_of(first, 8 if tl.int8 == TYPE else 16)
    return first + offsets


@triton.jit
def fetch(start, below, height, line, column, stop, TYPE: tl.constexpr, TALL: tl.constexpr, WIDTH: tl.constexpr):
    """Have the L2 cache read the lines of 128 bytes in which the next tile of a strip lies; of its last, that tile."""
    LINE: tl.constexpr = 1024 // TYPE.primitive_bitwidth
    first = tl.maximum(tl.minimum(below, height - TALL), 0)
    rows = tl.minimum(tl.arange(0, TALL), height - 1) * line
    columns = tl.maximum(tl.minimum(tl.arange(0, WIDTH // LINE) * LINE, stop - column - 1), -column)
    at = (start + first * line) + (rows[:, None] + columns[None, :])
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


@triton.jit
def raised(old, aside, values, mask, ASIDE: tl.constexpr):
    """Bring new maxima: overwrite entries, or raise those aside."""
    if ASIDE:
        tl.atomic_max(aside, values, mask=mask, sem="relaxed")
    else:
        tl.store(old.to(tl.pointer_type(tl.int32)), values, mask=mask)


@unspecialized
def step_strip(
    strips,  # int32, STRIP_FIELDS per program
    matrices,  # int64, MATRIX_FIELDS each
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
    SQUARES: tl.constexpr,  # whether updates are scaled; then so many bits add up squares of them, 32 or 64. 0: not
    NESTEROV: tl.constexpr,
    NORMAL_RANGE: tl.constexpr,  # whether eps is at least 2^-100
    RANDOM: tl.constexpr,  # whether bfloat16 is rounded stochastically
    PRODUCT: tl.constexpr,  # whether of covers the product is taken, and not the least
    GROUPS: tl.constexpr,
    SIDE: tl.constexpr,
    TALL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,  # whether covers are blocks; else whole rows and columns
    ASIDE: tl.constexpr,
    TABLE: tl.constexpr,  # whether a table says where columns lie
):
    """Step one strip: ``update_box``, and the maxima."""
    strip = strips + tl.program_id(0) * STRIP_FIELDS
    matrix = matrices + tl.load(strip + STRIP_MATRIX) * MATRIX_FIELDS
    row, height, column = tl.load(strip + STRIP_ROW), tl.load(strip + STRIP_ROWS), tl.load(strip + STRIP_COLUMN)
    param = addresses + tl.load(matrix + M_PARAM) * 2
    grad_address = tl.load(param + 1)
    if grad_address == 0:
        return
    tensor = tl.load(matrix + M_TENSOR).to(tl.int32)
    group = settings + tl.load(matrix + M_GROUP).to(tl.int32) * GROUP_FIELDS
    factor = factors + tensor * FACTOR_FIELDS
    lr, decay = tl.load(group + LR), tl.load(group + DECAY)
    stop = tl.load(strip + STRIP_STOP)
    line = tl.load(matrix + M_WEIGHT_LINE).to(tl.int32)
    g_line, m_line = line, line
    if VECTOR > 1:
        column, stop = tl.multiple_of(column, VECTOR), tl.multiple_of(stop, VECTOR)
        line = tl.multiple_of(line, VECTOR)
        g_line, m_line = line, line
        length: tl.constexpr = SIDE
    else:
        length = tl.load(matrix + M_LENGTH).to(tl.int32)
        g_line, m_line = tl.load(matrix + M_GRAD_LINE).to(tl.int32), tl.load(matrix + M_MOMENT_LINE).to(tl.int32)

    # Where the strip lies in memory.
    each, within = tl.arange(0, GROUPS), tl.arange(0, SIDE)
    inside = (each * length)[:, None] + within[None, :]
    columns = column + inside
    is_column = (columns >= 0) & (columns < stop)
    if VECTOR == 1:
        is_column &= (within < length)[None, :]
    lanes = tl.arange(0, TALL)[:, None, None]
    in_line, w_inside, g_inside, m_inside = column, inside, inside, inside
    if TABLE:
        in_line = column * 0
        table = tl.load(matrix + M_TABLE).to(tl.pointer_type(tl.int32)) + columns
        w_inside = tl.load(table, mask=is_column, other=0)
        entries = tl.load(matrix + M_COLUMNS)
        g_inside = tl.load(table + entries, mask=is_column, other=0)
        m_inside = tl.load(table + 2 * entries, mask=is_column, other=0)
    w_start = start_of(tl.load(param), tl.load(matrix + M_WEIGHT_ORIGIN), row, line, in_line, WEIGHT)
    g_start = start_of(grad_address, tl.load(matrix + M_GRAD_ORIGIN), row, g_line, in_line, GRAD)
    w_offsets = lanes * line + w_inside[None, :, :]
    g_offsets, m_offsets = w_offsets, w_offsets
    if VECTOR == 1:
        g_offsets, m_offsets = lanes * g_line + g_inside[None, :, :], lanes * m_line + m_inside[None, :, :]
    if MOMENT is not None:
        m_start = start_of(tl.load(matrix + M_MOMENT), tl.load(matrix + M_MOMENT_ORIGIN), row, m_line, in_line, MOMENT)

    # The covers of columns and tiles.
    if BLOCK:  # noqa: SIM108
        row_line = tl.load(matrix + M_ROW_LINE).to(tl.int32)
    else:
        row_line = 1
    row_entry, column_entry = row.to(tl.int64) * row_line, column.to(tl.int64)
    row_covers = tl.load(matrix + M_ROW_COVERS).to(tl.pointer_type(tl.float32))
    column_covers = tl.load(matrix + M_COLUMN_COVERS).to(tl.pointer_type(tl.float32))
    is_block = each == 0
    if BLOCK:
        is_block = (column + each * length < stop) & (column + each * length + length > 0)
        column_block = tl.load(strip + STRIP_COLUMN_BLOCK)
        row_block = tl.load(strip + STRIP_ROW_BLOCK).to(tl.int64)
        row_entry += column_block
        column_entry += row_block * tl.load(matrix + M_COLUMN_LINE)
        tile_entry = row_block * row_line + column_block
        tile_covers = tl.load(matrix + M_TILE_COVERS).to(tl.pointer_type(tl.float32)) + tile_entry
    row_covers += row_entry
    column_covers += column_entry
    if VECTOR > 1:
        column_covers = tl.multiple_of(column_covers, 16)
    sides = tl.load(column_covers + inside, mask=is_column, other=0.0)
    if PRODUCT:
        sides = tl.minimum(sides, HUGE, propagate_nan=tl.PropagateNan.ALL)
    if BLOCK:
        tiles = tl.load(tile_covers + each, mask=is_block, other=0.0)
        if PRODUCT:
            tiles = tl.maximum(tiles, TINY, propagate_nan=tl.PropagateNan.ALL)
            tiles = tl.minimum(tiles, HUGE, propagate_nan=tl.PropagateNan.ALL)
            sides = quotient(sides, tl.broadcast_to(tiles[:, None], (GROUPS, SIDE)))
        else:
            sides = tl.minimum(sides, tiles[:, None], propagate_nan=tl.PropagateNan.ALL)
    if AVERAGE:
        old, new = tl.load(factor + OLD), tl.load(factor + NEW)
        sides = sides * old

    if SQUARES > 0:
        scale, carrier = tl.load(factor + SCALE), tl.load(factor + CARRIER)
        THREAD: tl.constexpr = 4 if tl.float32 == WEIGHT else 8
        if VECTOR > 1:  # then what a thread adds up of a row is there as a whole, or not at all
            firsts = column + (each * SIDE)[:, None] + (tl.arange(0, SIDE // THREAD) * THREAD)[None, :]
            are_columns = (firsts >= 0) & (firsts < stop)
        sums = tl.zeros((TALL, GROUPS, SIDE // THREAD), tl.uint32 if SQUARES == 32 else tl.int64)
    if RANDOM or tl.int8 == MOMENT:
        number, count = tl.load(matrix + M_NUMBER), tl.load(counts + tensor)
        row_places = tl.load(matrix + M_ROW_PLACE) + row + tl.arange(0, TALL)[:, None, None]
        places = tl.load(matrix + M_COLUMN_PLACE) + column
        if VECTOR > 1:
            places = places // 8 + (each * (SIDE // 8))[:, None] + tl.arange(0, SIDE // 8)[None, :]
        else:
            places = places + inside
    peaks = tl.zeros((TALL, GROUPS, SIDE), tl.int32)
    row_aside = row_covers.to(tl.pointer_type(tl.int32))
    if ASIDE:
        row_aside = tl.load(matrix + M_ROW_ASIDE).to(tl.pointer_type(tl.int32)) + row_entry

    for below in range(0, height, TALL):
        if not (TABLE or INTERPRETED):
            fetch(g_start, below + TALL, height, g_line, column, stop, GRAD, TALL, GROUPS * SIDE)
            fetch(w_start, below + TALL, height, line, column, stop, WEIGHT, TALL, GROUPS * SIDE)
            if MOMENT is not None:
                fetch(m_start, below + TALL, height, m_line, column, stop, MOMENT, TALL, GROUPS * SIDE)
        lines = below + tl.arange(0, TALL)
        there = (lines < height)[:, None, None] & is_column[None, :, :]
        g_at = tile_at(g_start, below * g_line, g_offsets, GRAD, VECTOR)
        w_at = tile_at(w_start, below * line, w_offsets, WEIGHT, VECTOR)
        grad, weight = tl.load(g_at, mask=there, other=0.0), tl.load(w_at, mask=there, other=0.0)
        if MOMENT is not None:
            m_at = tile_at(m_start, below * m_line, m_offsets, MOMENT, VECTOR)
            moment = tl.load(m_at, mask=there, other=0)
        at_row = lines[:, None] * row_line + each[None, :]
        is_row = (lines < height)[:, None] & is_block[None, :]
        covers = tl.load(row_covers + at_row, mask=is_row, other=0.0)
        if PRODUCT:
            covers = tl.minimum(covers, HUGE, propagate_nan=tl.PropagateNan.ALL)
            floor = covers[:, :, None] * sides[None, :, :]
        else:
            if AVERAGE:
                covers = covers * old
            floor = tl.minimum(covers[:, :, None], sides[None, :, :], propagate_nan=tl.PropagateNan.ALL)

        # The update, line by line that of update_box; factors that are not asked for are 1, and exact.
        grad = widened(grad, GRAD)
        if UNSCALED:
            grad = grad * tl.load(group + UNSCALE)
        nu = grad * grad
        if AVERAGE:
            nu = nu * new
        nu = nu + floor
        peak = tl.where(there, bits_of(nu), 0)
        peaks = tl.maximum(peaks, peak)
        raised(row_covers + at_row, row_aside + at_row, tl.max(peak, axis=2), is_row, ASIDE)
        update = inverse_root(nu + eps, NORMAL_RANGE) * grad
        if SQUARES > 0:
            squares = grains(update if VECTOR > 1 else tl.where(there, update, 0.0), carrier)
            squares = tl.sum(tl.reshape(squares, (TALL, GROUPS, SIDE // THREAD, THREAD)), axis=3)
            if VECTOR > 1:
                squares = tl.where((lines < height)[:, None, None] & are_columns[None, :, :], squares, 0)
            sums += squares.to(sums.dtype)
            update = update * scale
            update = tl.maximum(update, -limit, propagate_nan=tl.PropagateNan.ALL)
            update = tl.minimum(update, limit, propagate_nan=tl.PropagateNan.ALL)
        else:
            update = update * fresh
        if RANDOM or tl.int8 == MOMENT:
            w_noise, m_noise = noise_at(
                places, row_places + below, number, count, seed_low, seed_high, VECTOR, TALL, GROUPS, SIDE
            )
        if MOMENT is not None:
            mean = widened(moment, MOMENT) * momentum + update
            if tl.int8 == MOMENT or (RANDOM and tl.bfloat16 == MOMENT):
                tl.store(m_at, rounded_randomly(mean, m_noise, MOMENT), mask=there)
            else:
                tl.store(m_at, rounded(mean, MOMENT), mask=there)
            if NESTEROV:  # noqa: SIM108
                update = update + mean * momentum
            else:
                update = mean
        weight = widened(weight, WEIGHT) * decay - update * lr
        if RANDOM and tl.bfloat16 == WEIGHT:
            tl.store(w_at, rounded_randomly(weight, w_noise, WEIGHT), mask=there)
        else:
            tl.store(w_at, rounded(weight, WEIGHT), mask=there)

    of_column = tl.max(peaks, axis=0)
    column_aside = column_covers.to(tl.pointer_type(tl.int32))
    if ASIDE:
        column_aside = tl.load(matrix + M_COLUMN_ASIDE).to(tl.pointer_type(tl.int32)) + column_entry
    raised(column_covers + inside, column_aside + inside, of_column, is_column, ASIDE)
    if BLOCK:
        tile_aside = tile_covers.to(tl.pointer_type(tl.int32))
        if ASIDE:
            tile_aside = tl.load(matrix + M_TILE_ASIDE).to(tl.pointer_type(tl.int32)) + tile_entry
        raised(tile_covers + each, tile_aside + each, tl.max(of_column, axis=1), is_block, ASIDE)
    if SQUARES > 0:
        total = tl.sum(tl.ravel(sums.to(tl.int64))) * tl.load(factor + GRAIN).to(tl.int64)
        tl.atomic_add(tl.load(matrix + M_PARTIAL).to(tl.pointer_type(tl.int64)), total, sem="relaxed")
