"""What pictures have in common: ours stands out, noise is smoothed, labels keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean

OURS, OTHERS = "#c8321f", "#7f8c99"
OUR_COLOURS = (OURS, "#e39a3b", "#8c1d6b")
OTHER_COLOURS = ("#3b6ea5", "#7f8c99", "#6aa84f", "#b8860b", "#8e63a8", "#4aa3a2", "#a0522d", "#5f6caf", "#999933")


def running_mean(steps: Sequence[int], values: Sequence[float], count: int) -> tuple[list[int], list[float]]:
    """The mean of each value and of up to ``count - 1`` before it, of which none is left out.

    Example:
        >>> running_mean([1, 2, 3], [3.0, 1.0, 2.0], 2)
        ([2, 3], [2.0, 1.5])
    """
    count = min(count, len(values))
    places = range(count - 1, len(values))
    return [steps[k] for k in places], [mean(values[k + 1 - count : k + 1]) for k in places]


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels up as far as they need to keep ``gap`` from one another, in the order in which they stand.

    Example:
        >>> apart([1.0, 3.0, 1.1], 0.5)
        [1.0, 3.0, 1.5]
    """
    moved = list(heights)
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved
