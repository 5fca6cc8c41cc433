"""The Triton backend: the tensors of one GPU in a few launches, without the host waiting for the device.

The tables that the kernels read are written anew only when they change. What changes in every step, weights in
``nu`` and scales, is computed on the device. So a step whose gradients stay where they are launches kernels and nothing
else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sm3_dist.kernels import fused
from sm3_dist.kernels.fused import EMPTY, Operands
from sm3_dist.kernels.triton import ends, matrix
from sm3_dist.kernels.triton.availability import interpreting
from sm3_dist.kernels.triton.launcher import Launcher
from sm3_dist.kernels.triton.strips import too_far
from sm3_dist.kernels.triton.tables import Table
from sm3_dist.kernels.triton.work_list import Flags, WorkList
from sm3_dist.layout.describe import local_tensor
from sm3_dist.maths.rms import CUT_OFF
from sm3_dist.maths.update import Settings
from sm3_dist.step import capture
from sm3_dist.step.entry import Entry
from sm3_dist.step.param_groups import first_rms

LEAST_EPS = 2.0**-100
"""From here on root and reciprocal take their short paths, see :func:`~sm3_dist.kernels.triton.values.inverse_root`."""
MOMENT_TYPES = (*fused.MOMENT_TYPES, torch.int8)


def refusal(entry: Entry) -> str | None:
    """Why this tensor is not for the Triton backend, where that is available; ``None`` if it is."""
    if (reason := fused.refusal(entry, "cpu" if interpreting() else "cuda", MOMENT_TYPES)) is not None:
        return reason
    if entry.shard.cover_block is None or len(entry.shard.shape) < 2:
        return fused.strided_refusal(entry)
    weight = local_tensor(entry.param)
    operands = fused.views(entry, weight, fused.grad_strides(weight))
    if too_far(entry.shard, [views for _, views in operands]):
        return "its rows are so long that 32 bits do not tell where the elements of a block lie."
    return None


class TritonKernel:
    """Tensors that :func:`refusal` has no objection to; see :class:`sm3_dist.kernels.Kernel`.

    Args:
        entries: the tensors, all on one device, those of a parameter one after another.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._device = local_tensor(entries[0].param).device
        self._groups = list({id(entry.group): entry.group for entry in entries}.values())
        self._stale = True
        self._operands = Operands(entries)
        self._unaligned: frozenset[int] = frozenset()
        self._flags: list[Flags] = []
        self._seen: list[int] = []
        self._weights: list[int] = []
        self._offsets: list[int] = []
        self._where: list[int] = []
        self._released = [e for e in entries if any(e.shard.shared)]
        self._addresses = Table(2 * len(self._operands.params), torch.int64, self._device)
        self._settings = Table(len(self._groups) * int(matrix.GROUP_FIELDS), torch.float32, self._device)
        self._made_of = Table(len(entries) * int(ends.MADE_OF_FIELDS), torch.float64, self._device)
        self._clean = True  # whether what lies aside is 0
        self._of_graphs: list[WorkList] = []  # refer to their tables by address
        self._of_group: dict[int, tuple[Any, ...]] = {}
        self._numbers: list[float] = []  # made of the options of each group
        self._begin, self._end = Launcher(), Launcher()
        self._write_counters()

    def _write_counters(self) -> None:
        """Write down where steps are counted, and what averages of squares there are."""
        rows, first = [], 0
        for entries in self._operands.entries_of:
            rows.append([entries[0].step.data_ptr(), first, len(entries)])
            first += len(entries)
        averages = [0 if e.squares is None else e.squares.average.data_ptr() for e in self.entries]
        self._params = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self._param_count = torch.tensor([len(rows)], dtype=torch.int32, device=self._device)
        self._averages = torch.tensor(averages, dtype=torch.int64, device=self._device)

    def _released_addresses(self) -> list[int]:
        """Where the accumulators lie that ``shard_covers`` moves between steps."""
        return [accumulator.data_ptr() for entry in self._released for accumulator in entry.accumulators]

    def update(self, settings: Mapping[int, Settings]) -> Sequence[Tensor]:
        """Take one step of every tensor that has a gradient, and count it; see :class:`sm3_dist.kernels.Kernel`."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._update(settings)
        return self._operands.present

    def _update(self, settings: Mapping[int, Settings]) -> None:
        operands = self._operands
        of_groups = [settings[id(group)] for group in self._groups]
        weights = operands.weights()
        grads, kept, eager = operands.grads()
        self._stale |= operands.retyped
        self._keep_list([*weights], [*grads], of_groups)
        work = self._work
        if capture.capturing(self._device):
            self._of_graphs.append(work)
        pairs = [0] * (2 * len(weights))
        pairs[::2], pairs[1::2] = weights, grads
        addresses = self._addresses.written(pairs)
        table = self._write_settings(of_groups)
        if not self._clean:
            work.aside.zero_()
        self._clean = False
        lanes = int(ends.LANES)
        counters = (self._params, self._param_count, self._averages, self._write_made_of(settings))
        programs = -(-len(operands.params) // lanes)
        self._begin(ends.begin_step, programs, (*counters, addresses, work.factors, work.counts))
        for launch in work.launches:
            s, group = of_groups[launch.group], self._groups[launch.group]
            numbers = _numbers(s, group["update_rms"], group["rounding_seed"] or 0)
            launch(addresses, table, work.factors, work.counts, *numbers)
        if len(work.pieces):
            self._end(ends.end_step, len(work.pieces), (work.pieces, addresses))
        self._clean = True
        del kept
        operands.step_in_eager(eager, settings)

    def _keep_list(self, weights: list[int], grads: list[int], of_groups: Sequence[Settings]) -> None:
        """Write the work list anew, if it is not that of these addresses and settings."""
        flags = [
            Flags(s.nesterov, s.cover_product, group["beta"] > 0, s.eps >= LEAST_EPS, s.unscale is not None)
            for s, group in zip(of_groups, self._groups, strict=True)
        ]
        if grads != self._seen:
            odd = {i for i, address in enumerate(grads) if address % 16 and address != EMPTY}
            if not odd <= self._unaligned:
                self._unaligned, self._stale = self._unaligned | odd, True
            self._seen = grads
        if weights != self._weights:  # a list tells where weights begin only as to whether that is aligned
            self._weights, self._offsets = weights, [address % 16 for address in weights]
        where = [*self._offsets, *self._released_addresses()]
        if self._stale or flags != self._flags or where != self._where:
            capture.refuse_to_plan(self._operands.params)
            groups = list(zip(self._groups, flags, strict=True))
            self._work = WorkList(self.entries, self._operands, groups, self._unaligned)
            self._flags, self._where, self._stale, self._clean = flags, where, False, True

    def _write_settings(self, of_groups: Sequence[Settings]) -> Tensor:
        numbers: list[float] = []
        for s in of_groups:
            on_host = [0.0 if isinstance(x, Tensor) else x for x in (s.lr, 1 - s.lr * s.weight_decay)]
            unscale = 1.0 if s.unscale is None or isinstance(s.unscale, Tensor) else s.unscale
            numbers += [*on_host, unscale]
        table = self._settings.written(numbers)
        for row, s in zip(table.view(len(of_groups), -1), of_groups, strict=True):  # what is on the device stays there
            if isinstance(s.lr, Tensor):
                row[int(matrix.LR)].copy_(s.lr)
                row[int(matrix.DECAY)].copy_(1 - s.lr * s.weight_decay)
            if isinstance(s.unscale, Tensor):
                row[int(matrix.UNSCALE)].copy_(s.unscale)
        return table

    def _write_made_of(self, settings: Mapping[int, Settings]) -> Tensor:
        """What weights in ``nu``, scales and carriers are made of, besides steps and averages."""
        of_group: dict[int, tuple[Any, ...]] = {
            id(group): (
                float(group["beta"]),
                float(group["bias_correction"]),
                1.0 if group["update_rms"] is None else group["update_rms"] * settings[id(group)].fresh,
                first_rms(group) ** 2,
            )
            for group in self._groups
        }
        if of_group != self._of_group:
            self._of_group, self._numbers = of_group, []
            for e in self.entries:
                units = (1.0, 1.0) if e.squares is None else (e.squares.unit, e.squares.per_one)
                self._numbers += [*of_group[id(e.group)], *units]
        return self._made_of.written(self._numbers)


def _numbers(s: Settings, update_rms: float | None, seed: int) -> tuple[float | int, ...]:
    """The settings of a param group that are arguments of kernels, always of the same types."""
    limit = math.inf if update_rms is None else CUT_OFF * abs(update_rms * s.fresh)
    words = (seed & 0xFFFFFFFF, seed >> 32)
    return (
        *map(float, (s.momentum, s.fresh, s.eps, limit)),
        *(w - (1 << 32) if w >> 31 else w for w in words),
    )
