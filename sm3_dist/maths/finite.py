"""Whether gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sm3_dist.compiled.search import search


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Which of some tensors have an element that is NaN or infinite: int32, 1 for those, on their device.

    One pass over each, which reads and does not write.

    Args:
        tensors: of floating types, all on one device.

    Example:
        >>> not_finite([torch.ones(2, 3), torch.tensor([1.0, torch.nan]), torch.empty(0)]).tolist()
        [0, 1, 0]
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type != "cpu":
        return _by_torch(tensors, device)
    flags, left = search(tensors)
    if left:
        flags[list(left)] = _by_torch([tensors[k] for k in left], device)
    return flags


def _by_torch(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    largest = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    of_type: dict[torch.dtype, list[int]] = {}
    for k, tensor in enumerate(tensors):
        if tensor.numel():
            of_type.setdefault(tensor.dtype, []).append(k)
    for these in of_type.values():
        found = _largest([tensors[k] for k in these]).double()
        if len(these) == len(tensors):
            largest = found
        else:
            largest[torch.tensor(these, dtype=torch.int64, device="cpu").to(device, non_blocking=True)] = found
    return (~largest.isfinite()).int()


def _largest(tensors: list[Tensor]) -> Tensor:
    """What is NaN or infinite where an element of a tensor is: its largest absolute value."""
    if tensors[0].device.type != "cpu":  # in a few launches for all of them; on a CPU it takes twenty times as long
        return torch.stack(torch._foreach_norm(tensors, math.inf))
    ends = [torch.stack(torch.aminmax(tensor)) for tensor in tensors]
    return torch.stack(ends).abs().amax(1)
