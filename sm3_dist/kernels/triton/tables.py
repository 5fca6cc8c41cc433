"""Tables on the device that the host writes, and seldom: it neither waits for the device nor breaks a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Table:
    """Numbers on the device that are written when they change.

    A CUDA graph gets a table of its own, for its gradients stay where they were when it was captured, whatever steps
    are taken outside of it. It is filled from pinned memory that nobody else writes to, every time that it is replayed.

    Args:
        length: how many numbers.
        dtype: their type.
        device: where they are to lie.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.zeros(length, dtype=dtype, device=device)
        self._written: list[float] = []
        self._of_graphs: list[tuple[Tensor, Tensor]] = []
        self._spare: Tensor | None = self._staged()

    def written(self, numbers: Sequence[float]) -> Tensor:
        """The table with these numbers in it."""
        if capturing(self._values.device):
            staged = self._spare if self._spare is not None else self._staged()
            self._spare = None  # (another cannot be had during capture)
            assert staged is not None
            values = torch.empty_like(self._values)
            values.copy_(_filled(staged, numbers), non_blocking=True)
            self._of_graphs.append((staged, values))
            return values
        if self._spare is None:
            self._spare = self._staged()
        if numbers != self._written:
            staged = self._staged()
            self._values.copy_(_filled(staged, numbers), non_blocking=True)
            self._written = list(numbers)
        return self._values

    def _staged(self) -> Tensor:
        """Memory to copy from, which may be dropped when the copy is under way."""
        values = self._values
        return torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.device.type == "cuda")


def _filled(staged: Tensor, numbers: Sequence[float]) -> Tensor:
    return staged.copy_(torch.tensor(numbers, dtype=staged.dtype, device="cpu"))
