"""Whether Triton kernels can run here, said without importing triton."""

from __future__ import annotations

import importlib.util
import os

import torch


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
