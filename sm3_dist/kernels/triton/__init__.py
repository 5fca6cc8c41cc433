"""The Triton backend: the kernel, how tensors are cut into tiles for it, and what launches it.

Importing triton takes 0.4 s and 70 MB. Here stands what can be said without, and imports it for the first tensor that
needs it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sm3_dist.step.entry import Entry

if TYPE_CHECKING:
    from sm3_dist.kernels.triton.backend import TritonKernel


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: the environment says ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """Why the Triton kernel cannot be used; ``None`` if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. Install it: pip install triton."
    if not interpreting() and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    return None


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
