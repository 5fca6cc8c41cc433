"""The eager backend: one tensor after another, by the functions of ``update.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sm3_dist.step_plan import Entry
    from sm3_dist.update import Settings


class EagerWork:
    """Tensors of any kind; see :class:`sm3_dist.kernels.Work`."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._steps = {entry.param: entry.step for entry in entries}

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Take one step of every tensor that has a gradient, and count it."""
        for entry in self.entries:
            entry.update(settings[id(entry.group)])
        stepped = [step for param, step in self._steps.items() if param.grad is not None]
        if stepped:
            torch._foreach_add_(stepped, 1)
