"""SM3-II on whole tensors in the plainest PyTorch: the specification, and what the tests hold every layout against."""

from __future__ import annotations

import functools
import math
import struct
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv

import torch
from torch import Tensor

from sm3_dist.layout.shard import accumulator_dtype
from sm3_dist.maths.orthogonal import product_type
from sm3_dist.maths.rounding import philox


@dataclass
class ReferenceState:
    """State of one tensor of shape ``(n_1, …, n_k)``.

    Attributes:
        accumulators: ``mu_i`` of shape ``(n_i,)`` for each dimension; the tensor's own shape for ``k <= 1``. With
            blocks three of ``k`` dimensions, of the rows, the columns and the tiles, see :func:`cover_sets`.
        momentum_buffer: the tensor's shape; zero at first. int8: codes, see :func:`code_values`.
        step: number of steps taken.
        update_square_average: a moving average of the sum of squares of the updates before momentum that were not all
            zero, in the unit of :func:`square_unit`; 0 before the first, which is left out, and -1 before the second.
    """

    accumulators: list[Tensor]
    momentum_buffer: Tensor
    step: int = 0
    update_square_average: int = 0

    @classmethod
    def zeros(
        cls, weight: Tensor, cover_block: int | None = None, momentum_dtype: torch.dtype | None = None
    ) -> ReferenceState:
        """The state before the first step, in float32 (float64 for float64 weights) where no type is given."""
        dtype = accumulator_dtype(weight.dtype)
        shapes: list[tuple[int, ...]] = [(n,) for n in weight.shape] or [()]
        if cover_block is not None and weight.dim():
            sets = cover_sets(weight.shape, cover_block)
            shapes = [tuple(map(math.ceil, map(truediv, weight.shape, lengths))) for lengths in sets]
        return cls(
            [weight.new_zeros(s, dtype=dtype, requires_grad=False) for s in shapes],
            torch.zeros_like(weight, dtype=momentum_dtype or dtype, requires_grad=False),
        )


def reference_step(
    weight: Tensor,
    grad: Tensor,
    state: ReferenceState,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    beta: float = 0.0,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    maximize: bool = False,
    bias_correction: bool = False,
    nesterov: bool = False,
    update_rms: float | None = None,
    cover_block: int | None = None,
    cover_product: bool = False,
    orthogonalize: bool = False,
    rounding: tuple[int, int] | None = None,
    skip_nonfinite: bool = False,
) -> None:
    """One step of SM3-II, with whole-tensor temporaries and no care for speed; each line rounds as written.

    Args:
        weight: shape ``(n_1, …, n_k)``; updated in place.
        grad: the same shape.
        state: updated in place.
        lr: learning rate.
        momentum: coefficient of the moving average of updates; 0 for none.
        beta: coefficient of the moving average of squared gradients; 0 for sums.
        eps: added under the square root.
        weight_decay: decoupled weight decay.
        maximize: follow the gradient up.
        bias_correction: average squared gradients over the steps so far, without the zeros before them.
        nesterov: look ahead along the momentum.
        update_rms: scale the update before momentum by what would have given those before it this root mean square.
        cover_block: elements per block of the covers; ``None`` for whole slices.
        cover_product: estimate from the product of the covers, over that of the tile, and not from their minimum.
        orthogonalize: take the nearest orthogonal matrix in place of the update, of matrices and tensors of more
            dimensions.
        rounding: seed and number of the tensor, to round to bfloat16 and to codes stochastically; ``None``: to the
            nearest, which codes are not.
        skip_nonfinite: leave everything as it is if the gradient has NaN or infinity.

    Source: arXiv 1901.11150, algorithm SM3-II.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> state = ReferenceState.zeros(weight)
        >>> reference_step(weight, torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]]), state, lr=0.5)
        >>> weight
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 0.5000, 0.5000]])
        >>> state.accumulators
        [tensor([ 9., 16.]), tensor([ 1., 16.,  9.])]
    """
    if skip_nonfinite and not grad.isfinite().all():
        return
    k = weight.dim()
    dtype = state.accumulators[0].dtype
    state.step += 1
    g = -grad.to(dtype) if maximize else grad.to(dtype)
    old, new = (beta, 1 - beta) if beta > 0 else (1, 1)
    if bias_correction and beta > 0:
        new = (1 - beta) / (1 - beta**state.step)
        old = 1 - new
    covers = [_along(mu, i, weight.shape, cover_block) for i, mu in enumerate(state.accumulators)]
    smallest = functools.reduce(torch.minimum, covers)
    if cover_product and k > 1:
        limits = torch.finfo(dtype)  # of what may be infinite, the square of a finite gradient
        row, column, tile = (cover.clamp(max=limits.max) for cover in covers)
        smallest = row * (column / tile.clamp(min=limits.tiny) * old)
    else:
        smallest = smallest * old
    nu = g * g * new + smallest
    u = torch.rsqrt(nu + eps) * g
    fresh = 1 - momentum
    if update_rms is not None:
        unit = square_unit(u.numel())
        first = 1 if bias_correction else 1 / math.sqrt(1 - beta)
        average = state.update_square_average
        mean = average / (unit * u.numel()) if average > 0 else first**2
        grain = square_grain(mean if average > 0 else first**2 / 256, unit)
        largest = min(grain * 2**22, 32.0**2)
        squares = (u * u).clamp(max=largest).nan_to_num(nan=largest).flatten().tolist()
        if total := sum(math.ceil(square / grain) for square in squares) * int(grain * unit):
            state.update_square_average = (
                average - average // 10 + total // 10 if average > 0 else total if average < 0 else -1
            )
        wanted = update_rms * fresh
        u = (u * u.new_tensor(1 / math.sqrt(mean) * wanted)).clamp(-5 * wanted, 5 * wanted)
    else:
        u = u * fresh
    if momentum > 0:
        m = state.momentum_buffer.to(dtype)
        if state.momentum_buffer.dtype == torch.int8:
            m = u.new_tensor(code_values())[state.momentum_buffer.long()]
        m = m * momentum + u
        u = u + m * momentum if nesterov else m
        state.momentum_buffer = _rounded(m, state.momentum_buffer.dtype, rounding, state.step - 1, half=1)
    if orthogonalize and k > 1 and u.numel():
        u = _orthogonalized(_rounded(u, torch.bfloat16, rounding, state.step - 1, half=0)).to(dtype)
        u = u * (0.2 * math.sqrt(max(len(u), u[0].numel())))
    w = weight.to(dtype)
    if weight_decay > 0:
        w = w * (1 - lr * weight_decay)
    weight.copy_(_rounded(w - u * lr, weight.dtype, rounding, state.step - 1, half=0))
    if nu.numel():
        state.accumulators = [_maximum(nu, i, cover_block) for i in range(len(state.accumulators))]


