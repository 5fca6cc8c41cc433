"""The picture of memory: a group of bars for each model, a bar for each way to train it, its height beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from launch.footprint.footprint import WAYS

OTHERS, OURS = ("#555555", "#888888", "#bbbbbb"), ("#f2b5ad", "#e0796b", "#c8321f", "#8c1d12")


def draw_bars(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Draw bytes per parameter, summed over the ranks.

    Args:
        axes: of matplotlib.
        records: what `launch/footprint/footprint.py` printed, one for each way and model.
    """
    models = list(dict.fromkeys(each["model"] for each in sorted(records, key=lambda each: each["parameters"])))
    ways = [way for way in WAYS if any(each["way"] == way for each in records)]
    width, others, ours = 0.8 / len(ways), cycle(OTHERS), cycle(OURS)
    for k, way in enumerate(ways):
        found = [each for each in records if each["way"] == way]
        places = [models.index(each["model"]) + (k - (len(ways) - 1) / 2) * width for each in found]
        heights = [sum(each["bytes"]) / each["parameters"] for each in found]
        colour = next(others if way.startswith(("a", "flash")) else ours)
        axes.bar_label(axes.bar(places, heights, width, color=colour, label=WAYS[way].label), fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(models)), models)
    ranks = len(records[0]["bytes"])
    counted = "resident" if records[0].get("device", "cpu") == "cpu" else "allocated"
    axes.set(xlabel="model", ylabel=f"peak {counted} bytes per parameter,\nsummed over {ranks} ranks")
    axes.set_title("Memory of training with FSDP2, measured")
    axes.legend(fontsize=8)
