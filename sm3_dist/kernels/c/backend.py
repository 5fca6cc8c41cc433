"""The C backend: a whole step of all its tensors in one call of ``cpu.c``.

The work list is made once. A step reads the addresses of weights and gradients, writes the hyperparameters of each
param group, and calls the library, which works without the interpreter's lock on ``torch.get_num_threads()`` threads:
those that PyTorch itself has, where its OpenMP runtime can be asked for them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sm3_dist.compiled.library import MAX_THREADS, library, parallel
from sm3_dist.kernels import fused
from sm3_dist.kernels.fused import DIMS, Operands
from sm3_dist.kernels.matrices import matrices, sides
from sm3_dist.layout.cover import split
from sm3_dist.layout.describe import local_tensor
from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.rms import CUT_OFF
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import Entry
from sm3_dist.step.param_groups import first_rms

WEIGHT, GRAD, MOMENT, OPERANDS = 0, 1, 2, 3
PARAM_FIELDS = 3
"""Of struct param, 64 bits each: weight, grad, step. Their table is an array of integers, which is faster to fill."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 4}
MOMENT_TYPES = (torch.float32, torch.bfloat16, torch.int8)
NO_MOMENTUM = 3
MOST_ASIDE = 1 << 20
"""Most accumulator entries whose maxima a thread gathers aside."""
_integers = ctypes.c_int64 * DIMS


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "decay", "momentum", "fresh", "old", "new", "eps")),
        *((name, ctypes.c_float) for name in ("unscale", "limit")),
        *((name, ctypes.c_int32) for name in ("simple", "shaped", "nesterov", "product")),
        *((name, ctypes.c_double) for name in ("beta", "update_rms", "first_square")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("scale", "carrier", "cap")),
        ("converts", ctypes.c_int32),
    )


class _Box(ctypes.Structure):
    _fields_ = (
        ("shape", _integers),
        ("start", _integers),
        ("stride", _integers * OPERANDS),
        ("offset", ctypes.c_int64 * OPERANDS),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "first_row", "first_column", "block")),
        *((name, ctypes.c_int64) for name in ("column_length", "column_phase", "row_place", "column_place")),
        ("offset", ctypes.c_int64 * OPERANDS),
        ("stride", ctypes.c_int64 * OPERANDS),
        ("table", ctypes.c_void_p),
    )


