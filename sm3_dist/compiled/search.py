"""Search: which of thousands of tensors have an element that is NaN or infinite, asked of the library in one call.

PyTorch takes some microseconds for each tensor, however small: together more than a step of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sm3_dist.compiled.library import MAX_THREADS, functions_of_torch, integers, library, looks, parallel, place_of

_FIELDS, _TYPE, _UNKNOWN = 3, 2, 3
"""Of ``struct run``: how many there are, 64 bits each, which one is the type, and what it is where there is none."""


def search(tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[int]]:
    """Which have an element that is NaN or infinite, and which are left for PyTorch to look at.

    Left are those of other types than float32, bfloat16 and float16, or whose elements are not side by side, and all
    where there is no library.

    Args:
        tensors: plain ones, on a CPU.

    Returns:
        int32, 1 for those that have one, 0 for others and for what is left; the numbers of what is left.

    Example:
        >>> flags, left = search([torch.tensor([1.0, torch.inf]), torch.ones(2), torch.ones(2, dtype=torch.float64)])
        >>> 2 in left
        True
    """
    flags = torch.zeros(len(tensors), dtype=torch.int32, device="cpu")
    found, locked = library(), looks()
    if isinstance(found, str) or locked is None:
        return flags, range(len(tensors))
    objects, runs = integers(map(id, tensors)), integers([0]) * (_FIELDS * len(tensors))
    left = locked.sm3_runs(place_of(functions_of_torch()), place_of(objects), len(tensors), place_of(runs))
    threads = min(torch.get_num_threads(), MAX_THREADS)
    found.sm3_not_finite(place_of(runs), len(tensors), flags.data_ptr(), threads, parallel(os.getpid()))
    types = runs[_TYPE::_FIELDS]
    return flags, [k for k, of in enumerate(types) if of == _UNKNOWN] if left else ()
