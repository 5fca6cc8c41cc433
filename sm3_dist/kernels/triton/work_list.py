"""The work list of the Triton backend: where everything lies in memory, and which launches a step takes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sm3_dist.kernels import fused
from sm3_dist.kernels.fused import Operands
from sm3_dist.kernels.triton import ends, matrix, tiles, values
from sm3_dist.kernels.triton.availability import interpreting
from sm3_dist.kernels.triton.launcher import Launcher
from sm3_dist.kernels.triton.strips import Strips, lines, strips_of
from sm3_dist.kernels.triton.tiling import RANDOM_TILE, TILE, cut, padded
from sm3_dist.layout.cover import split
from sm3_dist.layout.describe import local_tensor
from sm3_dist.step.entry import Entry

MOST_ROWS = 128
"""Squares of so many rows are added up in 32 bits. A thread takes four elements of each, or eight of every second one,
of at most 2^22 grains."""
WARPS_OF_TILES = 4
INTERPRETED_TALL = 8
"""Triton's interpreter takes as long for many rows as for one."""


@dataclass(frozen=True)
class Flags:
    """What of a param group the machine code depends on."""

    nesterov: bool
    product: bool
    average: bool
    normal_range: bool
    unscaled: bool


@dataclass(frozen=True)
class Launch:
    """Programs that are launched together.

    Attributes:
        kernel: what they run.
        group: number of their param group.
        work: what each works on, int32.
        table: what the kernel looks its work up in, int64.
        more: further tables of that kind.
        programs: how many.
        constants: of the kernel, in the order of its arguments.
        options: for the compiler.
        launcher: launches them.
    """

    kernel: Any
    group: int
    work: Tensor
    table: Tensor
    more: tuple[Tensor, ...]
    programs: int
    constants: tuple[Any, ...]
    options: dict[str, Any]
    launcher: Launcher = field(default_factory=Launcher)

    def __call__(self, *arguments: Any) -> None:
        """Launch them; the tables go before the arguments."""
        given = (self.work, self.table, *self.more, *arguments)
        self.launcher(self.kernel, self.programs, given, self.constants, self.options)