class _Side(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("outer", "length", "blocks", "block", "phase"))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("type", ctypes.c_int64 * OPERANDS),
        ("dims", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("first_box", ctypes.c_int64),
        ("boxes", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("stored", _integers),
        ("order", _integers),
        ("extent_start", _integers),
        ("place", _integers * 2),
        ("side", _Side * 2),
        ("strided", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("accumulator", ctypes.c_void_p * DIMS),
        ("moment", ctypes.c_void_p),
        ("whole_numel", ctypes.c_double),
        ("cap", ctypes.c_double),
        ("partial", ctypes.c_void_p),
        ("average", ctypes.c_void_p),
    )


def unavailable() -> str | None:
    """Why the compiled library cannot be used; ``None`` if it can."""
    found = library()
    return found if isinstance(found, str) else None


def widths() -> list[str]:
    """The vector widths that the library was compiled for and this processor has, narrowest first.

    Raises:
        RuntimeError: if the library is not available.
    """
    loaded = _loaded()
    names: list[str] = []
    while (name := loaded.sm3_width(len(names))) is not None:
        names.append(name.decode())
    return names


def _loaded() -> ctypes.CDLL:
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"sm3_dist steps tensors on the CPU in eager PyTorch, several times slower: {reason}", stacklevel=2)


def refusal(entry: Entry) -> str | None:
    """Why the C backend cannot step this tensor; ``None`` if it can."""
    reason = fused.refusal(entry, "cpu", MOMENT_TYPES)
    if reason is None and not _in_blocks(entry.shard) and sum(box.numel for box in entry.shard.stored[1:]) > MOST_ASIDE:
        reason = f"more than {MOST_ASIDE} entries of its accumulators would have to be gathered at a time."
    if reason is None and (reason := unavailable()) is not None:
        _warn_once(reason)
    return reason


def _in_blocks(shard: LocalShard) -> bool:
    """Whether it is a list of matrices to the library, and not of boxes."""
    return shard.cover_block is not None and len(shard.shape) > 1


class CKernel:
    """Tensors that :func:`refusal` has no objection to; see :class:`sm3_dist.kernels.Kernel`.

    Args:
        entries: the tensors.
        width: name of the vector width; the widest by default.
    """

    def __init__(self, entries: Sequence[Entry], width: str | None = None) -> None:
        self.entries = entries
        names = widths()
        self._width = names.index(width) if width is not None else len(names) - 1
        self._groups = list({id(entry.group): entry.group for entry in entries}.values())
        self._group_settings = (_Settings * len(self._groups))()
        self._operands = Operands(entries)
        first = [entries[0] for entries in self._operands.entries_of]
        self._table = array("q", bytes(8 * PARAM_FIELDS * len(first)))
        self._table[2::PARAM_FIELDS] = array("q", [entry.step.data_ptr() for entry in first])
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._scratch_threads = 0
        self._write_list()

    def _write_list(self) -> None:
        """Write down where everything lies in memory."""
        self._tensors = (_Tensor * len(self.entries))()
        groups = {id(group): i for i, group in enumerate(self._groups)}
        boxes: list[Any] = []
        parts_in_blocks: list[Any] = []
        self._tables: list[Tensor] = []
        for tensor, entry in zip(self._tensors, self.entries, strict=True):
            tensor.param, tensor.group = self._operands.index[id(entry.param)], groups[id(entry.group)]
            parts, target = (self._matrices_of, parts_in_blocks) if _in_blocks(entry.shard) else (self._boxes_of, boxes)
            self._describe(tensor, entry)
            tensor.first_box = len(target)
            target += parts(tensor, entry)
            tensor.boxes = len(target) - tensor.first_box
        self._boxes, self._matrices = (_Box * len(boxes))(*boxes), (_Matrix * len(parts_in_blocks))(*parts_in_blocks)
        # shard_covers releases the memory of shared accumulators between steps.
        pairs = zip(self._tensors, self.entries, strict=True)
        self._released = [(tensor, entry) for tensor, entry in pairs if any(entry.shard.shared)]

    def _describe(self, tensor: Any, entry: Entry) -> None:
        shard, momentum, weight = entry.shard, entry.momentum_buffer, local_tensor(entry.param)
        order = fused.memory_order(entry, weight)
        tensor.type[WEIGHT], tensor.type[GRAD] = TYPES[weight.dtype], TYPES[self._operands.dtypes[tensor.param]]
        tensor.type[MOMENT] = NO_MOMENTUM if momentum is None else TYPES[momentum.dtype]
        tensor.moment = 0 if momentum is None else momentum.data_ptr()
        tensor.dims, tensor.numel = len(order), shard.numel
        tensor.rounds, tensor.number = bool(entry.group["stochastic_rounding"]), entry.number
        s = split(shard.shape)
        for i, dim in enumerate(order):
            tensor.stored[i] = shard.stored[dim].numel if not _in_blocks(shard) else 0
            tensor.extent_start[i] = shard.extent.start[dim]
            side, end = (0, s) if dim < s else (1, len(order))
            tensor.place[side][i] = math.prod(shard.shape[dim + 1 : end])
        if _in_blocks(shard):
            tensor.block = shard.cover_block
            for target, made in zip(tensor.side, sides(shard), strict=True):
                for name, number in vars(made).items():
                    setattr(target, name, number)
        if (squares := entry.squares) is not None:
            tensor.whole_numel, tensor.cap = squares.numel, squares.cap
            tensor.partial, tensor.average = squares.partial.data_ptr(), squares.average.data_ptr()
        _point(tensor, entry)

    def _operands_of(self, tensor: Any, entry: Entry) -> list[tuple[Tensor, list[Tensor]]]:
        return fused.views(entry, local_tensor(entry.param), self._operands.strides[tensor.param])

    def _boxes_of(self, tensor: Any, entry: Entry) -> list[Any]:
        shard, operands, boxes = entry.shard, self._operands_of(tensor, entry), []
        order = fused.memory_order(entry, local_tensor(entry.param))
        for b, box in enumerate(shard.boxes):
            target = _Box()
            for operand, (local, views) in enumerate(operands):
                target.offset[operand] = views[b].storage_offset() - local.storage_offset()
                for i, dim in enumerate(order):
                    target.stride[operand][i] = views[b].stride(dim)
                tensor.strided |= box.shape[order[-1]] > 1 and views[b].stride(order[-1]) != 1
            for i, dim in enumerate(order):
                target.shape[i] = box.shape[dim]
                target.start[i] = box.start[dim] - shard.extent.start[dim]
            boxes.append(target)
        return boxes

    def _matrices_of(self, tensor: Any, entry: Entry) -> list[Any]:
        operands, found = self._operands_of(tensor, entry), []
        starts = [[view.storage_offset() - local.storage_offset() for view in views] for local, views in operands]
        for matrix in matrices(entry.shard, [views for _, views in operands]):
            rows, columns = matrix.rows, matrix.columns
            target = _Matrix(
                *(rows.count, columns.count, rows.first, columns.first, columns.block),
                *(columns.length, columns.phase, rows.place, columns.place),
            )
            target.offset[:] = [of[matrix.box] + n for of, n in zip(starts, matrix.offsets, strict=True)]
            target.stride[:] = matrix.strides
            if matrix.table is not None:
                self._tables.append(matrix.table)
                target.table = matrix.table.data_ptr()
            found.append(target)
        return found

    def update(self, settings: Mapping[int, Settings]) -> Sequence[Tensor]:
        """Take one step of every tensor that has a gradient, and count it; see :class:`sm3_dist.kernels.Kernel`."""
        operands = self._operands
        self._table[0::PARAM_FIELDS] = operands.weights()
        addresses, kept, eager = operands.grads()
        self._table[1::PARAM_FIELDS] = addresses
        for tensor in self._tensors if operands.retyped else ():
            tensor.type[GRAD] = TYPES[operands.dtypes[tensor.param]]
        for tensor, entry in self._released:
            _point(tensor, entry)
        for target, group in zip(self._group_settings, self._groups, strict=True):
            _write(target, settings[id(group)], group)
        self._step()
        del kept
        operands.step_in_eager(eager, settings)
        return operands.present

    def _step(self) -> None:
        loaded = _loaded()
        threads = min(torch.get_num_threads(), MAX_THREADS)
        count = len(self._tensors)
        if threads != self._scratch_threads:
            size = loaded.sm3_scratch_bytes(self._tensors, count, threads)
            self._scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._scratch_threads = threads
        table, params = self._table.buffer_info()[0], len(self._operands.params)
        loaded.sm3_step(
            *(self._tensors, count, self._boxes, self._matrices, table, params, self._group_settings),
            *(threads, self._width, self._scratch.data_ptr(), parallel(os.getpid())),
        )


def _point(tensor: Any, entry: Entry) -> None:
    order = fused.memory_order(entry, local_tensor(entry.param))
    for i, a in enumerate(range(3) if _in_blocks(entry.shard) else order):
        tensor.accumulator[i] = entry.accumulators[a].data_ptr()


def _write(target: Any, s: Settings, group: Mapping[str, Any]) -> None:
    """The settings of a group in the form of ``settings.h``; each number is rounded once, to float32, as in PyTorch."""
    lr = float(s.lr)
    target.lr, target.eps, target.momentum = lr, s.eps, s.momentum
    target.decay = 1 - lr * s.weight_decay
    target.fresh, target.old, target.new = s.fresh, s.old, s.new
    target.unscale = 1.0 if s.unscale is None else float(s.unscale)
    target.beta = group["beta"] if group["bias_correction"] else 0.0
    is_plain = target.decay == target.unscale == s.old == s.new == 1
    target.simple = is_plain and not (s.maximize and not s.momentum)
    target.nesterov, target.product = s.nesterov, s.cover_product
    target.limit = math.inf
    target.seed = group["rounding_seed"] or 0
    rms = group["update_rms"]
    if rms is not None:
        rms *= s.fresh
        target.limit, target.update_rms, target.first_square = CUT_OFF * abs(rms), rms, first_rms(group) ** 2
    target.shaped = rms is not None or s.nesterov
