"""The Triton backend: the tensors of one GPU in a few launches, without the host waiting for the device.

A program takes a tile of rows and columns of one box. Rows count the leading dimensions, columns the trailing ones,
which are contiguous. The maxima of nu over the tile go to a buffer aside by atomic maxima of their bit patterns, which
are ordered like the values and exact in any order; in the end they overwrite the accumulators. Division and square root
round to nearest, and multiplications are not fused with additions, so that the results are those of ``update_box``.

What a program needs to know lies in tables on the device: addresses, strides, hyperparameters. They are written anew
only when they change, so that a step whose gradients stay where they are launches kernels and nothing else.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sm3_dist import adapters
from sm3_dist.kernels import fused
from sm3_dist.kernels.fused import Operands

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported without, and says so
    triton = None

if TYPE_CHECKING:
    from sm3_dist.step_plan import Entry
    from sm3_dist.update import Settings

_DIMS = fused.DIMS
constexpr: Callable[[int], Any] = int if triton is None else tl.constexpr
jit: Callable[[Any], Any] = (lambda function: function) if triton is None else triton.jit

# Fields of the tables. Those of dimensions and of operands (weight, gradient, momentum) stand for the first of several.
BOX_TENSOR, BOX_FIRST_TILE, BOX_ROWS, BOX_COLUMNS, BOX_OFFSET, BOX_SHAPE = map(constexpr, (0, 1, 2, 3, 4, 7))
BOX_START, BOX_WEIGHT_STRIDE = constexpr(7 + _DIMS), constexpr(7 + 2 * _DIMS)
BOX_GRAD_STRIDE, BOX_MOMENT_STRIDE = constexpr(7 + 3 * _DIMS), constexpr(7 + 4 * _DIMS)
BOX_FIELDS = constexpr(7 + 5 * _DIMS)
TENSOR_PARAM, TENSOR_GROUP, TENSOR_MOMENT, TENSOR_ACCUMULATOR = map(constexpr, (0, 1, 2, 3))
TENSOR_ASIDE, TENSOR_FIELDS = constexpr(3 + _DIMS), constexpr(3 + 2 * _DIMS)
LR, DECAY, MOMENTUM, FRESH, BETA, ONE_MINUS_BETA, EPS, UNSCALE, GROUP_FIELDS = map(constexpr, range(9))

TILE = 2048
"""Elements of a tile."""
LONG_ROW = 8192
"""Trailing dimensions are joined to rows of at most this length."""
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
def step_tiles(
    tiles,  # int32, one per program: its box
    boxes,  # int64, BOX_FIELDS per box
    tensors,  # int64, TENSOR_FIELDS per tensor
    addresses,  # int64, of weight and gradient of each parameter; gradient 0: there is none
    settings,  # float32, GROUP_FIELDS per param group
    aside,  # int32, bits of the new accumulators, 0 before
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,  # None: no momentum
    NDIM: tl.constexpr,
    LEAD: tl.constexpr,  # leading dimensions, which count rows
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Step one tile: ``update_box``, and the maxima."""
    box = boxes + tl.load(tiles + tl.program_id(0)).to(tl.int64) * BOX_FIELDS
    tensor = tensors + tl.load(box + BOX_TENSOR) * TENSOR_FIELDS
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
        entries = tl.load(tensor + TENSOR_ACCUMULATOR + i).to(tl.pointer_type(tl.float32)) + tl.load(
            box + BOX_START + i
        )
        cover = tl.load(entries + index, mask=is_row, other=0.0)
        floor = tl.minimum(floor, cover[:, None], propagate_nan=tl.PropagateNan.ALL)
    rest = columns
    for i in tl.static_range(NDIM - 1, LEAD - 1, -1):
        length = tl.load(box + BOX_SHAPE + i)
        index = rest % length
        rest = rest // length
        entries = tl.load(tensor + TENSOR_ACCUMULATOR + i).to(tl.pointer_type(tl.float32)) + tl.load(
            box + BOX_START + i
        )
        cover = tl.load(entries + index, mask=is_column, other=0.0)
        floor = tl.minimum(floor, cover[None, :], propagate_nan=tl.PropagateNan.ALL)

    # The update, line by line that of update_box; factors that are not asked for are 1, and exact.
    g_at = grad_address.to(tl.pointer_type(GRAD)) + tl.load(box + BOX_OFFSET + 1) + g_rows[:, None] + columns[None, :]
    grad = widened(tl.load(g_at, mask=there, other=0.0), GRAD) * tl.load(group + UNSCALE)
    nu = grad * grad * tl.load(group + ONE_MINUS_BETA) + floor * tl.load(group + BETA)
    root = tl.sqrt_rn(nu + tl.load(group + EPS))
    update = tl.div_rn(tl.full((TALL, WIDE), 1.0, tl.float32), root) * grad * tl.load(group + FRESH)
    if MOMENT is not None:
        m_at = tl.load(tensor + TENSOR_MOMENT).to(tl.pointer_type(MOMENT)) + tl.load(box + BOX_OFFSET + 2)
        m_at = m_at + m_rows[:, None] + columns[None, :]
        update = widened(tl.load(m_at, mask=there, other=0.0), MOMENT) * tl.load(group + MOMENTUM) + update
        tl.store(m_at, rounded(update, MOMENT), mask=there)
    w_at = tl.load(address).to(tl.pointer_type(WEIGHT)) + tl.load(box + BOX_OFFSET) + w_rows[:, None] + columns[None, :]
    weight = widened(tl.load(w_at, mask=there, other=0.0), WEIGHT) * tl.load(group + DECAY)
    tl.store(w_at, rounded(weight - update * tl.load(group + LR), WEIGHT), mask=there)

    # The maxima, without the sign that a NaN may have. A vector's accumulator has an entry for each element.
    peak = tl.where(there, nu.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    if NDIM == 1:
        entries = tl.load(tensor + TENSOR_ACCUMULATOR).to(tl.pointer_type(tl.int32)) + tl.load(box + BOX_START)
        tl.store(entries + columns, tl.max(peak, axis=0), mask=is_column)
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
        return "it has no stochastic rounding yet."
    options = ("bias_correction", "nesterov", "update_rms", "cover_block")
    if any(entry.group[option] for option in options):
        return "of bias_correction, nesterov, update_rms and cover_block the Triton kernel has none yet."
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
            sizes = [shard.stored[dim].numel for dim in order]
            starts = [aside + sum(sizes[:i]) for i in range(len(sizes))]
            aside += sum(sizes)
            accumulators = _padded([entry.accumulators[dim].data_ptr() for dim in order])
            moment = 0 if momentum is None else momentum.data_ptr()
            tensors.append([param, groups[id(entry.group)], moment, *accumulators, *_padded(starts)])
            operands = fused.views(entry, weight, self._operands.strides[param])
            dtypes = weight.dtype, self._operands.dtypes[param], None if momentum is None else momentum.dtype
            for b, box in enumerate(shard.boxes):
                shape = [box.shape[dim] for dim in order]
                strides = [[views[b].stride(dim) for dim in order] for _, views in operands]
                lead = _leading(shape, strides)
                rows, columns = math.prod(shape[:lead]), math.prod(shape[lead:])
                wide = min(TILE, max(16, 1 << (columns - 1).bit_length())) if lead == 0 else _width(columns)
                tall = TILE // wide if lead else 1
                launches[(*dtypes, len(order), lead, tall, wide)].append(
                    (len(boxes), -(-rows // tall) * -(-columns // wide))
                )
                boxes.append(
                    [len(tensors) - 1, 0, rows, columns]
                    + [int(views[b].storage_offset() - local.storage_offset()) for local, views in operands]
                    + _padded(shape)
                    + _padded([box.start[dim] - shard.extent.start[dim] for dim in order])
                    + [stride for each in strides for stride in _padded(each)]
                )
        self._launches: list[tuple[tuple[Any, ...], Tensor]] = []
        for kind, members in launches.items():
            first = 0
            for box_index, tiles in members:
                boxes[box_index][BOX_FIRST_TILE] = first
                first += tiles
            numbers, counts = torch.tensor(members).unbind(1)
            self._launches.append((kind, torch.repeat_interleave(numbers.int(), counts).to(self._device)))
        fields = int(BOX_FIELDS)
        self._boxes = torch.tensor(boxes, dtype=torch.int64, device=self._device).view(-1, fields)
        self._tensors = torch.tensor(tensors, dtype=torch.int64, device=self._device)
        self._aside = torch.zeros(aside, dtype=torch.int32, device=self._device)
        self._accumulators, self._new = self._pairs(aside)
        self._addresses: list[int] = []
        self._written: list[list[float]] = []
        self._address_table = torch.zeros(2 * len(self._operands.params), dtype=torch.int64, device=self._device)
        self._settings = torch.zeros(len(self._groups), int(GROUP_FIELDS), device=self._device)

    def _pairs(self, size: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """For each tensor the accumulators, and what overwrites them. A vector's was overwritten on the way."""
        accumulators, new, at = [], [], 0
        values = self._aside.view(torch.float32)
        for entry in self.entries:
            order = fused.memory_order(entry, adapters.local(entry.param))
            old = [entry.accumulators[dim] for dim in order]
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
        weights, as_surveyed = operands.weights()
        if not as_surveyed or any(any(entry.shard.shared) for entry in self.entries):
            operands.survey()
            self._write_list()  # shard_covers moves accumulators in every step
        grads, kept, eager = operands.grads()
        self._write_addresses([each for pair in zip(weights, grads, strict=True) for each in pair])
        self._write_settings([settings[id(group)] for group in self._groups])
        self._aside.zero_()
        for (weight, grad, moment, ndim, lead, tall, wide), tiles in self._launches:
            step_tiles[(len(tiles),)](
                *(tiles, self._boxes, self._tensors, self._address_table, self._settings, self._aside),
                *(_type(weight), _type(grad), _type(moment), ndim, lead, tall, wide),
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
        for s in settings:
            on_host = [0.0 if isinstance(x, Tensor) else x for x in (s.lr, 1 - s.lr * s.weight_decay)]
            fresh = (1 - s.momentum if s.momentum else 1.0) * (-1 if s.maximize else 1)
            averages = (s.beta, 1 - s.beta) if s.beta > 0 else (1.0, 1.0)
            unscale = 1.0 if s.unscale is None or isinstance(s.unscale, Tensor) else s.unscale
            numbers.append([*on_host, s.momentum, fresh, *averages, s.eps, unscale])
        if numbers != self._written:
            self._settings.copy_(torch.tensor(numbers))
            self._written = numbers
        for row, s in zip(self._settings, settings, strict=True):  # what is on the device stays there
            if isinstance(s.lr, Tensor):
                row[int(LR)].copy_(s.lr)
                row[int(DECAY)].copy_(1 - s.lr * s.weight_decay)
            if isinstance(s.unscale, Tensor):
                row[int(UNSCALE)].copy_(s.unscale)


def _padded(numbers: Sequence[int]) -> list[int]:
    return [*numbers, *[0] * (fused.DIMS - len(numbers))]


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
