"""The Triton backend: the tensors of one GPU in a few launches, without the host waiting for the device.

The tables that the kernel reads are written anew only when they change. What changes in every step, corrections and
scales, is computed on the device. So a step whose gradients stay where they are launches kernels and nothing else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sm3_dist.kernels import fused
from sm3_dist.kernels.fused import Operands
from sm3_dist.kernels.triton import kernel
from sm3_dist.kernels.triton.availability import interpreting
from sm3_dist.kernels.triton.tiling import cut, padded
from sm3_dist.layout.describe import local_tensor
from sm3_dist.maths.rms import CUT_OFF, scale
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import Entry
from sm3_dist.step.param_groups import correction, first_rms


def refusal(entry: Entry) -> str | None:
    """Why this tensor is not for the Triton backend, where that is available; ``None`` if it is."""
    if (reason := fused.refusal(entry, "cpu" if interpreting() else "cuda")) is not None:
        return reason
    if entry.rounds:
        return "the Triton kernel has no stochastic rounding."
    if entry.shard.cover_block is not None and len(entry.shard.shape) > 2:
        return "the Triton kernel has block covers for matrices alone."
    return fused.strided_refusal(entry)


class TritonKernel:
    """Tensors that :func:`refusal` has no objection to; see :class:`sm3_dist.kernels.Kernel`.

    Args:
        entries: the tensors, all on one device.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._device = local_tensor(entries[0].param).device
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
            shard, momentum, weight = entry.shard, entry.momentum_buffer, local_tensor(entry.param)
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
                    *padded([each.data_ptr() for each in in_turn], fused.DIMS + 1),
                    *padded(starts, fused.DIMS + 1),
                    *padded([stride for each in strides for stride in padded(each)], fused.DIMS * (fused.DIMS + 1)),
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
                tiling, fields = cut(
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
                boxes[box_index][kernel.BOX_FIRST_TILE] = first
                first += tiles
            numbers, counts = torch.tensor(members, dtype=torch.int64, device="cpu").unbind(1)
            self._launches.append((kind, torch.repeat_interleave(numbers.int(), counts).to(self._device)))
        self._boxes = torch.tensor(boxes, dtype=torch.int64, device=self._device).view(-1, int(kernel.BOX_FIELDS))
        self._tensors = torch.tensor(tensors, dtype=torch.int64, device=self._device)
        self._aside = torch.zeros(aside, dtype=torch.int32, device=self._device)
        self._accumulators, self._new = self._pairs()
        self._addresses: list[int] = []
        self._written: list[list[float]] = []
        self._address_table = torch.zeros(2 * len(self._operands.params), dtype=torch.int64, device=self._device)
        self._settings = torch.zeros(
            (len(self._groups), int(kernel.GROUP_FIELDS)), dtype=torch.float32, device=self._device
        )
        self._where = self._released_addresses()
        units = [(1.0, 1) if e.squares is None else (e.squares.per_one, e.squares.cap) for e in self.entries]
        self._factors = torch.tensor([[1.0, 1.0, *each] for each in units], dtype=torch.float32, device=self._device)
        self._made_of: list[list[float]] = []
        self._make_of = torch.zeros(4, len(self.entries), dtype=torch.float64, device=self._device)

    def _released_addresses(self) -> list[int]:
        """Where the accumulators lie that ``shard_covers`` moves between steps."""
        return [accumulator.data_ptr() for entry in self._released for accumulator in entry.accumulators]

    def _pairs(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """For each tensor the accumulators, and what overwrites them. A vector's was overwritten on the way."""
        accumulators, new, at = [], [], 0
        values = self._aside.view(torch.float32)
        for entry in self.entries:
            order = fused.memory_order(entry, local_tensor(entry.param))
            old = _in_turn(entry, order)
            parts = []
            for each in old:
                parts.append(values.narrow(0, at, each.numel()).view(each.shape))
                at += each.numel()
            keep = len(order) > 1
            accumulators.append(old if keep else [])
            new.append(parts if keep else [])
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
            kernel.step_tiles[(len(tiles),)](
                *(tiles, self._boxes, self._tensors, self._address_table, self._settings, self._factors, self._aside),
                *(kernel.type_of(weight), kernel.type_of(grad), kernel.type_of(moment), *constants),
                **kernel.OPTIONS,
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
            self._address_table.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
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
            self._settings.copy_(torch.tensor(numbers, dtype=torch.float32, device="cpu"))
            self._written = numbers
        for row, s in zip(self._settings, settings, strict=True):  # what is on the device stays there
            if isinstance(s.lr, Tensor):
                row[int(kernel.LR)].copy_(s.lr)
                row[int(kernel.DECAY)].copy_(1 - s.lr * s.weight_decay)
            if isinstance(s.unscale, Tensor):
                row[int(kernel.UNSCALE)].copy_(s.unscale)

    def _write_factors(self) -> None:
        """What depends on the steps that each tensor has taken, made on the device where these numbers are."""
        of_group = {
            id(group): [
                group["beta"] if group["bias_correction"] else 0.0,
                1.0 if group["update_rms"] is None else group["update_rms"],
                first_rms(group) ** 2,
            ]
            for group in self._groups
        }
        if (made_of := list(of_group.values())) != self._made_of:
            units = [1.0 if e.squares is None else e.squares.per_one * e.squares.numel for e in self.entries]
            rows = [[*of_group[id(e.group)], unit] for e, unit in zip(self.entries, units, strict=True)]
            self._make_of.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu").t())
            self._made_of = made_of
        beta, update_rms, first_square, unit = self._make_of
        self._factors[:, int(kernel.CORRECTION)].copy_(correction(beta, torch.stack([e.step for e in self.entries])))
        self._factors[:, int(kernel.SCALE)].copy_(scale(torch.stack(self._averages), unit, update_rms, first_square))


def _in_turn(entry: Entry, order: Sequence[int]) -> list[Tensor]:
    """The accumulators in the order of the dimensions in memory, that of the tiles last."""
    return [entry.accumulators[i] for i in (*order, *range(len(order), len(entry.accumulators)))]