class WorkList:
    """Tables and launches for some tensors, as they lie in memory now.

    Args:
        entries: the tensors, those of a parameter one after another.
        operands: their weights and gradients.
        groups: the param groups, and what of each the machine code depends on.
        unaligned: numbers of the parameters whose gradients do not begin at multiples of 16 bytes.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        operands: Operands,
        groups: Sequence[tuple[dict[str, Any], Flags]],
        unaligned: frozenset[int],
    ) -> None:
        self._operands, self._unaligned = operands, unaligned
        self._device = local_tensor(entries[0].param).device
        self._groups = groups
        self._number_of = {id(group): i for i, (group, _) in enumerate(groups)}
        self._matrices: list[list[int]] = []
        self._boxes: list[list[int]] = []
        self._tensors: list[list[int]] = []
        self._strips: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._tiles: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        self._column_tables: list[Tensor] = []
        needs = [self._strips_of(entry) for entry in entries]
        sizes = [self._aside_of(entry, strips) for entry, strips in zip(entries, needs, strict=True)]
        self.aside = torch.zeros(sum(map(sum, sizes)), dtype=torch.int32, device=self._device)
        self._pieces: list[list[int]] = []
        at = self.aside.data_ptr()
        for number, (entry, strips, lengths) in enumerate(zip(entries, needs, sizes, strict=True)):
            starts = []
            for accumulator, length in zip(entry.accumulators, lengths, strict=True):
                starts.append(at)
                self._bring(entry, accumulator, at, length)
                at += 4 * length
            if strips is None:
                self._add_boxes(number, entry, starts)
            else:
                self._add_matrices(number, entry, strips, starts)
        self.launches = [*self._launches_of_strips(), *self._launches_of_tiles()]
        self.pieces = self._table(self._pieces, int(ends.PIECE_FIELDS))
        fields = int(matrix.FACTOR_FIELDS)
        self.factors = torch.zeros(len(entries), fields, dtype=torch.float32, device=self._device)
        self.counts = torch.zeros(len(entries), dtype=torch.int32, device=self._device)

    def _table(self, rows: Sequence[Sequence[int]], fields: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device).view(-1, fields)

    def _strips_of(self, entry: Entry) -> list[Strips] | None:
        weight = local_tensor(entry.param)
        param = self._operands.index[id(entry.param)]
        types = [weight.dtype, self._operands.dtypes[param]]
        types += [] if entry.momentum_buffer is None else [entry.momentum_buffer.dtype]
        operands = [views for _, views in fused.views(entry, weight, self._operands.strides[param])]
        return strips_of(entry.shard, operands, 4 if all(t.itemsize == 4 for t in types) else 8)

    @staticmethod
    def _aside_of(entry: Entry, strips: Sequence[Strips] | None) -> list[int]:
        """How many entries of each accumulator are gathered aside."""
        aside = len(entry.shard.shape) > 1 if strips is None else any(each.aside for each in strips)
        return [each.numel() if aside and entry.shard.numel else 0 for each in entry.accumulators]

    def _bring(self, entry: Entry, accumulator: Tensor, aside: int, length: int) -> None:
        param, piece = self._operands.index[id(entry.param)], int(ends.PIECE)
        for i in range(0, length, piece):
            to = accumulator.data_ptr() + 4 * i
            self._pieces.append([param, aside + 4 * i, to, min(piece, length - i)])

    def _common(self, entry: Entry, bits: int) -> tuple[Any, ...]:
        """The first constants of either kernel, which adds up squares in so many bits."""
        param = self._operands.index[id(entry.param)]
        momentum, flags = entry.momentum_buffer, self._groups[self._number_of[id(entry.group)]][1]
        return (
            *(local_tensor(entry.param).dtype, self._operands.dtypes[param]),
            *(None if momentum is None else momentum.dtype, flags.unscaled, flags.average),
            *(0 if entry.squares is None else bits, flags.nesterov, flags.normal_range),
            bool(entry.group["stochastic_rounding"]),
        )

    def _add_matrices(self, number: int, entry: Entry, strips: Sequence[Strips], aside: Sequence[int]) -> None:
        shard, momentum, weight = entry.shard, entry.momentum_buffer, local_tensor(entry.param)
        param, group = self._operands.index[id(entry.param)], self._number_of[id(entry.group)]
        operands = fused.views(entry, weight, self._operands.strides[param])
        sizes = [weight.dtype.itemsize, self._operands.dtypes[param].itemsize]
        sizes += [0 if momentum is None else momentum.dtype.itemsize]
        product = self._groups[group][1].product and shard.cover_block is not None
        row_line, column_line = lines(shard)
        any_aside = any(each.aside for each in strips)
        for each in strips:
            m = each.matrix
            origins = [
                int(views[m.box].storage_offset() - local.storage_offset()) + offset
                for (local, views), offset in zip(operands, m.offsets, strict=True)
            ]
            # (A gradient is taken to begin at a multiple of 16 bytes, until one does not.)
            bases = [weight.data_ptr(), 0, 0 if momentum is None else momentum.data_ptr()]
            first_column = entry.accumulators[1].data_ptr() + 4 * m.columns.first
            aligned = param not in self._unaligned and not (first_column % 16 or column_line % 4)
            for base, origin, size in zip(bases, origins, sizes, strict=True):
                aligned &= (base + origin * size) % (8 if size == 1 else 16) == 0
            aligned &= not (entry.rounds and m.columns.place % 8)
            vector = each.vector if aligned else 1
            table = 0
            if m.table is not None:
                self._column_tables.append(m.table.to(self._device, torch.int32))
                table = self._column_tables[-1].data_ptr()
            thread = 4 if sizes[0] == 4 else 8
            tall = max(1, 32 * thread // (each.groups * each.side)) * (INTERPRETED_TALL if interpreting() else 1)
            first_row = 4 * m.rows.first * row_line
            fields = [
                *(number, param, group, 0 if momentum is None else momentum.data_ptr()),
                *(0 if entry.squares is None else entry.squares.partial.data_ptr(), entry.number),
                *(m.columns.count if m.table is None else m.table.shape[1], each.length),
                *(*origins, *m.strides, m.rows.place, m.columns.place),
                *(entry.accumulators[0].data_ptr() + first_row, first_column, entry.accumulators[-1].data_ptr()),
                *(row_line, column_line, aside[0] + first_row, aside[1] + 4 * m.columns.first, aside[-1], table),
            ]
            constants = (
                *self._common(entry, 32 if each.fields[:, int(matrix.STRIP_ROWS) - 1].max() <= MOST_ROWS else 64),
                *(product, each.groups, each.side, tall, vector),
                *(each.blocked, any_aside, m.table is not None),
            )
            first = torch.full((len(each.fields), 1), len(self._matrices), dtype=torch.int32, device="cpu")
            self._strips[(group, *constants)].append(torch.cat([first, each.fields], 1))
            self._matrices.append(fields)

    def _launches_of_strips(self) -> list[Launch]:
        table = self._table(self._matrices, int(matrix.MATRIX_FIELDS))
        made = []
        for (group, *found), members in self._strips.items():
            weight, constants = found[0], _constants(found)
            strips = torch.cat(members).to(self._device)
            names = [name for name in matrix.step_strip.arg_names if name.isupper()]
            by_name = dict(zip(names, constants, strict=True))
            options = options_of(4 if weight.itemsize == 4 else 8, by_name)
            made.append(Launch(matrix.step_strip, group, strips, table, (), len(strips), constants, options))
        return made

    def _add_boxes(self, number: int, entry: Entry, aside: Sequence[int]) -> None:
        shard, momentum, weight = entry.shard, entry.momentum_buffer, local_tensor(entry.param)
        order, param = fused.memory_order(entry, weight), self._operands.index[id(entry.param)]
        group = self._number_of[id(entry.group)]
        self._tensors.append(
            [
                *(param, group, 0 if momentum is None else momentum.data_ptr()),
                *(0 if entry.squares is None else entry.squares.partial.data_ptr(), entry.number),
                *padded([entry.accumulators[dim].data_ptr() for dim in order]),
                *padded([aside[dim] for dim in order]),
            ]
        )
        s, shape = split(shard.shape), shard.shape
        row_steps = [math.prod(shape[d + 1 : s]) if d < s else 0 for d in range(len(shape))]
        column_steps = [math.prod(shape[d + 1 :]) if d >= s else 0 for d in range(len(shape))]
        operands = fused.views(entry, weight, self._operands.strides[param])
        common = self._common(entry, 64)
        for b, box in enumerate(shard.boxes):
            strides = [[views[b].stride(dim) for dim in order] for _, views in operands]
            tiling = cut([box.shape[dim] for dim in order], strides, RANDOM_TILE if entry.rounds else TILE)
            places = [sum(a * n for a, n in zip(box.start, steps, strict=True)) for steps in (row_steps, column_steps)]
            fields = [
                *(tiling.rows, tiling.columns),
                *(int(views[b].storage_offset() - local.storage_offset()) for local, views in operands),
                *(*places, *padded([box.shape[dim] for dim in order])),
                *padded([box.start[dim] - shard.extent.start[dim] for dim in order]),
                *padded([row_steps[dim] for dim in order]),
                *padded([column_steps[dim] for dim in order]),
                *(stride for each in strides for stride in padded(each)),
            ]
            constants = (*common, len(order), tiling.lead, tiling.tall, tiling.wide)
            self._tiles[(group, *constants)].append((len(self._boxes), tiling.tiles))
            self._boxes.append([len(self._tensors) - 1, number, *fields])

    def _launches_of_tiles(self) -> list[Launch]:
        made = []
        for members in self._tiles.values():
            first = 0
            for box, count in members:
                self._boxes[box].append(first)
                first += count
        boxes = self._table(self._boxes, int(tiles.BOX_FIELDS))
        tensors = self._table(self._tensors, int(tiles.TENSOR_FIELDS))
        for (group, *constants), members in self._tiles.items():
            numbers, counts = torch.tensor(members, dtype=torch.int64, device="cpu").unbind(1)
            work = torch.repeat_interleave(numbers.int(), counts).to(self._device)
            options = {"num_warps": WARPS_OF_TILES, "enable_fp_fusion": False}
            made.append(
                Launch(tiles.step_tiles, group, work, boxes, (tensors,), len(work), _constants(constants), options)
            )
        return made


def options_of(thread: int, constants: dict[str, Any]) -> dict[str, Any]:
    """Options for the compiler of the kernel of matrices, a warp of which is a program.

    64 registers leave room for 32 warps, the most programs that a processor takes, and half of the warps that it could
    hold. Recipes in 16 bits get a few more: with 64 they would go to memory and back within the loop. Those that still
    do before and after it cost less than the warps would for which more registers leave no room. What moves one element
    at a time gets as many as it asks for: an address for each element is more than would go to memory at little cost.

    Args:
        thread: elements of the weight that a thread loads at a time.
        constants: of the kernel, by name.
    """
    options = {"num_warps": 1, "enable_fp_fusion": False}
    if constants["VECTOR"] == 1:
        return options
    registers = 64
    if constants["RANDOM"] or constants["MOMENT"] == values.type_of(torch.int8):
        registers = 96
    elif thread == 8 and constants["SQUARES"] > 0:
        registers = 80
    return options | {"maxnreg": registers}


def _constants(constants: Sequence[Any]) -> tuple[Any, ...]:
    weight, grad, moment, *others = constants
    return (*map(values.type_of, (weight, grad, moment)), *others)
