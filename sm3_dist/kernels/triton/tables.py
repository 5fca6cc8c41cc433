"""Tables on the device that the host writes, and seldom: it neither waits for the device nor breaks a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sm3_dist.step import capture

GRAPHS = 8
"""So many CUDA graphs can be captured without a step outside of them in between: memory is not pinned meanwhile."""


class Table:
    """Numbers on the device that are written when they change.

    A CUDA graph gets a table of its own, for its gradients stay where they were when it was captured, whatever steps
    are taken outside of it. It is filled from pinned memory that nobody else writes to, every time that it is replayed.
    Who has a graph captured keeps ``of_graphs`` as long as the graph may be replayed.

    Args:
        length: how many numbers.
        dtype: their type.
        device: where they are to lie.

    Attributes:
        of_graphs: for each graph the pinned memory, and the table that is filled from it.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.zeros(length, dtype=dtype, device=device)
        self._written: list[float] = []
        self.of_graphs: list[tuple[Tensor, Tensor]] = []
        self._spare = self._staged(GRAPHS)

    def written(self, numbers: Sequence[float]) -> Tensor:
        """The table with these numbers in it."""
        if capture.capturing(self._values.device):
            if not self._spare:
                raise RuntimeError(
                    f"{GRAPHS} CUDA graphs were captured with a step of SM3 in each, and no step was taken outside of "
                    "them. Take one (the warm-up on a side stream, as torch.cuda.graph asks for) before the next."
                )
            staged, values = self._spare.pop(), torch.empty_like(self._values)
            values.copy_(_filled(staged, numbers), non_blocking=True)
            self.of_graphs.append((staged, values))
            return values
        if len(self._spare) < GRAPHS:
            self._spare = self._staged(GRAPHS)
        if numbers != self._written:
            (staged,) = self._staged(1)
            self._values.copy_(_filled(staged, numbers), non_blocking=True)
            self._written = list(numbers)
        return self._values

    def _staged(self, count: int) -> list[Tensor]:
        """Memory to copy from, which may be dropped when the copy is under way."""
        shape, on_gpu = (count, *self._values.shape), self._values.device.type == "cuda"
        return list(torch.empty(shape, dtype=self._values.dtype, device="cpu", pin_memory=on_gpu).unbind())


def _filled(staged: Tensor, numbers: Sequence[float]) -> Tensor:
    return staged.copy_(torch.tensor(numbers, dtype=staged.dtype, device="cpu"))
