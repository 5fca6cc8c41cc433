"""What backends with a work list have in common: they refer to tensors by address, and addresses may change."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from sm3_dist.compiled.library import integers
from sm3_dist.compiled.look import Look
from sm3_dist.layout.describe import local_tensor
from sm3_dist.layout.kinds import is_dtensor
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import Entry

DIMS = 8
"""Most dimensions of a tensor."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights and gradients."""
MOMENT_TYPES = (torch.float32, torch.bfloat16)
_GRAD = attrgetter("grad")
EMPTY = 1
"""Stands for the address of a gradient without elements: not null, for its parameter takes a step."""


def refusal(entry: Entry, device: str, moment_types: Sequence[torch.dtype] = MOMENT_TYPES) -> str | None:
    """Why no backend for this type of device can step a tensor; ``None`` if it can."""
    weight, momentum = local_tensor(entry.param), entry.momentum_buffer
    if weight.device.type != device:
        return f"it is on {weight.device}."
    if not has_memory(weight):
        return f"it is a {type(weight.data).__name__} and has no memory of its own."
    if weight.dtype not in TYPES:
        return f"it is {weight.dtype}."
    if entry.accumulators[0].dtype != torch.float32:
        return f"its accumulators are {entry.accumulators[0].dtype}."
    if momentum is not None and momentum.dtype not in moment_types:
        return f"its momentum is {momentum.dtype}."
    if len(entry.shard.shape) > DIMS:
        return f"it has more than {DIMS} dimensions."
    return None


def has_memory(tensor: Tensor) -> bool:
    """Whether its elements lie somewhere. A tensor that is made of others gives address 0, or none at all."""
    try:
        return not tensor.numel() or bool(tensor.data_ptr())
    except RuntimeError:
        return False


def address_of(tensor: Tensor) -> int:
    """Where its elements lie.

    Raises:
        TypeError: if they do not.
    """
    if not has_memory(tensor):
        raise TypeError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory of its own, which kernels need. "
            "Pass backend='eager' to SM3, or a plain gradient."
        )
    return tensor.data_ptr()


def strided_refusal(entry: Entry) -> str | None:
    """Why a backend that walks along contiguous memory cannot step a tensor; ``None`` if it can."""
    weight, momentum = local_tensor(entry.param), entry.momentum_buffer
    last = memory_order(entry, weight)[-1]
    for view in [*entry.shard.views(weight), *([] if momentum is None else entry.shard.state_views(momentum))]:
        if view.shape[last] > 1 and view.stride(last) != 1:
            return f"no dimension of weight and momentum is contiguous in both (weight strides {weight.stride()})."
    return None


def memory_order(entry: Entry, weight: Tensor) -> list[int]:
    """The dimensions in the order in which memory is walked, outermost first."""
    dims = list(range(len(entry.shard.shape)))
    if len(entry.shard.boxes) != 1:
        return dims
    (view,) = entry.shard.views(weight)
    strides = view.stride()
    return sorted(dims, key=lambda d: (view.shape[d] == 1, -strides[d]))


def grad_strides(weight: Tensor) -> tuple[int, ...]:
    """The strides that autograd gives the gradient: those of a dense weight, else those of a contiguous tensor."""
    return torch.empty_like(weight, device="meta").stride()


