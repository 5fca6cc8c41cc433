"""Findings: what a GPU found out in one step, which the host reads some steps later and so need not wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

LAG = 2
"""How many steps later the host looks at what a GPU found."""
Note = TypeVar("Note")


class Findings(Generic[Note]):
    """Small tensors, one in each step, that the host is to look at.

    Args:
        device: where they lie. What lies on the host can be looked at in the same step.

    Example:
        >>> import torch
        >>> findings = Findings[str](torch.device("cpu"))
        >>> findings.add(torch.tensor([1, 2]), "first")
        >>> [(found.tolist(), note) for found, note in findings.due()]
        [([1, 2], 'first')]
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._lag = LAG if self._on_gpu else 0
        self._found: deque[tuple[Tensor, Note, torch.cuda.Event | None]] = deque()

    def add(self, found: Tensor, note: Note) -> None:
        """Send a tensor to the host, with what the host knows of it already."""
        event = None
        if self._on_gpu:
            pinned = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True)
            found, event = pinned.copy_(found, non_blocking=True), torch.cuda.Event()
            event.record()
        self._found.append((found, note, event))

    def due(self) -> Iterator[tuple[Tensor, Note]]:
        """Those that should have come by now, on the host, the oldest first."""
        while len(self._found) > self._lag:
            found, note, event = self._found.popleft()
            if event is not None:
                event.synchronize()
            yield found, note
