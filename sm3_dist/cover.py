"""The cover of a tensor: which accumulator entries speak for which of its elements.

SM3 keeps, for a tensor of shape ``(n_1, …, n_k)``, one accumulator per dimension. Entry ``r`` of accumulator ``i``
covers the elements ``{j : j_i = r}`` (a row of a matrix for ``i = 0``, a column for ``i = 1``). Seen as an array over
cover sets, accumulator ``i`` has ``k`` dimensions of lengths ``(1, …, n_i, …, 1)``: its *grid*. A box of the tensor
touches a rectangle of every grid, and that rectangle is all that a rank which holds the box needs to store.
"""

from __future__ import annotations

from collections.abc import Sequence

from sm3_dist.box import Box


def grid(shape: Sequence[int], i: int) -> tuple[int, ...]:
    """Shape of accumulator ``i`` as an array over cover sets.

    Example:
        >>> grid((4, 5, 6), 1)
        (1, 5, 1)
    """
    return tuple(n if d == i else 1 for d, n in enumerate(shape))


def touched(box: Box, i: int) -> Box:
    """The rectangle of the grid of accumulator ``i`` that holds the cover sets of the elements of ``box``.

    Example:
        >>> touched(Box((2, 0), (4, 5)), 0)
        Box(start=(2, 0), stop=(4, 1))
    """
    start = tuple(a if d == i else 0 for d, a in enumerate(box.start))
    stop = tuple(b if d == i else 1 for d, b in enumerate(box.stop))
    return Box(start, stop)
