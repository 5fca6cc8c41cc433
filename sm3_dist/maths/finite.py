"""Whether gradients are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Which of some tensors have an element that is NaN or infinite: int32, 1 for those, on their device.

    One pass over each, which reads and does not write: the least and the largest element are NaN where any is.

    Args:
        tensors: of floating types, all on one device.

    Example:
        >>> not_finite([torch.ones(2, 3), torch.tensor([1.0, torch.nan]), torch.empty(0)]).tolist()
        [0, 1, 0]
    """
    found = torch.zeros(len(tensors), dtype=torch.int32, device=tensors[0].device if tensors else "cpu")
    filled = [k for k, tensor in enumerate(tensors) if tensor.numel()]
    if filled:
        ends = torch.stack([torch.stack(torch.aminmax(tensors[k])).double() for k in filled])
        found[filled] = (~ends.isfinite()).any(1).int()
    return found
