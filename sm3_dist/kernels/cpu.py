"""The C backend: a whole step of all its tensors in one call of ``cpu.c``.

The work list is made once. A step reads the addresses of weights and gradients, writes the hyperparameters of each
param group, and calls the library, which works without the interpreter's lock on ``torch.get_num_threads()`` threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import warnings
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sm3_dist import adapters

if TYPE_CHECKING:
    from sm3_dist.step_plan import Entry
    from sm3_dist.update import Settings

DIMS, WEIGHT, GRAD, MOMENT, OPERANDS, MAX_THREADS = 8, 0, 1, 2, 3, 256
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_MOMENTUM = 3
EMPTY = 1
"""Stands for the address of a gradient without elements: not null, for its parameter takes a step."""
MOST_ASIDE = 1 << 20
"""Most accumulator entries whose maxima a thread gathers aside."""
ELEMENTS_PER_THREAD = 1 << 15
"""A thread for fewer elements costs more than it saves."""

_integers = ctypes.c_int64 * DIMS


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "decay", "momentum", "fresh", "beta", "one_minus_beta", "eps")),
        ("unscale", ctypes.c_float),
        ("simple", ctypes.c_int32),
    )


class _Box(ctypes.Structure):
    _fields_ = (
        ("shape", _integers),
        ("start", _integers),
        ("stride", _integers * OPERANDS),
        ("offset", ctypes.c_int64 * OPERANDS),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("param", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("type", ctypes.c_int64 * OPERANDS),
        ("dims", ctypes.c_int64),
        ("first_box", ctypes.c_int64),
        ("boxes", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("stored", _integers),
        ("accumulator", ctypes.c_void_p * DIMS),
        ("moment", ctypes.c_void_p),
    )


def unavailable() -> str | None:
    """Why the compiled library cannot be used; ``None`` if it can."""
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def _library() -> ctypes.CDLL | str:
    folder = Path(__file__).parent
    built = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()]
    if not built:
        return (
            "the C kernel was not compiled when sm3_dist was installed. Install a C compiler (gcc or clang) and "
            "install sm3_dist again: pip install --force-reinstall --no-deps -v, which shows what the compiler says."
        )
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:
        return f"the compiled C kernel does not load: {error}. Install sm3_dist again on this machine."
    library.sm3_width.restype = ctypes.c_char_p
    library.sm3_width.argtypes = (ctypes.c_int,)
    library.sm3_scratch_bytes.restype = ctypes.c_int64
    library.sm3_scratch_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    library.sm3_step.restype = None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.sm3_step.argtypes = (
        *(pointer, integer, pointer, pointer, integer, pointer),
        *(integer, integer, pointer),
    )
    return library


def widths() -> list[str]:
    """The vector widths that the library was compiled for and this processor has, narrowest first.

    Raises:
        RuntimeError: if the library is not available.
    """
    library = _loaded()
    names: list[str] = []
    while (name := library.sm3_width(len(names))) is not None:
        names.append(name.decode())
    return names


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"sm3_dist steps tensors on the CPU in eager PyTorch, several times slower: {reason}", stacklevel=2)


def refusal(entry: Entry) -> str | None:
    """Why the C backend cannot step this tensor; ``None`` if it can."""
    weight, momentum = adapters.local(entry.param), entry.momentum_buffer
    if weight.device.type != "cpu":
        return f"it is on {weight.device}."
    if weight.dtype not in TYPES:
        return f"it is {weight.dtype}."
    if momentum is not None and momentum.dtype not in (torch.float32, torch.bfloat16):
        return f"its momentum is {momentum.dtype}."
    if len(entry.shard.shape) > DIMS:
        return f"it has more than {DIMS} dimensions."
    if sum(box.numel for box in entry.shard.stored[1:]) > MOST_ASIDE:
        return f"its accumulators after the first have more than {MOST_ASIDE} entries."
    if entry.rounds:
        return "it has no stochastic rounding yet."
    if any(entry.group[option] for option in ("bias_correction", "nesterov", "update_rms", "cover_block")):
        return "of bias_correction, nesterov, update_rms and cover_block it has none yet."
    order = _order(entry, weight)
    last = order[-1]
    for view in [*entry.shard.views(weight), *([] if momentum is None else entry.shard.state_views(momentum))]:
        if view.shape[last] > 1 and view.stride(last) != 1:
            return f"no dimension of weight and momentum is contiguous in both (weight strides {weight.stride()})."
    reason = unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason


def _order(entry: Entry, weight: Tensor) -> list[int]:
    """The dimensions in the order in which memory is walked, outermost first."""
    dims = list(range(len(entry.shard.shape)))
    if len(entry.shard.boxes) != 1:
        return dims
    (view,) = entry.shard.views(weight)
    return sorted(dims, key=lambda d: (view.shape[d] == 1, -int(view.stride(d))))


def _grad_strides(weight: Tensor) -> tuple[int, ...]:
    """The strides that autograd gives the gradient: those of a dense weight, else those of a contiguous tensor."""
    return torch.empty_like(weight, device="meta").stride()


class CpuWork:
    """Tensors that :func:`refusal` has no objection to; see :class:`sm3_dist.kernels.Work`.

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
        self._params = list({id(entry.param): entry.param for entry in entries}.values())
        self._entries_of: list[list[Entry]] = [[] for _ in self._params]
        self._index = {id(param): i for i, param in enumerate(self._params)}
        for entry in entries:
            self._entries_of[self._index[id(entry.param)]].append(entry)
        self._sharded = [i for i, param in enumerate(self._params) if isinstance(param, DTensor)]
        self._table = array("q", bytes(3 * 8 * len(self._params)))  # struct param: weight, grad, step
        self._table[2::3] = array("q", [entries[0].step.data_ptr() for entries in self._entries_of])
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_threads = 0
        self._survey()

    def _survey(self) -> None:
        """Write down where everything lies in memory."""
        weights = self._weights()
        self._addresses = [weight.data_ptr() for weight in weights]
        self._layouts = [(weight.dtype, weight.stride()) for weight in weights]
        self._dtypes = [weight.dtype for weight in weights]
        self._strides = [_grad_strides(weight) for weight in weights]
        self._contiguous = [
            torch.empty_strided(weight.shape, strides, device="meta").is_contiguous()
            for weight, strides in zip(weights, self._strides, strict=True)
        ]
        self._tensors = (_Tensor * len(self.entries))()
        self._boxes = (_Box * sum(len(entry.shard.boxes) for entry in self.entries))()
        groups = {id(group): i for i, group in enumerate(self._groups)}
        first_box = 0
        for tensor, entry in zip(self._tensors, self.entries, strict=True):
            i = self._index[id(entry.param)]
            tensor.param, tensor.group, tensor.first_box = i, groups[id(entry.group)], first_box
            self._describe(tensor, entry, weights[i], self._strides[i])
            first_box += len(entry.shard.boxes)
        # shard_covers releases the memory of shared accumulators between steps.
        self._released = [
            (tensor, entry)
            for tensor, entry in zip(self._tensors, self.entries, strict=True)
            if any(entry.shard.shared)
        ]
        self._scratch_threads = 0

    def _describe(self, tensor: Any, entry: Entry, weight: Tensor, grad_strides: tuple[int, ...]) -> None:
        shard, momentum = entry.shard, entry.momentum_buffer
        order = _order(entry, weight)
        tensor.type[WEIGHT] = tensor.type[GRAD] = TYPES[weight.dtype]
        tensor.type[MOMENT] = NO_MOMENTUM if momentum is None else TYPES[momentum.dtype]
        tensor.moment = 0 if momentum is None else momentum.data_ptr()
        tensor.dims, tensor.boxes, tensor.numel = len(order), len(shard.boxes), shard.numel
        grad = torch.empty_strided(weight.shape, grad_strides, device="meta")
        locals_ = [weight, grad, weight if momentum is None else momentum]
        views = [shard.views(weight), shard.views(grad)]
        views.append(views[WEIGHT] if momentum is None else shard.state_views(momentum))
        for i, dim in enumerate(order):
            tensor.stored[i] = shard.stored[dim].numel
        _point(tensor, entry, order)
        for b, box in enumerate(shard.boxes):
            target = self._boxes[tensor.first_box + b]
            for operand in range(OPERANDS):
                view = views[operand][b]
                target.offset[operand] = view.storage_offset() - locals_[operand].storage_offset()
                for i, dim in enumerate(order):
                    target.stride[operand][i] = view.stride(dim)
            for i, dim in enumerate(order):
                target.shape[i] = box.shape[dim]
                target.start[i] = box.start[dim] - shard.extent.start[dim]

    def _weights(self) -> list[Tensor]:
        if not self._sharded:
            return self._params
        return [adapters.local(param) for param in self._params]

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Take one step of every tensor that has a gradient, and count it."""
        weights = self._weights()
        addresses = list(map(Tensor.data_ptr, weights))
        if addresses != self._addresses:  # somebody exchanged the data of parameters
            if [(weight.dtype, weight.stride()) for weight in weights] != self._layouts:
                self._survey()
            self._addresses = addresses
        self._table[0::3] = array("q", addresses)
        grads = self._grads()
        keep, eager = self._note(grads)
        for tensor, entry in self._released:
            _point(tensor, entry, _order(entry, weights[tensor.param]))
        for target, group in zip(self._group_settings, self._groups, strict=True):
            _write(target, settings[id(group)])
        self._step()
        for i in eager:
            for entry in self._entries_of[i]:
                entry.update(settings[id(entry.group)])
            self._entries_of[i][0].step.add_(1)
        del keep

    def _grads(self) -> list[Tensor | None]:
        grads = [param.grad for param in self._params]
        for i in self._sharded:
            grad = grads[i]
            if grad is not None:
                grads[i] = self._entries_of[i][0].local_grad(grad)
        return grads

    def _note(self, grads: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
        """Write the addresses of the gradients into the table.

        Returns:
            Copies of gradients in another form than expected, to be kept during the step, and the numbers of the
            parameters that must be stepped in eager PyTorch: those with sparse gradients.
        """
        addresses, odd = [], []
        strided = torch.strided
        for i, (grad, dtype, contiguous) in enumerate(zip(grads, self._dtypes, self._contiguous, strict=True)):
            if grad is None:
                addresses.append(0)
            elif grad.layout is strided and grad.dtype is dtype and grad.is_contiguous() and contiguous:
                addresses.append(grad.data_ptr() or EMPTY)
            else:
                addresses.append(0)
                odd.append(i)
        keep, eager = [], []
        for i in odd:
            grad = grads[i]
            assert grad is not None
            if grad.layout is not strided or grad.device.type != "cpu":
                eager.append(i)
                continue
            dtype = grad.dtype if grad.dtype == self._layouts[i][0] else torch.float32
            if dtype != self._dtypes[i]:
                self._dtypes[i] = dtype
                for tensor in self._tensors:
                    if tensor.param == i:
                        tensor.type[GRAD] = TYPES[dtype]
            if grad.dtype != dtype or grad.stride() != self._strides[i]:
                grad = torch.empty_strided(grad.shape, self._strides[i], dtype=dtype).copy_(grad)
                keep.append(grad)
            addresses[i] = grad.data_ptr() or EMPTY
        self._table[1::3] = array("q", addresses)
        return keep, eager

    def _step(self) -> None:
        library = _loaded()
        threads = min(torch.get_num_threads(), MAX_THREADS)
        count = len(self._tensors)
        if threads != self._scratch_threads:
            size = library.sm3_scratch_bytes(self._tensors, count, threads)
            self._scratch = torch.empty(size, dtype=torch.uint8)
            self._scratch_threads = threads
        library.sm3_step(
            self._tensors,
            count,
            self._boxes,
            self._table.buffer_info()[0],
            len(self._params),
            self._group_settings,
            threads,
            self._width,
            self._scratch.data_ptr(),
        )


def _point(tensor: Any, entry: Entry, order: Sequence[int]) -> None:
    for i, dim in enumerate(order):
        tensor.accumulator[i] = entry.accumulators[dim].data_ptr()


def _write(target: Any, s: Settings) -> None:
    """The settings of a group in the form of ``cpu.c``; every number is rounded once, to float32, as PyTorch does."""
    lr = float(s.lr)
    target.lr, target.eps, target.momentum = lr, s.eps, s.momentum
    target.decay = 1 - lr * s.weight_decay
    target.fresh = (1 - s.momentum if s.momentum else 1.0) * (-1 if s.maximize else 1)
    target.beta, target.one_minus_beta = (s.beta, 1 - s.beta) if s.beta > 0 else (1.0, 1.0)
    target.unscale = 1.0 if s.unscale is None else float(s.unscale)
    target.simple = not (s.maximize and not s.momentum) and target.decay == 1 and s.beta == 0 and target.unscale == 1
