"""Kernel: what a step launches, whichever backend it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sm3_dist.maths.rms import Averaging
from sm3_dist.maths.update import Settings
from sm3_dist.step.entry import Entry


class Kernel(Protocol):
    """What takes the steps of some tensors. Built once for a plan, launched in every step."""

    def update(self, settings: Mapping[int, Settings]) -> Sequence[Tensor]:
        """Take one step of every tensor that has a gradient, and count it.

        Args:
            settings: of each param group, by its ``id``.

        Returns:
            The parameters that have one.
        """


class Launcher(Protocol):
    """What makes the kernels of a plan."""

    def __call__(self, entries: Sequence[Entry]) -> list[Kernel]:
        """The kernels that step some of the plan's tensors."""

    def averaging(self, count: int, device: torch.device) -> Averaging | None:
        """What brings the moving averages of squares up to date; ``None`` where that is left to them."""

    def review(self, entries: Sequence[Entry]) -> None:
        """Tell the user, once for the whole plan, what there is to know of how its tensors are stepped."""
