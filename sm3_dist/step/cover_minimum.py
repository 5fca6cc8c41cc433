"""The minimum of the covers: accumulators in the shape of their parameter, and back, to the bit.

Torch's FSDP1 and fairscale's take every tensor in an optimizer's state for one of the shape of the parameter: they
flatten, pad, gather and cut it as they do the parameter. Accumulators have other shapes, but their minimum
``min_i mu_i(j_i)`` at each element ``j`` has that of the parameter, and they are its maxima: for each entry ``r`` of
``mu_i`` there is an element whose ``nu`` it was, and no other accumulator is smaller there.

Values are compared as integers of the same bits, as in :mod:`~sm3_dist.ranks.bucket`: so a NaN stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sm3_dist.layout.cover import maxima, spread
from sm3_dist.layout.shard import LocalShard
from sm3_dist.ranks.bucket import BITS


def write_minimum(shard: LocalShard, accumulators: Sequence[Tensor], minimum: Tensor) -> None:
    """Write the minimum at each element that this rank holds.

    Args:
        shard: what it holds.
        accumulators: this rank's part of accumulator ``i``, of shape ``shard.stored[i].shape``.
        minimum: laid out like the parameter's momentum; written to.

    Example:
        >>> from sm3_dist.layout.box import Box
        >>> shard = LocalShard((2, 3), (Box.whole((2, 3)),))
        >>> minimum = torch.zeros(2, 3)
        >>> write_minimum(shard, [torch.tensor([[5.0], [2.0]]), torch.tensor([[5.0, 1.0, 2.0]])], minimum)
        >>> minimum
        tensor([[5., 1., 2.],
                [2., 1., 2.]])
        >>> read_minimum(shard, minimum)
        [tensor([[5.],
                [2.]]), tensor([[5., 1., 2.]])]
    """
    for box, view in zip(shard.boxes, shard.state_views(minimum), strict=True):
        lowest = view.view(BITS[view.dtype])
        lowest.fill_(torch.iinfo(lowest.dtype).max)
        for i, accumulator in enumerate(accumulators):
            covers = accumulator[shard.touched(box, i).within(shard.stored[i])].view(lowest.dtype)
            torch.minimum(lowest, spread(covers, box, shard.cells[i]), out=lowest)


def read_minimum(shard: LocalShard, minimum: Tensor) -> list[Tensor]:
    """The accumulators, as far as the elements that this rank holds tell; entries of cut tensors are yet to be shared.

    Args:
        shard: what it holds.
        minimum: laid out like the parameter's momentum.

    Returns:
        Accumulator ``i`` of shape ``shard.stored[i].shape``, of the type of ``minimum``.
    """
    found = [minimum.new_zeros(stored.shape) for stored in shard.stored]
    for box, view in zip(shard.boxes, shard.state_views(minimum), strict=True):
        values = view.view(BITS[view.dtype])
        for i, accumulator in enumerate(found):
            part = accumulator.view(values.dtype)[shard.touched(box, i).within(shard.stored[i])]
            torch.maximum(part, maxima(values, box, shard.cells[i]), out=part)
    return found
