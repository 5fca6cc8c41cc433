"""What pictures have in common: ours stands out, noise is smoothed, labels keep apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def apart(points: Sequence[tuple[float, float]], gap: float, width: float = math.inf) -> list[float]:
    """Heights of labels of points: up as far as they must, ``gap`` from those less than ``width`` to the side.

    Example:
        >>> apart([(0.0, 1.0), (0.0, 3.0), (2.0, 1.1), (9.0, 1.1)], 0.5, 4.0)
        [1.0, 3.0, 1.5, 1.1]
    """
    moved: dict[int, float] = {}
    for k in sorted(range(len(points)), key=lambda k: points[k][1]):
        x, height = points[k]
        below = [moved[other] + gap for other in moved if abs(points[other][0] - x) < width]
        moved[k] = max([height, *below])
    return [moved[k] for k in range(len(points))]
