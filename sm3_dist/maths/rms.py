"""The root mean square of a tensor's updates before momentum, which ``update_rms`` holds where it is wanted.

A sum of floats depends on the order of its terms, and so on how the tensor is cut. Squares are therefore rounded to
multiples of a grain and added up as integers, which is exact in any order. The sum is kept in a unit that follows from
the shape of the whole tensor alone, so small that a sum of the largest squares just fits into 64 bits.

A grain is a power of 2 and many units, but no more than a 512th of the mean square that updates had so far. (Where that
is less than a unit, as of short updates of a billion elements, it is a unit.) Then all that an element asks for is an
addition to the power of 2 whose last bit is worth a grain, the carrier: it rounds, and leaves the number of grains in
the lower bits of the sum, to be added up in 32 bits. It rounds up, lest the squares of updates that have all become
much shorter vanish.

The scale comes from a moving average of the sums of the steps before, an integer too. So their reduction hides behind
compute as that of the maxima does, and an update may still be longer or shorter than those before it. The first step
has none before it and needs none: accumulators are 0, so every update has the same known length. The average leaves it
out. (With bias correction, steps with a gradient of 0 in every element count before that first one, and make it longer
than is known, by up to ``1 / sqrt(1 - beta)``: as they do for Adam.)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sm3_dist.compiled.library import looks, place_of
from sm3_dist.compiled.look import Look

LARGEST = 1 << 62
"""No sum is larger. (One more bit would fit, but not a float32 that was rounded up.)"""

LONGEST = 32
"""Elements of longer updates count as this long. Up to ``beta = 0.999`` none is: ``nu >= (1 - beta) g^2``."""

CARRIED = 1 << 14
"""The carrier, and twice the largest square that counts, over the mean square so far, rounded down to a power of 2."""

GRAINS = 1 << 23
"""Grains of a carrier: float32 has so many values from one power of 2 to the next."""

EXPONENT = 0x7FF << 52
"""Those bits of a float64 that are left of one rounded down to a power of 2."""

WITHOUT_AVERAGE = 2.0**-8
"""What part of the mean square of first updates stands for the mean square so far where there is none."""

STEPS = 10
"""The moving average takes a part of ``1 / STEPS`` from each sum."""

AFTER_FIRST = -1
"""The average when there was one sum, which is left out: the first updates are the longest that there can be."""

CUT_OFF = 5.0
"""No element of a scaled update is longer than so many times the wanted root mean square."""


Averaging = Callable[["array[int]", Tensor], None]
"""Brings averages up to date, from where they lie and the sums of one more step."""


class Averages:
    """The moving averages of several tensors, all of them on one device.

    Args:
        tensors: int64, 0-dimensional.
        averaging: what does it where they are; ``None``: the compiled library on a CPU, if it is there, or PyTorch.

    Example:
        >>> average = torch.tensor(400)
        >>> Averages([average]).take(torch.tensor([800]))
        >>> average
        tensor(440)
    """

    def __init__(self, tensors: Sequence[Tensor], averaging: Averaging | None = None) -> None:
        device = tensors[0].device if tensors else torch.device("cpu")
        self._tensors = list(tensors)
        self._averaging = _compiled(len(tensors)) if averaging is None and device.type == "cpu" else averaging
        self._look = Look(tensors)
        self._together = torch.empty(len(tensors), dtype=torch.int64, device=device)
        self._each = list(self._together.unbind())

    def take(self, sums: Tensor) -> None:
        """Bring them up to date with the sums of one more step; see :func:`averaged`."""
        if not self._tensors:
            return
        addresses = None if self._averaging is None else self._look.addresses()
        if self._averaging is not None and addresses is not None:
            self._averaging(addresses, sums)
        else:
            torch._foreach_copy_(self._each, self._tensors)
            self._together.copy_(averaged(self._together, sums))
            torch._foreach_copy_(self._tensors, self._each)


def _compiled(count: int) -> Averaging | None:
    """The compiled library, if it is there."""
    if (library := looks()) is None:
        return None
    return lambda addresses, sums: library.sm3_average(place_of(addresses), sums.data_ptr(), count)


@dataclass(frozen=True)
class SquareSum:
    """The sum of the squares of one tensor's updates, in units of ``1 / per_one``.

    Attributes:
        numel: number of elements of the whole tensor.
        partial: int64, 0-dimensional: the sum of this step over what this rank holds.
        average: int64, 0-dimensional: the moving average of the sums over the whole tensor; 0 before the first sum,
            and ``AFTER_FIRST`` before the second.
    """

    numel: int
    partial: Tensor
    average: Tensor

    @property
    def cap(self) -> int:
        """No element counts for more: a power of 2, and ``numel * cap <= LARGEST``."""
        return LARGEST >> max(0, self.numel - 1).bit_length()

    @property
    def per_one(self) -> float:
        """How many units make a square of 1."""
        return self.cap / LONGEST**2

    @property
    def unit(self) -> float:
        """What a mean square of 1 would be in ``average``."""
        return self.per_one * self.numel

    def carrier(self, first: float) -> Tensor:
        """The power of 2 to which squares are added in the step to come; 0-dimensional, float64.

        Args:
            first: root mean square of an update before which there was none.
        """
        unit, per_one = (torch.full_like(self.average, n, dtype=torch.float64) for n in (self.unit, self.per_one))
        return carrier(self.average, unit, per_one, first**2)

    def add(self, update: Tensor, carrier: Tensor) -> None:
        """Add the squares of these elements to ``partial``; those of NaN are the largest that count."""
        largest = (carrier / 2).clamp(max=LONGEST**2).to(update.dtype)
        squares = update * update
        squares = torch.where(squares < largest, squares, largest)
        grains = squares.mul_((GRAINS / carrier).to(update.dtype)).ceil_().to(torch.int64).sum()
        self.partial.add_(grains.mul_((carrier * (self.per_one / GRAINS)).to(torch.int64)))

    def scale(self, update_rms: float, first: float, dtype: torch.dtype) -> Tensor:
        """What brings updates like those before to a root mean square of ``update_rms``; 0-dimensional.

        Args:
            update_rms: the root mean square that is wanted.
            first: that of an update before which there was none, see :func:`~sm3_dist.step.param_groups.first_rms`.
            dtype: type of the result.
        """
        unit = torch.full_like(self.average, self.unit, dtype=torch.float64)
        return scale(self.average, unit, update_rms, first**2).to(dtype)


def scale(average: Tensor, unit: Tensor, update_rms: float | Tensor, first_square: float | Tensor) -> Tensor:
    """What brings updates to a root mean square of ``update_rms``, of one tensor or of several; in float64.

    Args:
        average: the moving averages of sums of squares.
        unit: what a mean square of 1 would be in them, float64. (CUDA divides by tensors; by numbers it does not, but
            multiplies with their inverse.)
        update_rms: the root mean square that is wanted.
        first_square: the mean square of an update before which there was none.
    """
    return _mean_square(average, unit, first_square).rsqrt_() * update_rms


def carrier(average: Tensor, unit: Tensor, per_one: Tensor, first_square: float) -> Tensor:
    """The powers of 2 to which squares are added in the step to come, of one tensor or of several; in float64.

    Args:
        average: the moving averages of sums of squares.
        unit: what a mean square of 1 would be in them, float64.
        per_one: what a square of 1 is in them, float64. No grain is smaller than 1.
        first_square: the mean square of an update before which there was none.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> carrier(torch.tensor([0, 2**40, 3 << 40]), 2.0**40 * one, 2.0**40 * one, 1.0).tolist()
        [64.0, 2048.0, 2048.0]
        >>> carrier(torch.tensor([2**20, 2**30]), 2.0**40 * one, 2.0**40 * one, 1.0).tolist()
        [0.015625, 16.0]
    """
    mean = _mean_square(average, unit, first_square * WITHOUT_AVERAGE)
    power = (mean.view(torch.int64) & EXPONENT).view(torch.float64)
    return (power * CARRIED).clamp_(max=2.0 * LONGEST**2).maximum(GRAINS / per_one)


def _mean_square(average: Tensor, unit: Tensor, none: float | Tensor) -> Tensor:
    """That of the steps so far, or ``none``."""
    without = none if isinstance(none, Tensor) else torch.full_like(unit, none)
    return torch.where(average > 0, average.double() / unit, without)


def averaged(average: Tensor, total: Tensor) -> Tensor:
    """The moving averages after sums of one more step: the second sum is the average. Sums of 0 leave it as it is.

    Example:
        >>> averaged(torch.tensor([0, -1, 400, 400]), torch.tensor([9, 7, 800, 0]))
        tensor([ -1,   7, 440, 400])
    """
    moved = average - average // STEPS + total // STEPS
    second = torch.full_like(total, AFTER_FIRST)  # (a number would be sent to a GPU, and waited for)
    moved = torch.where(average > 0, moved, torch.where(average < 0, total, second))
    return torch.where(total > 0, moved, average)


def square_sum(shape: Sequence[int], average: Tensor) -> SquareSum:
    """The sum for a tensor of this (global) shape, with ``average`` from its state."""
    return SquareSum(math.prod(shape), torch.zeros_like(average), average)