def _orthogonalized(u: Tensor) -> Tensor:
    """``u`` as a matrix ``(n_1, n_2 … n_k)`` whose singular values are about 1, by five steps of Newton and Schulz."""
    tall = len(u) > u[0].numel()
    x = (u.flatten(1).T if tall else u.flatten(1)).contiguous()
    x = (x.float() / torch.linalg.vector_norm(x.float()).clamp(min=1e-30)).to(product_type(x.device))
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).reshape(u.shape).bfloat16()


def _rounded(x: Tensor, dtype: torch.dtype, rounding: tuple[int, int] | None, step: int, half: int) -> Tensor:
    """``x`` in the type in which it is kept. Each element takes 16 random bits of its own, see :class:`Rounding`."""
    if rounding is None or dtype not in (torch.bfloat16, torch.int8) or not x.numel():
        return x.to(dtype)
    lines = x.float().contiguous().view(math.prod(x.shape[: split(x.shape)]), -1)
    noise = [_noise(*rounding, step, half, row, lines.shape[1]) for row in range(len(lines))]
    rounded = _bfloat16 if dtype == torch.bfloat16 else _code
    values = [list(map(rounded, *pair)) for pair in zip(lines.tolist(), noise, strict=True)]
    return x.new_tensor(values, dtype=torch.float32).view(x.shape).to(dtype)


