"""Standings, how the optimizers of a comparison rank: a table, loss curves, and final loss against bytes of state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from statistics import stdev
from typing import Any

from rich.table import Table

from launch.comparison.comparison import Comparison, Contestant, at_rate
from launch.comparison.pictures import OTHER_COLOURS, OTHERS, OUR_COLOURS, OURS, apart, running_mean

SMOOTHED = 10
"""Logged values in a running mean."""
PAPER = (0, (4, 2))
"""A dashed line."""
CURVES, BYTES, TABLE = "curves.png", "bytes.png", "table.txt"


def table(comparison: Comparison) -> Table:
    """One line for each contestant, the best of a model first."""
    rates = "the best learning rate, half of it and twice of it" if comparison.sweep else "the default learning rate"
    lines = Table(title=f"Validation, bits per byte, at {rates}")
    for name in ("model", "optimizer", "lr", "best", "± (seeds)", "at lr / 2", "at 2 lr", "bytes per parameter"):
        lines.add_column(name, justify="left" if name in ("model", "optimizer") else "right")
    for model in dict.fromkeys(c.model for c in comparison.contestants):
        for c in sorted(of_model(comparison.contestants, model), key=lambda c: at_rate(*comparison.best(c))):
            results, best = comparison.best(c)
            losses = [loss for (k, _), loss in results.items() if k == best]
            finite = len(losses) > 1 and all(map(math.isfinite, losses))
            spread = f"{stdev(losses):.4f} ({len(losses)})" if finite else f"({len(losses)})"
            tried = {k for k, _ in results}
            near = [f"{at_rate(results, k):.4f}" if k in tried else "" for k in (best, best - 1, best + 1)]
            rate, size = f"{c.start * 2.0**best:g}", f"{comparison.bytes_per_parameter(c):.2f}"
            lines.add_row(model, c.name, rate, near[0], spread, *near[1:], size)
    return lines


def draw(comparison: Comparison) -> None:
    """Draw the loss curves, and the final loss against the size of the state."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(c.model for c in comparison.contestants))
    for name, draw_one in ((CURVES, draw_curves), (BYTES, draw_bytes)):
        figure, axes = pyplot.subplots(
            1, len(models), figsize=(7 * len(models), 5), layout="constrained", squeeze=False
        )
        for model, ax in zip(models, axes[0], strict=True):
            draw_one(comparison, ax, of_model(comparison.contestants, model))
            ax.set_title(model)
        figure.savefig(comparison.out / name, dpi=120)
        pyplot.close(figure)


def draw_curves(comparison: Comparison, axes: Any, contestants: Iterable[Contestant]) -> None:
    finite = [c for c in contestants if not math.isinf(at_rate(*comparison.best(c)))]
    curves = {c.name: running_mean(*comparison.curve(c), SMOOTHED) for c in finite}
    colours, our_colours = itertools.cycle(OTHER_COLOURS), itertools.cycle(OUR_COLOURS)
    for name, (steps, losses) in sorted(curves.items(), key=lambda curve: -curve[1][1][-1]):  # as they end, from above
        if name.startswith("sm3"):
            line = PAPER if "paper" in name else "-"
            axes.plot(steps, losses, label=name, linewidth=2.4, color=next(our_colours), linestyle=line)
        else:
            axes.plot(steps, losses, label=name, linewidth=1, color=next(colours))
    axes.set_ylim(top=max((1.3 * losses[-1] for _, losses in curves.values()), default=None))
    seeds = {sum(k == best for k, _ in results) for results, best in map(comparison.best, finite)}
    axes.set(xlabel="step", ylabel="training loss, bits per byte")
    several = f", mean of {max(seeds)} seeds" if max(seeds, default=1) > 1 else ", one seed"
    axes.text(0.01, 0.01, f"running mean over {SMOOTHED} logged values{several}", transform=axes.transAxes, fontsize=8)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_bytes(comparison: Comparison, axes: Any, contestants: Iterable[Contestant]) -> None:
    points = [(c.name, comparison.bytes_per_parameter(c), at_rate(*comparison.best(c))) for c in contestants]
    points = [point for point in points if not math.isinf(point[2])]
    losses = [loss for _, _, loss in points]
    gap = 0.045 * (max(losses, default=0) - min(losses, default=0))
    heights = apart([(size, loss) for _, size, loss in points], gap)
    for (name, size, loss), height in zip(points, heights, strict=True):
        colour, weight = (OURS, "bold") if name.startswith("sm3") else (OTHERS, "normal")
        axes.plot(size, loss, "o", color=colour)
        axes.annotate(name, (size, loss), xytext=(size + 0.15, height), va="center", color=colour, weight=weight)
    axes.margins(x=0.15)  # for the names
    axes.set(xlabel="bytes of optimizer state per parameter", ylabel="validation, bits per byte")


def of_model(contestants: Iterable[Contestant], model: str) -> list[Contestant]:
    return [c for c in contestants if c.model == model]
