"""The root mean square of a tensor's updates, to which ``update_rms`` scales the next one.

A sum of floats depends on the order of its terms, and so on how the tensor is cut. Squares are therefore rounded to
multiples of a fixed unit and added up as integers, which is exact in any order. The unit follows from the shape of the
whole tensor and from ``beta``, and is so small that a sum of the largest possible squares just fits into 64 bits.

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
"""No sum is larger. (One more bit would fit, but not a float32 above it that was rounded up.)"""


@dataclass(frozen=True)
class Unit:
    """How squares are turned into integers.

    Attributes:
        per_one: how many units make a square of 1; a power of 2.
        cap: the largest value of one element, in units; also that of NaN. ``numel * cap <= LARGEST``.
        first_rms: root mean square of the first update, where every element has a gradient.
    """

    per_one: float
    cap: float
    first_rms: float

    @classmethod
    def of(cls, shape: Sequence[int], momentum: float, beta: float, nesterov: bool, bias_correction: bool) -> Unit:
        """The unit for a tensor of this (global) shape.

        An update before momentum is at most ``1 / sqrt(1 - beta)`` long, for ``nu >= (1 - beta) g^2``; momentum
        averages and makes it no longer.

        Example:
            >>> unit = Unit.of((1024, 1024), momentum=0.9, beta=0.95, nesterov=False, bias_correction=True)
            >>> unit.per_one == 2**36, unit.cap == 2**42, round(unit.first_rms, 6)
            (True, True, 0.1)
        """
        longest = 2 / (1 - beta)  # squared, with a factor for rounding
        cap = LARGEST >> _bits(math.prod(shape))
        per_one = cap / 2 ** math.ceil(math.log2(longest))
        first = (1 - momentum) * (1 + momentum if nesterov else 1)
        return cls(per_one, float(cap), first if bias_correction else first / math.sqrt(1 - beta))


@dataclass(frozen=True)
class SquareSum:
    """The sum of the squares of one tensor's updates.

    Attributes:
        unit: how squares are turned into integers.
        numel: number of elements of the whole tensor.
        partial: int64, 0-dimensional: the sum of this step over what this rank holds.
        total: int64, 0-dimensional: the sum of the last step that had one, over the whole tensor; 0 before the first.
    """

    unit: Unit
    numel: int
    partial: Tensor
    total: Tensor

    def add(self, update: Tensor) -> None:
        """Add the squares of these elements to ``partial``."""
        squares = (update * update).mul_(self.unit.per_one).clamp_(max=self.unit.cap).nan_to_num_(nan=self.unit.cap)
        self.partial.add_(squares.round_().to(torch.int64).sum())

    def scale(self, update_rms: float, dtype: torch.dtype) -> Tensor:
        """What brings the update of the last step to a root mean square of ``update_rms``; 0-dimensional."""
        mean = self.total.double() / (self.unit.per_one * self.numel)
        mean = torch.where(self.total > 0, mean, self.unit.first_rms**2)
        return (mean.rsqrt_() * update_rms).to(dtype)


def _bits(n: int) -> int:
    """The smallest ``b`` with ``2^b >= n``."""
    return max(0, n - 1).bit_length()
