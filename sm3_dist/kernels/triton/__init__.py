"""The Triton backend: the kernel, how tensors are cut into tiles for it, and what launches it.

Importing triton takes 0.4 s and 70 MB. Here stands what can be said without, and imports it for the first tensor that
needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sm3_dist.kernels.triton.availability import unavailable
from sm3_dist.step.entry import Entry

if TYPE_CHECKING:
    from sm3_dist.kernels.triton.averages import AveragesKernel
    from sm3_dist.kernels.triton.backend import TritonKernel


__all__ = ["make", "make_averages", "refusal", "unavailable"]


def refusal(entry: Entry) -> str | None:
    """Why the Triton backend cannot step this tensor; ``None`` if it can."""
    if (reason := unavailable()) is not None:
        return reason
    from sm3_dist.kernels.triton import backend

    return backend.refusal(entry)


def make(entries: Sequence[Entry]) -> TritonKernel:
    """The kernel of tensors that :func:`refusal` has no objection to, all on one device."""
    from sm3_dist.kernels.triton import backend

    return backend.TritonKernel(entries)


def make_averages(count: int, device: torch.device) -> AveragesKernel | None:
    """What brings moving averages on a GPU up to date; ``None`` where Triton cannot."""
    if device.type != "cuda" or unavailable() is not None:
        return None
    from sm3_dist.kernels.triton.averages import AveragesKernel

    return AveragesKernel(count, device)
