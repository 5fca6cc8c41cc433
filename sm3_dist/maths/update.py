"""SM3-II on the boxes of one tensor, in eager PyTorch: the definition that every kernel must match to the bit.

Every line rounds once, in IEEE arithmetic, in the order written here; nothing is fused. Elements do not depend on one
another but through maxima, which are exact in any order, so neither the boxes nor the chunks they are worked through in
can be seen in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import blocks, maxima, spread
from sm3_dist.layout.shard import LocalShard
from sm3_dist.maths.momentum_code import decode
from sm3_dist.maths.rms import SquareSum
from sm3_dist.maths.rounding import MOMENTUM, WEIGHT, Noise, Rounding

CHUNK_BYTES = 1 << 19
"""Size of one temporary. A handful of them is alive at a time: they stay in cache, and below 4 MB together."""


@dataclass(frozen=True)
class Settings:
    """What one step needs to know of a tensor. Symbols as in the paper (arXiv 1901.11150).

    Attributes:
        nesterov: look ahead: the update is ``momentum * m + (1 - momentum) * u`` with the new ``m``.
        cover_product: estimate from the product of the accumulators and not from their minimum.
        old: what the estimate from the covers is multiplied with in ``nu``, ``beta`` or 1. A float or a 0-dimensional
            tensor of the type and device of the accumulators.
        new: likewise the squared gradient, ``1 - beta`` or 1.
        scale: what the update is multiplied with before momentum; ``None``: :attr:`fresh`. A float or a 0-dimensional
            tensor of the type and device of the accumulators.
        carrier: the power of 2 by which squares are added up, see ``rms.py``; ``None``: they are not.
        limit: where it is then cut off either way.
        unscale: what gradients are multiplied with first, the inverse of the loss scale; ``None``: nothing.
        rounding: how values are rounded to bfloat16 and to 8 bits; ``None``: to the nearest, as all other types are.
    """

    lr: float | Tensor
    momentum: float
    eps: float
    weight_decay: float
    maximize: bool
    nesterov: bool = False
    cover_product: bool = False
    old: float | Tensor = 1.0
    new: float | Tensor = 1.0
    scale: float | Tensor | None = None
    carrier: Tensor | None = None
    limit: float = math.inf
    unscale: float | Tensor | None = None
    rounding: Rounding | None = None

    @property
    def direction(self) -> float:
        """-1 up the gradient, 1 down."""
        return -1.0 if self.maximize else 1.0

    @property
    def fresh(self) -> float:
        """What of an update goes into the momentum, with the sign of the direction."""
        return self.direction * (1 - self.momentum)


def update_box(
    weight: Tensor,
    grad: Tensor,
    covers: Sequence[Tensor],
    momentum_buffer: Tensor | None,
    settings: Settings,
    squares: SquareSum | None = None,
    box: Box | None = None,
) -> Tensor:
    """Take one SM3-II step on one box.

    Args:
        weight: shape ``(n_1, …, n_k)``, any floating type; updated in place.
        grad: same shape, any floating type.
        covers: old accumulators, number ``i`` of shape ``(1, …, n_i, …, 1)`` or another that broadcasts to that of
            ``weight``, float32 (float64 for float64 weights).
        momentum_buffer: same shape as ``weight``; updated in place. int8: codes, which need ``settings.rounding``.
            ``None`` where momentum is 0.
        settings: the hyperparameters.
        squares: adds up the squares of the update before it is scaled; ``None``: nobody asks.
        box: which elements of the original tensor these are; ``None`` without ``settings.rounding``.

    Returns:
        ``nu``, of the shape of ``weight`` and the type of the accumulators; the new accumulators are its maxima.
    """
    s = settings
    grad = grad.to(covers[0].dtype)
    if s.unscale is not None:
        grad = grad * s.unscale
    floor = _product(covers, s.old) if s.cover_product and len(covers) > 1 else _minimum(covers) * s.old
    nu = (grad * grad).mul_(s.new).add_(floor)
    update = _inverse_root(nu + s.eps).mul_(grad)
    if squares is not None and s.carrier is not None:
        squares.add(update, s.carrier)
    update.mul_(s.fresh if s.scale is None else s.scale)
    if s.limit < math.inf:
        update.clamp_(-s.limit, s.limit)
    noise = None
    if s.rounding is not None:
        assert box is not None
        noise = s.rounding.noise(box, nu.device)
    if momentum_buffer is not None:
        stored = decode(momentum_buffer) if momentum_buffer.dtype == torch.int8 else momentum_buffer
        moment = stored.to(nu.dtype)
        moment.mul_(s.momentum).add_(update)
        if moment is not momentum_buffer:
            _store(momentum_buffer, moment, MOMENTUM, noise)
        if s.nesterov:
            update.add_(moment * s.momentum)
        else:
            update.copy_(moment)
    wide = weight.to(nu.dtype)
    if s.weight_decay:
        wide.mul_(1 - s.lr * s.weight_decay)
    wide.sub_(update.mul_(s.lr))
    if wide is not weight:
        _store(weight, wide, WEIGHT, noise)
    return nu


def _minimum(covers: Sequence[Tensor]) -> Tensor:
    """``min_i mu_i(j_i)``: no element's sum or average is larger than that of any set that covers it."""
    floor = covers[0]
    for cover in covers[1:]:
        floor = torch.minimum(floor, cover)
    return floor


