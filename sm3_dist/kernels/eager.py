"""The eager backend: one tensor after another, by the functions of ``update.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import Entry


class EagerKernel:
    """Tensors of any kind; see :class:`sm3_dist.kernels.Kernel`."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._steps = {entry.param: entry.step for entry in entries}

    def update(self, settings: Mapping[int, Settings]) -> Sequence[Tensor]:
        """Take one step of every tensor that has a gradient, and count it; see :class:`sm3_dist.kernels.Kernel`."""
        for entry in self.entries:
            entry.update(settings[id(entry.group)])
        stepped = [param for param in self._steps if param.grad is not None]
        if stepped:
            torch._foreach_add_([self._steps[param] for param in stepped], 1)
        return stepped
