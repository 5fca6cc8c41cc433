"""The root mean square of a tensor's updates, to which ``update_rms`` scales the next one.

A sum of floats depends on the order of its terms, and so on how the tensor is cut. Squares are therefore rounded to
multiples of a fixed unit and added up as integers, which is exact in any order. The unit follows from the shape of the
whole tensor alone, and is so small that a sum of the largest squares just fits into 64 bits.

The scale comes from the sum of the step before, so that its reduction hides behind compute as that of the maxima does.
The first step has none before it and needs none: accumulators are 0, so every update has the same known length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 1 << 62
"""No sum is larger. (One more bit would fit, but not a float32 that was rounded up.)"""

LONGEST = 32
"""Elements of longer updates count as this long. Up to ``beta = 0.999`` none is: ``nu >= (1 - beta) g^2``."""


@dataclass(frozen=True)
class SquareSum:
    """The sum of the squares of one tensor's updates, in units of ``1 / per_one``.

    Attributes:
        numel: number of elements of the whole tensor.
        partial: int64, 0-dimensional: the sum of this step over what this rank holds.
        total: int64, 0-dimensional: the sum of the last step that had one, over the whole tensor; 0 before the first.
    """

    numel: int
    partial: Tensor
    total: Tensor

    @property
    def cap(self) -> int:
        """The largest value of one element, also that of NaN: a power of 2, and ``numel * cap <= LARGEST``."""
        return LARGEST >> max(0, self.numel - 1).bit_length()

    @property
    def per_one(self) -> float:
        """How many units make a square of 1."""
        return self.cap / LONGEST**2

    def add(self, update: Tensor) -> None:
        """Add the squares of these elements to ``partial``."""
        squares = (update * update).mul_(self.per_one).clamp_(max=self.cap).nan_to_num_(nan=self.cap)
        self.partial.add_(squares.round_().to(torch.int64).sum())

    def scale(self, update_rms: float, first: float, dtype: torch.dtype) -> Tensor:
        """What brings the update of the last step to a root mean square of ``update_rms``; 0-dimensional.

        Args:
            update_rms: the root mean square that is wanted.
            first: that of an update before which there was none, see :func:`first_rms`.
            dtype: type of the result.
        """
        mean = torch.where(self.total > 0, self.total.double() / (self.per_one * self.numel), first**2)
        return (mean.rsqrt_() * update_rms).to(dtype)


def first_rms(momentum: float, beta: float, nesterov: bool, bias_correction: bool, update_power: float) -> float:
    """The root mean square of the first update, if every element has a gradient: ``nu = (1 - beta) g^2``.

    Example:
        >>> round(first_rms(momentum=0.9, beta=0.95, nesterov=False, bias_correction=True, update_power=1.0), 6)
        0.1
    """
    averaged = (1 - momentum) * (1 + momentum if nesterov else 1)
    return math.pow(averaged if bias_correction else averaged / math.sqrt(1 - beta), update_power)


def square_sum(shape: Sequence[int], total: Tensor) -> SquareSum:
    """The sum for a tensor of this (global) shape, with ``total`` from its state."""
    return SquareSum(math.prod(shape), torch.zeros_like(total), total)