def _product(covers: Sequence[Tensor], old: float | Tensor) -> Tensor:
    """``mu_0(j_0) * (mu_1(j_1) / mu_2 * old)``, where ``mu_2`` is that of the tile; for a row's factor is its own.

    In a tile whose values are products of a row's factor and a column's this is the value itself, where the minimum is
    that of the larger factor. It is no larger than the minimum.

    An entry is infinite after a finite gradient whose square is not. It counts as the largest finite number, lest the
    product be NaN: ``inf / inf``, or ``inf * 0`` beside it. NaN stays NaN.
    """
    row, column, tile = covers
    limits = torch.finfo(tile.dtype)
    return row.clamp(max=limits.max) * (column.clamp(max=limits.max) / tile.clamp(limits.tiny, limits.max) * old)


def _inverse_root(x: Tensor) -> Tensor:
    """``1 / sqrt(x)``, each rounded to nearest, in place.

    On the CPU that is what ``rsqrt`` does, and not ``sqrt``, which takes a shortcut; on CUDA it is the other way round.
    """
    return x.sqrt_().reciprocal_() if x.is_cuda else x.rsqrt_()


def update_shard(
    shard: LocalShard,
    weight: Tensor,
    grad: Tensor,
    accumulators: Sequence[Tensor],
    momentum_buffer: Tensor | None,
    settings: Settings,
    squares: SquareSum | None = None,
) -> None:
    """Take one step on every box of a shard, and overwrite the accumulators with the new maxima.

    The tensor is swept in strips along one axis. Entries that no other strip touches are overwritten as the sweep
    passes; the others are gathered on the side until its end, for the rest of the sweep needs the old values. The first
    kind are those of the axis' own accumulator; with block covers all, for strips end where blocks end. The axis is the
    first one, along which memory is contiguous, unless what must be kept on the side would be large.

    Args:
        shard: the boxes.
        weight: the local tensor; updated in place.
        grad: of the shape of ``weight``.
        accumulators: this rank's part of accumulator ``i``, of shape ``shard.stored[i].shape``; updated in place.
        momentum_buffer: laid out as ``shard.state_views`` says, updated in place; ``None`` where momentum is 0.
        settings: the hyperparameters.
        squares: adds up the squares of the update before it is scaled; ``None``: nobody asks.
    """
    limit = CHUNK_BYTES // accumulators[0].element_size()
    block = shard.cover_block
    axis, multiple = _sweep_axis(shard.extent.shape, limit), 1
    if block is not None:
        axis, multiple = 0, blocks(shard.shape, block)[0]
    weights, grads = shard.views(weight), shard.views(grad)
    moments: Sequence[Tensor | None] = [None] * len(shard.boxes)
    if momentum_buffer is not None:
        moments = shard.state_views(momentum_buffer)
    aside = {} if block is not None else {i: torch.zeros_like(a) for i, a in enumerate(accumulators) if i != axis}
    for strip in _strips(shard.extent, axis, limit, multiple):
        swept = [shard.touched(strip, i) for i in range(len(accumulators))]
        new = [aside[i] if i in aside else a.new_zeros(swept[i].shape) for i, a in enumerate(accumulators)]
        for box, w, g, m in zip(shard.boxes, weights, grads, moments, strict=True):
            for chunk in (box & strip).chunks(limit):
                at = chunk.within(box)
                rects = [shard.touched(chunk, i) for i in range(len(accumulators))]
                covers = [
                    spread(acc[rects[i].within(shard.stored[i])], chunk, shard.cells[i])
                    for i, acc in enumerate(accumulators)
                ]
                nu = update_box(w[at], g[at], covers, None if m is None else m[at], settings, squares, chunk)
                for i, maximum in enumerate(new):
                    part = maximum[rects[i].within(swept[i])]
                    torch.maximum(part, maxima(nu, chunk, shard.cells[i]), out=part)
        for i, acc in enumerate(accumulators):
            if i not in aside:
                acc[swept[i].within(shard.stored[i])] = new[i]
    for i, maximum in aside.items():
        accumulators[i].copy_(maximum)