@functools.cache
def _noise(seed: int, number: int, step: int, half: int, row: int, columns: int) -> list[int]:
    """16 random bits for each element of a row: half of a word, or, with ``half=1``, the other half."""
    noise = []
    for column in range(columns):
        words = philox((column // 8, row, number, step), (seed % 2**32, seed // 2**32))
        noise.append(words[column % 8 // 2] // 2 ** (16 * ((column + half) % 2)) % 2**16)
    return noise


@functools.cache
def code_values() -> list[float]:
    """The value of each code of momentum: of 0 to 127, and then of -128 (NaN) to -1, as Python counts from the end.

    Example:
        >>> values = code_values()
        >>> values[0], values[15] * 2**10, values[16] * 2**6, values[112], values[127], values[-112]
        (0.0, 15.0, 1.0, 1.0, 1.9375, -1.0)
    """
    values = [c / 2**10 if c < 16 else (16 + c % 16) * 2.0 ** (c // 16 - 11) for c in range(128)]
    return [*values, math.nan, *(-value for value in values[:0:-1])]


def _code(x: float, noise: int) -> int:
    """The code of one of the two neighbours of ``x``: the longer one if the noise carries over."""
    if math.isnan(x):
        return -128
    values = code_values()[:128]
    low = bisect(values, abs(x)) - 1
    if low < 127:
        low += math.floor(2**16 * (abs(x) - values[low]) / (values[low + 1] - values[low])) + noise >= 2**16
    return low if x >= 0 else -low


def _bfloat16(x: float, noise: int) -> float:
    """A value that bfloat16 can represent: the 16 bits that are dropped carry over if the noise makes them."""
    if math.isnan(x):
        return x
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    (rounded,) = struct.unpack("<f", struct.pack("<I", (bits + noise) // 2**16 * 2**16))
    return float(rounded)


def square_unit(numel: int) -> float:
    """How many units make a square of 1: ``numel`` squares of a length of 32 add up to at most ``2^62``."""
    return 2.0 ** (62 - math.ceil(math.log2(max(1, numel)))) / 32**2


def square_grain(mean: float, unit: float) -> float:
    """What squares are rounded up to multiples of: a part of the mean square so far, but no less than a unit.

    Example:
        >>> square_grain(0.01, unit=2.0**40) == 2**-7 / 512, square_grain(0.01, unit=2.0**8) == 1 / 256
        (True, True)
    """
    power = 2.0 ** (math.frexp(mean)[1] - 1)
    return max(min(power * 2**14, 2 * 32.0**2) / 2**23, 1 / unit)


def split(shape: Sequence[int]) -> int:
    """How many dimensions count the rows, where the others count the columns: the shorter side is then longest.

    Example:
        >>> split((8, 100, 200)), split((100, 8, 200)), split((200, 100, 3, 3)), split((5,))
        (2, 2, 1, 0)
    """
    return max(range(len(shape)), key=lambda s: min(math.prod(shape[:s]), math.prod(shape[s:])) if s else -1, default=0)


def cover_sets(shape: Sequence[int], block: int) -> list[list[int]]:
    """The elements that an entry covers are a box: its lengths, for accumulators of rows, of columns and of tiles.

    Rows and columns are cut into blocks of ``B`` at most, in boxes: of whole last dimensions as far as they go, then of
    as many indices of the next one as there is room for. Of less than two dimensions each element has an entry.

    Example:
        >>> cover_sets((100, 200), 64), cover_sets((90, 80, 3, 3), 64), cover_sets((9, 100, 90), 64)[2]
        ([[1, 64], [64, 1], [64, 64]], [[1, 7, 3, 3], [64, 1, 1, 1], [64, 7, 3, 3]], [1, 64, 64])
    """
    k, s = len(shape), split(shape)
    if k < 2:
        return [[1] * k]
    tile = [1] * k
    for side in (range(s), range(s, k)):
        room = block
        for d in reversed(side):
            tile[d] = max(1, min(shape[d], room))
            room //= tile[d]
    return [[1] * s + tile[s:], tile[:s] + [1] * (k - s), tile]


def _along(accumulator: Tensor, i: int, shape: torch.Size, block: int | None) -> Tensor:
    """The entry of ``mu_i`` that covers each element, or what broadcasts to it."""
    if block is None:
        return accumulator.view([-1 if d == i else 1 for d in range(len(shape))])
    for d, (n, length) in enumerate(zip(shape, cover_sets(shape, block)[i], strict=True)):
        accumulator = accumulator.repeat_interleave(length, d).narrow(d, 0, n)
    return accumulator


def _maximum(nu: Tensor, i: int, block: int | None) -> Tensor:
    """``mu_i(r)``: the largest ``nu(j)`` with ``j_i = r``; with blocks, in each set that it covers."""
    if nu.dim() < 2:
        return nu
    if block is not None:
        for d, length in enumerate(cover_sets(nu.shape, block)[i]):
            nu = torch.stack([part.amax(d) for part in nu.split(length, d)], d)
        return nu
    return nu.movedim(i, 0).flatten(1).amax(1)
