"""Meters: the most memory that this process has held since a moment, on its CPU or on its GPU."""

from __future__ import annotations

import gc
from typing import Protocol

import torch

from launch.footprint.resident import forget_peak, peak, resident


class Meter(Protocol):
    """What is asked twice."""

    def begin(self) -> None:
        """Count from here on."""

    def above(self) -> int:
        """The most bytes since then, beyond those of then."""


class Resident:
    """Memory that the kernel counts as resident."""

    def begin(self) -> None:
        gc.collect()
        self._base = resident()
        forget_peak()

    def above(self) -> int:
        return peak() - self._base


class Allocated:
    """Memory of the GPU that tensors have. What PyTorch's allocator holds in reserve is not counted."""

    def begin(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def above(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._base


METERS: dict[str, type[Resident | Allocated]] = {"cpu": Resident, "cuda": Allocated}
