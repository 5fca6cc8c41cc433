"""The cover of a tensor: which accumulator entries speak for which of its elements.

SM3 keeps, for a tensor of shape ``(n_1, …, n_k)``, one accumulator per dimension. Entry ``r`` of accumulator ``i``
covers the elements ``{j : j_i = r}`` (a row of a matrix for ``i = 0``, a column for ``i = 1``). With block covers every
other dimension is cut into blocks of ``B`` indices, and an entry covers one block of the row or column. One more
accumulator, number ``k``, then covers the tiles: it cuts all dimensions into blocks. (Its entries bound all others in
their tile, so that the minimum over the accumulators is what it is without; ``cover_product`` needs them.)

Seen as an array over cover sets, accumulator ``i`` has ``k`` dimensions: its *grid*, of length ``n_i`` in dimension
``i`` and of 1 (``ceil(n_d / B)`` with block covers) in every other dimension ``d``. A box of the tensor touches a
rectangle of every grid, and that rectangle is all that a rank which holds the box needs to store.

Cutting *every* other dimension gives one family for tensors of any rank: ``B = 1`` is the full second moment,
``B >= max(n_d)`` the paper's slices, and what lies between depends on the shape of the tensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from sm3_dist.layout.box import Box


def accumulator_count(shape: Sequence[int], block: int | None) -> int:
    """How many accumulators a tensor has.

    Example:
        >>> accumulator_count((4, 5), None), accumulator_count((4, 5), 2), accumulator_count((4,), 2)
        (2, 3, 1)
    """
    return len(shape) + (block is not None and len(shape) > 1)


def grid(shape: Sequence[int], i: int, block: int | None = None) -> tuple[int, ...]:
    """Shape of accumulator ``i`` as an array over cover sets.

    Args:
        shape: shape of the tensor.
        i: the dimension whose indices are told apart; ``k`` for the tiles.
        block: ``B``, or ``None`` for covers that are whole slices.

    Example:
        >>> grid((4, 5, 6), 1)
        (1, 5, 1)
        >>> grid((4, 5), 0, block=2), grid((4, 5), 1, block=2), grid((4, 5), 2, block=2)
        ((4, 3), (2, 5), (2, 3))
    """
    return touched(Box.whole(shape), i, block).stop


def touched(box: Box, i: int, block: int | None = None) -> Box:
    """The rectangle of the grid of accumulator ``i`` that holds the cover sets of the elements of ``box``.

    Example:
        >>> touched(Box((2, 0), (4, 5)), 0)
        Box(start=(2, 0), stop=(4, 1))
        >>> touched(Box((2, 1), (4, 5)), 0, block=2)
        Box(start=(2, 0), stop=(4, 3))
    """
    sides = [
        (a, b) if d == i else (0, 1) if block is None else (a // block, -(-b // block) if a < b else a // block)
        for d, (a, b) in enumerate(zip(box.start, box.stop, strict=True))
    ]
    return Box(tuple(a for a, _ in sides), tuple(b for _, b in sides))


def spread(cover: Tensor, box: Box, i: int, block: int | None) -> Tensor:
    """The entry that covers each element of ``box``: of the shape of the box, or one that broadcasts to it.

    Args:
        cover: the entries that the box touches, of shape ``touched(box, i, block).shape``.
        box: the elements.
        i: which accumulator it is.
        block: ``B``, or ``None``.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1.0, 2.0]]), Box((0, 1), (1, 4)), 0, block=2)
        tensor([[1., 2., 2.]])
    """
    if block is None:
        return cover
    for d, (a, b) in enumerate(zip(box.start, box.stop, strict=True)):
        if d != i and cover.shape[d] > 1:  # one block broadcasts as it is
            repeated = cover.unsqueeze(d + 1).expand(*cover.shape[: d + 1], block, *cover.shape[d + 1 :])
            cover = repeated.flatten(d, d + 1).narrow(d, a % block, b - a)
    return cover


def maxima(values: Tensor, box: Box, i: int, block: int | None) -> Tensor:
    """The largest value in each cover set: of shape ``touched(box, i, block).shape``.

    Args:
        values: non-negative, one for each element of ``box`` and of its shape.
        box: the elements.
        i: which accumulator it is.
        block: ``B``, or ``None``.

    Example:
        >>> import torch
        >>> maxima(torch.tensor([[1.0, 3.0, 2.0]]), Box((0, 1), (1, 4)), 0, block=2)
        tensor([[1., 3.]])
    """
    whole = [d for d in range(values.dim()) if d != i and touched(box, i, block).shape[d] == 1]
    if whole:
        values = values.amax(whole, keepdim=True)
    for d in range(values.dim()):
        if d != i and d not in whole:
            assert block is not None
            before, after = box.start[d] % block, -box.stop[d] % block
            if before or after:  # 0 is the identity of MAX
                values = pad(values, (0, 0) * (values.dim() - 1 - d) + (before, after))
            values = values.unflatten(d, (-1, block)).amax(d + 1)
    return values