class Operands:
    """Weights and gradients of the parameters of a work list, step by step.

    Args:
        entries: the tensors.

    Attributes:
        params: the parameters of the tensors, each once.
        entries_of: the tensors of each.
        dtypes: the types of the gradients.
        retyped: whether one of them is another in this step than in the one before.
        strides: the strides of the gradients.
        present: the parameters that have a gradient in this step.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.params = list({id(entry.param): entry.param for entry in entries}.values())
        self.index = {id(param): i for i, param in enumerate(self.params)}
        self.entries_of: list[list[Entry]] = [[] for _ in self.params]
        for entry in entries:
            self.entries_of[self.index[id(entry.param)]].append(entry)
        self._without_elements = [entry for entry in entries if _leaves_maxima_of_nothing(entry)]
        self.present: list[Any] = []
        self.retyped = False
        self._sharded = [i for i, param in enumerate(self.params) if is_dtensor(param)]
        weights = self._weights()
        self._look = Look(weights)
        self._grads: Look | None = None  # at those of an earlier step, all of them as a kernel takes them
        self._types = [weight.dtype for weight in weights]
        self.dtypes = list(self._types)
        self.strides = [grad_strides(weight) for weight in weights]
        self._contiguous = [
            torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device="meta").is_contiguous()
            for weight, strides in zip(weights, self.strides, strict=True)
        ]

    def weights(self) -> array[int]:
        """The addresses of the weights. Whoever lays one out anew has a new plan made, and new kernels."""
        if self._sharded:
            self._look.turn_to(self._weights())
        addresses = self._look.addresses()
        assert addresses is not None
        return addresses

    def grads(self) -> tuple[array[int], list[Tensor | None], list[int]]:
        """The addresses of the gradients, 0 for none.

        Returns:
            Addresses; the gradients, to be kept during the step, for some are copies (not laid out as kernels take
            them) or reduced just now; and the indices of the parameters that must be stepped in eager PyTorch: those
            with sparse gradients.
        """
        self.retyped = False
        grads: list[Any] = list(map(_GRAD, self.params))
        for i in self._sharded:
            grad = grads[i]
            if grad is not None:
                grads[i] = self.entries_of[i][0].local_grad(grad)
        all_there = all(map(is_not, grads, repeat(None)))
        self.present = self.params if all_there else list(compress(self.params, map(is_not, grads, repeat(None))))
        if self._grads is not None and all_there:
            self._grads.turn_to(grads)
            places = self._grads.addresses()
            self._grads.turn_to([])  # whoever drops gradients has their memory
            if places is not None:
                return places if all(places) else integers(place or EMPTY for place in places), grads, []
        addresses, odd = [], []
        strided = torch.strided
        for i, (grad, dtype, contiguous) in enumerate(zip(grads, self.dtypes, self._contiguous, strict=True)):
            if grad is None:
                addresses.append(0)
            elif grad.layout is strided and grad.dtype is dtype and contiguous and grad.is_contiguous():
                addresses.append(address_of(grad) or EMPTY)
            else:
                addresses.append(0)
                odd.append(i)
        self._grads = None
        if all_there and not odd:
            self._grads = Look(grads)
            self._grads.turn_to([])
        eager = []
        for i in odd:
            if grads[i].layout is not strided:
                eager.append(i)
            else:
                grads[i] = self._as_taken(i, grads[i])
                addresses[i] = address_of(grads[i]) or EMPTY
        return integers(addresses), grads, eager

    def _as_taken(self, i: int, grad: Tensor) -> Tensor:
        """A gradient of the weight's type or float32, laid out as kernels take it; a copy where it was not."""
        dtype = grad.dtype if grad.dtype == self._types[i] else torch.float32
        if dtype != self.dtypes[i]:
            self.dtypes[i], self.retyped = dtype, True
        if grad.dtype == dtype and grad.stride() == self.strides[i]:
            return grad
        return torch.empty_strided(grad.shape, self.strides[i], dtype=dtype, device=grad.device).copy_(grad)

    def step_in_eager(self, params: Iterable[int], settings: Mapping[int, Settings]) -> None:
        """Take what the kernels leave of a step: tensors without elements, of which no kernel clears accumulators, too.

        Args:
            params: the indices of the parameters that :meth:`grads` tells of; their steps are counted.
            settings: of each param group, by its ``id``.
        """
        for entry in self._without_elements:
            entry.update(settings[id(entry.group)])
        for i in params:
            for entry in self.entries_of[i]:
                entry.update(settings[id(entry.group)])
            self.entries_of[i][0].step.add_(1)

    def _weights(self) -> list[Tensor]:
        if not self._sharded:
            return self.params
        return [local_tensor(param) for param in self.params]


def _leaves_maxima_of_nothing(entry: Entry) -> bool:
    shard = entry.shard
    return bool(shard.boxes) and not shard.numel and any(stored.numel for stored in shard.stored)


def views(entry: Entry, weight: Tensor, strides: tuple[int, ...]) -> list[tuple[Tensor, list[Tensor]]]:
    """For weight, gradient and momentum the local tensor and the boxes as views of it.

    The gradient is stood in for by a tensor without memory. Without momentum the weight takes its place.
    """
    shard, momentum = entry.shard, entry.momentum_buffer
    grad = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device="meta")
    whole = [(weight, shard.views(weight)), (grad, shard.views(grad))]
    return [*whole, whole[0] if momentum is None else (momentum, shard.state_views(momentum))]