def update_rows(weight: Tensor, grad: Tensor, accumulators: Sequence[Tensor], settings: Settings) -> None:
    """Take one step on the rows that a sparse gradient has values for; the cover is the rows alone.

    Duplicate indices are summed first. Other rows and their accumulators stay as they are, weight decay included, and
    momentum is ignored: updates are taken whole. The accumulators of the other dimensions are raised where need be, so
    that they remain upper bounds should a dense gradient follow.

    Args:
        weight: the whole tensor, shape ``(n_1, …, n_k)``; updated in place.
        grad: a sparse COO tensor of that shape.
        accumulators: accumulator ``i`` of shape ``(1, …, n_i, …, 1)``; updated in place.
        settings: the hyperparameters; ``momentum`` is not used.
    """
    grad = grad.coalesce()
    indices, values = grad.indices(), grad.values()
    if values.numel() == 0:
        return
    sparse_dim = grad.sparse_dim()
    row_accumulator = accumulators[0].view(-1)
    rows, row_of = torch.unique_consecutive(indices[0], return_inverse=True)
    maxima = row_accumulator.new_zeros(len(rows))
    limit = CHUNK_BYTES // accumulators[0].element_size()
    step = max(1, limit * len(values) // values.numel())
    for at in (slice(a, a + step) for a in range(0, len(values), step)):
        index = tuple(indices[:, at])
        w = weight[index]
        cover = row_accumulator[index[0]].view(-1, *[1] * (values.dim() - 1))
        nu = update_box(w, values[at], [cover], None, settings)
        weight[index] = w
        per_value = nu.flatten(1).amax(1) if nu.dim() > 1 else nu
        maxima.scatter_reduce_(0, row_of[at], per_value, "amax")
        for i in range(1, sparse_dim):
            accumulators[i].view(-1).scatter_reduce_(0, index[i], per_value, "amax")
        for i in range(sparse_dim, weight.dim()):
            other = accumulators[i].view(-1)
            torch.maximum(other, nu.movedim(i - sparse_dim + 1, 0).flatten(1).amax(1), out=other)
    row_accumulator[rows] = maxima


def _store(target: Tensor, values: Tensor, what: int, noise: Noise | None) -> None:
    if noise is None:
        assert target.dtype != torch.int8
        target.copy_(values)
    else:
        noise.store(target, values, what)


def _sweep_axis(shape: Sequence[int], limit: int) -> int:
    if sum(shape[1:]) <= limit or 0 in shape:  # (nothing may depend on the size of what has no elements)
        return 0
    return max(range(len(shape)), key=lambda d: shape[d])


def _strips(extent: Box, axis: int, limit: int, multiple: int) -> list[Box]:
    """Strips of about ``limit`` elements, which end at multiples of ``multiple`` in the coordinates of the tensor."""
    if extent.numel == 0:
        return []
    step = max(1, limit * extent.shape[axis] // extent.numel)
    step = -(-step // multiple) * multiple
    starts = range(extent.start[axis] // multiple * multiple, extent.stop[axis], step)
    return [extent.along(axis, start, start + step) for start in starts]
