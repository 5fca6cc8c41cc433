"""The Triton backend: the tensors of one GPU in a few launches, without the host waiting for the device.

A program takes a tile of rows and columns of one box. Rows count the leading dimensions, columns the trailing ones,
which are contiguous. The maxima of nu over the tile go to a buffer aside by atomic maxima of their bit patterns, which
are ordered like the values and exact in any order; in the end they overwrite the accumulators. Division and square root
round to nearest, and multiplications are not fused with additions, so that the results are those of ``update_box``.

With block covers an entry speaks for indices side by side. Tiles are therefore laid so that groups of rows and columns
lie within a block, and only the maximum of each group goes to the buffer: one atomic operation for many elements.

What a program needs to know lies in tables on the device: addresses, strides, hyperparameters. They are written anew
only when they change. What changes in every step, corrections and scales, is computed on the device. So a step whose
gradients stay where they are launches kernels and nothing else.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sm3_dist import adapters
from sm3_dist.kernels import fused
from sm3_dist.kernels.fused import Operands
from sm3_dist.param_groups import correction, first_rms_of
from sm3_dist.rms import CUT_OFF, scale

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported without, and says so
    triton = None

if TYPE_CHECKING:
    from sm3_dist.step_plan import Entry
    from sm3_dist.update import Settings

_DIMS = fused.DIMS
constexpr: Callable[[Any], Any] = int if triton is None else tl.constexpr
jit: Callable[[Any], Any] = (lambda function: function) if triton is None else triton.jit

# Fields of the tables. Those of dimensions, accumulators (one per dimension, and that of tiles) and operands (weight,
# gradient, momentum) stand for the first of several.
BOX_TENSOR, BOX_FIRST_TILE, BOX_ROWS, BOX_COLUMNS, BOX_OFFSET = map(constexpr, (0, 1, 2, 3, 4))
BOX_FIRST_COLUMN, BOX_FIRST_INDEX, BOX_STOP_INDEX = map(constexpr, (7, 8, 9))
BOX_SHAPE, BOX_START, BOX_IN_BLOCKS, BOX_WEIGHT_STRIDE, BOX_GRAD_STRIDE, BOX_MOMENT_STRIDE, BOX_FIELDS = (
    constexpr(10 + i * _DIMS) for i in range(7)
)
DIMENSIONS = constexpr(_DIMS)
TENSOR_PARAM, TENSOR_GROUP, TENSOR_MOMENT, TENSOR_PARTIAL, TENSOR_ACCUMULATOR = map(constexpr, (0, 1, 2, 3, 4))
TENSOR_ASIDE, TENSOR_GRID = constexpr(4 + _DIMS + 1), constexpr(4 + 2 * (_DIMS + 1))
TENSOR_FIELDS = constexpr(4 + (2 + _DIMS) * (_DIMS + 1))
LR, DECAY, MOMENTUM, FRESH, BETA, ONE_MINUS_BETA, EPS, UNSCALE, LIMIT, GROUP_FIELDS = map(constexpr, range(10))
CORRECTION, SCALE, PER_ONE, CAP, FACTOR_FIELDS = map(constexpr, range(5))

TILE = 2048
"""Elements of a tile. Of tensors of three dimensions and more it has fewer under block covers, or registers run out."""
LONG_ROW = 8192
"""Trailing dimensions are joined to rows of at most this length."""
TINY = constexpr(torch.finfo(torch.float32).tiny)
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
    """The squares of updates as integers, as :meth:`sm3_dist.rms.SquareSum.add` has them; of NaN it is the cap."""
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
        of_tile = tl.where(of_tile < TINY, TINY, of_tile)
        floor = covering(box, tensor, rows, columns, there, PRODUCT & 15, NDIM, LEAD, BLOCK)
        for i in tl.static_range(1, NDIM):
            cover = covering(box, tensor, rows, columns, there, (PRODUCT >> 4 * i) & 15, NDIM, LEAD, BLOCK)
            floor = floor * tl.div_rn(cover, of_tile)

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


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: the environment says ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """Why the Triton kernel cannot be used; ``None`` if it can."""
    if triton is None:
        return "triton is not installed. Install it: pip install 'sm3_dist[triton]'."
    if not interpreting() and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    return None


def refusal(entry: Entry) -> str | None:
    """Why the Triton backend cannot step this tensor; ``None`` if it can."""
    if (reason := unavailable() or fused.refusal(entry, "cpu" if interpreting() else "cuda")) is not None:
        return reason
    if entry.rounds:
        return "the Triton kernel has no stochastic rounding."
    return None


class TritonWork:
    """Tensors that :func:`refusal` has no objection to; see :class:`sm3_dist.kernels.Work`.

    Args:
        entries: the tensors, all on one device.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._device = adapters.local(entries[0].param).device
        self._groups = list({id(entry.group): entry.group for entry in entries}.values())
        self._operands = Operands(entries, lambda param, dtype: self._write_list())
        self._steps = [entries[0].step for entries in self._operands.entries_of]
        self._flags = [(bool(group["nesterov"]), bool(group["cover_product"])) for group in self._groups]
        # What corrections and scales are made of, where somebody asks for them.
        self._shaped = any(e.squares is not None or e.group["bias_correction"] for e in entries)
        nothing = torch.zeros((), dtype=torch.int64, device=self._device)
        self._averages = [nothing if e.squares is None else e.squares.average for e in entries]
        self._released = [e for e in entries if any(e.shard.shared)]
        self._write_list()

    def _write_list(self) -> None:
        """Write down where everything lies in memory, and which launches it takes."""
        boxes: list[list[int]] = []
        tensors: list[list[int]] = []
        launches: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)  # kind: boxes with their tiles
        groups = {id(group): i for i, group in enumerate(self._groups)}
        aside = 0
        for entry in self.entries:
            shard, momentum, weight = entry.shard, entry.momentum_buffer, adapters.local(entry.param)
            order, param = fused.memory_order(entry, weight), self._operands.index[id(entry.param)]
            group, squares = groups[id(entry.group)], entry.squares
            block = (shard.cover_block or 0) if len(order) > 1 else 0
            in_turn = _in_turn(entry, order)
            sizes = [each.numel() for each in in_turn]
            starts = [aside + sum(sizes[:i]) for i in range(len(sizes))]
            aside += sum(sizes)
            strides = [[each.stride(dim) for dim in order] for each in in_turn]
            tensors.append(
                [
                    *(param, group, 0 if momentum is None else momentum.data_ptr()),
                    0 if squares is None else squares.partial.data_ptr(),
                    *_padded([each.data_ptr() for each in in_turn], fused.DIMS + 1),
                    *_padded(starts, fused.DIMS + 1),
                    *_padded([stride for each in strides for stride in _padded(each)], fused.DIMS * (fused.DIMS + 1)),
                ]
            )
            operands = fused.views(entry, weight, self._operands.strides[param])
            dtypes = weight.dtype, self._operands.dtypes[param], None if momentum is None else momentum.dtype
            nesterov, product = self._flags[group]
            options = (
                *(bool(entry.group["bias_correction"]), squares is not None, nesterov, block),
                sum(order.index(dim) << 4 * dim for dim in range(len(order))) if product and block else -1,
            )
            for b, box in enumerate(shard.boxes):
                tiling, fields = _tiling(
                    [box.start[dim] for dim in order],
                    [box.shape[dim] for dim in order],
                    [shard.extent.start[dim] for dim in order],
                    [[views[b].stride(dim) for dim in order] for _, views in operands],
                    [int(views[b].storage_offset() - local.storage_offset()) for local, views in operands],
                    block,
                )
                kind = (*dtypes, len(order), tiling.lead, tiling.tall, tiling.wide, *options, *tiling.side_by_side)
                launches[kind].append((len(boxes), tiling.tiles))
                boxes.append([len(tensors) - 1, 0, *fields])
        self._launches: list[tuple[tuple[Any, ...], Tensor]] = []
        for kind, members in launches.items():
            first = 0
            for box_index, tiles in members:
                boxes[box_index][BOX_FIRST_TILE] = first
                first += tiles
            numbers, counts = torch.tensor(members).unbind(1)
            self._launches.append((kind, torch.repeat_interleave(numbers.int(), counts).to(self._device)))
        self._boxes = torch.tensor(boxes, dtype=torch.int64, device=self._device).view(-1, int(BOX_FIELDS))
        self._tensors = torch.tensor(tensors, dtype=torch.int64, device=self._device)
        self._aside = torch.zeros(aside, dtype=torch.int32, device=self._device)
        self._accumulators, self._new = self._pairs(aside)
        self._addresses: list[int] = []
        self._written: list[list[float]] = []
        self._address_table = torch.zeros(2 * len(self._operands.params), dtype=torch.int64, device=self._device)
        self._settings = torch.zeros(len(self._groups), int(GROUP_FIELDS), device=self._device)
        self._where = self._released_addresses()
        units = [(1.0, 1) if e.squares is None else (e.squares.per_one, e.squares.cap) for e in self.entries]
        self._factors = torch.tensor([[1.0, 1.0, *each] for each in units], device=self._device)
        self._made_of: list[list[float]] = []
        self._make_of = torch.zeros(4, len(self.entries), dtype=torch.float64, device=self._device)

    def _released_addresses(self) -> list[int]:
        """Where the accumulators lie that ``shard_covers`` moves between steps."""
        return [accumulator.data_ptr() for entry in self._released for accumulator in entry.accumulators]

    def _pairs(self, size: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """For each tensor the accumulators, and what overwrites them. A vector's was overwritten on the way."""
        accumulators, new, at = [], [], 0
        values = self._aside.view(torch.float32)
        for entry in self.entries:
            order = fused.memory_order(entry, adapters.local(entry.param))
            old = _in_turn(entry, order)
            parts = []
            for each in old:
                parts.append(values.narrow(0, at, each.numel()).view(each.shape))
                at += each.numel()
            keep = len(order) > 1
            accumulators.append(old if keep else [])
            new.append(parts if keep else [])
        assert at == size
        return accumulators, new

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Take one step of every tensor that has a gradient, and count it."""
        operands = self._operands
        flags = [(s.nesterov, s.cover_product) for s in (settings[id(group)] for group in self._groups)]
        weights, as_surveyed = operands.weights()
        if not as_surveyed:
            operands.survey()
        if not as_surveyed or flags != self._flags or self._released_addresses() != self._where:
            self._flags = flags
            self._write_list()
        grads, kept, eager = operands.grads()
        self._write_addresses([each for pair in zip(weights, grads, strict=True) for each in pair])
        self._write_settings([settings[id(group)] for group in self._groups])
        if self._shaped:
            self._write_factors()
        self._aside.zero_()
        for (weight, grad, moment, *constants), tiles in self._launches:
            step_tiles[(len(tiles),)](
                *(tiles, self._boxes, self._tensors, self._address_table, self._settings, self._factors, self._aside),
                *(_type(weight), _type(grad), _type(moment), *constants),
                **OPTIONS,
            )
        there = [bool(grads[operands.index[id(e.param)]] and e.shard.boxes) for e in self.entries]
        old = [each for these, yes in zip(self._accumulators, there, strict=True) if yes for each in these]
        if old:
            new = [each for these, yes in zip(self._new, there, strict=True) if yes for each in these]
            torch._foreach_copy_(old, new)
        stepped = [step for step, grad in zip(self._steps, grads, strict=True) if grad]
        if stepped:
            torch._foreach_add_(stepped, 1)
        del kept
        for i in eager:
            for entry in operands.entries_of[i]:
                entry.update(settings[id(entry.group)])
            operands.entries_of[i][0].step.add_(1)

    def _write_addresses(self, addresses: list[int]) -> None:
        if addresses != self._addresses:
            self._address_table.copy_(torch.tensor(addresses, dtype=torch.int64))
            self._addresses = addresses

    def _write_settings(self, settings: Sequence[Settings]) -> None:
        numbers = []
        for s, group in zip(settings, self._groups, strict=True):
            on_host = [0.0 if isinstance(x, Tensor) else x for x in (s.lr, 1 - s.lr * s.weight_decay)]
            fresh = (1 - s.momentum if s.momentum else 1.0) * (-1 if s.maximize else 1)
            averages = (s.beta, 1 - s.beta) if s.beta > 0 else (1.0, 1.0)
            unscale = 1.0 if s.unscale is None or isinstance(s.unscale, Tensor) else s.unscale
            limit = math.inf if group["update_rms"] is None else CUT_OFF * group["update_rms"]
            numbers.append([*on_host, s.momentum, fresh, *averages, s.eps, unscale, limit])
        if numbers != self._written:
            self._settings.copy_(torch.tensor(numbers))
            self._written = numbers
        for row, s in zip(self._settings, settings, strict=True):  # what is on the device stays there
            if isinstance(s.lr, Tensor):
                row[int(LR)].copy_(s.lr)
                row[int(DECAY)].copy_(1 - s.lr * s.weight_decay)
            if isinstance(s.unscale, Tensor):
                row[int(UNSCALE)].copy_(s.unscale)

    def _write_factors(self) -> None:
        """What depends on the steps that each tensor has taken, made on the device where these numbers are."""
        of_group = {
            id(group): [
                group["beta"] if group["bias_correction"] else 0.0,
                1.0 if group["update_rms"] is None else group["update_rms"],
                first_rms_of(group) ** 2,
            ]
            for group in self._groups
        }
        if (made_of := list(of_group.values())) != self._made_of:
            units = [1.0 if e.squares is None else e.squares.per_one * e.squares.numel for e in self.entries]
            rows = [[*of_group[id(e.group)], unit] for e, unit in zip(self.entries, units, strict=True)]
            self._make_of.copy_(torch.tensor(rows, dtype=torch.float64).t())
            self._made_of = made_of
        beta, update_rms, first_square, unit = self._make_of
        self._factors[:, int(CORRECTION)].copy_(correction(beta, torch.stack([e.step for e in self.entries])))
        self._factors[:, int(SCALE)].copy_(scale(torch.stack(self._averages), unit, update_rms, first_square))


@dataclass(frozen=True)
class Tiling:
    """How a box is cut into tiles.

    Attributes:
        lead: number of leading dimensions, which count rows; the others count columns.
        tall: rows of a tile.
        wide: columns of a tile.
        tiles: number of tiles.
        side_by_side: rows and columns side by side of which the first stands for all, as far as blocks go.
    """

    lead: int
    tall: int
    wide: int
    tiles: int
    side_by_side: tuple[int, int] = (1, 1)


def _tiling(
    start: Sequence[int],
    shape: Sequence[int],
    extent_start: Sequence[int],
    strides: Sequence[Sequence[int]],
    offsets: Sequence[int],
    block: int,
) -> tuple[Tiling, list[int]]:
    """Cut a box into tiles.

    Args:
        start: where the box begins; dimensions here are in memory order.
        shape: its shape.
        extent_start: where what this rank holds begins.
        strides: of weight, gradient and momentum.
        offsets: where the box begins in their memory.
        block: indices per block of the covers; 0: covers are whole slices.

    Returns:
        The tiling, and the fields of the box from ``BOX_ROWS`` on.
    """
    shape, offsets = list(shape), list(offsets)
    at = [a - b for a, b in zip(start, extent_start, strict=True)]
    if block == 0:
        lead = _leading(shape, strides)
        rows, columns = math.prod(shape[:lead]), math.prod(shape[lead:])
        wide = min(TILE, max(16, 1 << (columns - 1).bit_length())) if lead == 0 else _width(columns)
        tall = TILE // wide if lead else 1
        side_by_side, bounds, in_blocks = (1, 1), [0, 0, 0], [0] * len(shape)
    else:
        # Columns are one dimension. Tiles, and so groups of indices side by side, begin at multiples of the size of a
        # group, which divides the block: so a group lies in one block. The box then begins within its first group.
        lead = len(shape) - 1
        in_blocks = [a - b // block * block for a, b in zip(start, extent_start, strict=True)]
        tile = TILE if lead == 1 else TILE // 4 if lead < 4 else TILE // 16
        wide = min(tile, _width(shape[lead]))
        tall = tile // wide
        even = block & -block
        groups = min(even, tall), min(even, wide)
        if lead > 1:  # filling up the last of several dimensions that count rows must not make many more of them
            few = (g for g in _halved(groups[0]) if 4 * _filled(start, shape, lead - 1, g) <= 5 * shape[lead - 1])
            groups = next(few, 1), groups[1]
        side_by_side = groups
        first = [start[lead - 1] % groups[0], start[lead] % groups[1]]
        bounds = [first[1], first[0], first[0] + shape[lead - 1]]
        for dim, before in zip((lead - 1, lead), first, strict=True):
            at[dim], in_blocks[dim] = at[dim] - before, in_blocks[dim] - before
        # (The stride along columns is 1, whatever PyTorch says of a single one.)
        offsets = [a - first[0] * each[lead - 1] - first[1] for a, each in zip(offsets, strides, strict=True)]
        rows, columns = (
            math.prod(shape[: lead - 1]) * _filled(start, shape, lead - 1, groups[0]),
            first[1] + shape[lead],
        )
        shape = [*shape[: lead - 1], _filled(start, shape, lead - 1, groups[0]), columns]
    fields = [rows, columns, *offsets, *bounds, *_padded(shape), *_padded(at), *_padded(in_blocks)]
    fields += [stride for each in strides for stride in _padded(each)]
    return Tiling(lead, tall, wide, -(-rows // tall) * -(-columns // wide), side_by_side), fields


def _filled(start: Sequence[int], shape: Sequence[int], dim: int, group: int) -> int:
    """Length of a dimension of a box, filled up to whole groups of indices."""
    return -(-(start[dim] % group + shape[dim]) // group) * group


def _halved(power: int) -> Iterator[int]:
    while power:
        yield power
        power //= 2


def _in_turn(entry: Entry, order: Sequence[int]) -> list[Tensor]:
    """The accumulators in the order of the dimensions in memory, that of the tiles last."""
    return [entry.accumulators[i] for i in (*order, *range(len(order), len(entry.accumulators)))]


def _padded(numbers: Sequence[int], length: int = fused.DIMS) -> list[int]:
    return [*numbers, *[0] * (length - len(numbers))]


def _leading(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """Number of leading dimensions that count rows; the others form the row, as many as make it long enough."""

    def contiguous(d: int) -> bool:
        expected = [math.prod(shape[i + 1 :]) for i in range(d, len(shape))]
        return all(n == 1 or s == e for each in strides for n, s, e in zip(shape[d:], each[d:], expected, strict=True))

    d = len(shape) - 1
    while d > 1 and math.prod(shape[d - 1 :]) <= LONG_ROW and contiguous(d - 1):
        d -= 1
    return d


def _width(columns: int) -> int:
    """Columns of a tile: few for short rows, else so many that a warp reads whole cache lines."""
    return min(256, max(8, 1 << (columns - 1).bit_length()))


def _type(dtype: torch.dtype | None) -> Any:
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return None if dtype is None else names[dtype]
