"""CUDA graphs: a captured step is launched again without Python, on the memory that it was captured with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sm3_dist.layout.describe import local_tensor


def capturing(device: torch.device) -> bool:
    """Whether what is launched on this device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_to_plan(params: Iterable[Tensor]) -> None:
    """Raise where a graph is being captured and there is something to write down first.

    Raises:
        RuntimeError: says what to do.
    """
    if any(capturing(device) for device in {local_tensor(param).device for param in params}):
        raise RuntimeError(
            "a CUDA graph is being captured, but SM3 must first write down where its tensors lie. Take a step (or a "
            "few, as torch.cuda.graph's warm-up on a side stream) with the same parameters and options before."
        )
