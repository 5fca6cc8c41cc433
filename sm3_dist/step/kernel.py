"""Kernel: what a step launches, whichever backend it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from sm3_dist.maths.update import Settings


class Kernel(Protocol):
    """What takes the steps of some tensors. Built once for a plan, launched in every step."""

    def update(self, settings: Mapping[int, Settings]) -> None:
        """Take one step of every tensor that has a gradient, and count it.

        Args:
            settings: of each param group, by its ``id``.
        """
