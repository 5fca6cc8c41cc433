"""Standings, how the optimizers of a comparison rank: a table, loss curves, and final loss against bytes of state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import stdev
from typing import Any

from rich.table import Table

from launch.comparison.comparison import Comparison, Contestant, at_rate

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
            ax.set_prop_cycle(color=pyplot.colormaps["tab20"](range(20)))
            draw_one(comparison, ax, of_model(comparison.contestants, model))
            ax.set_title(model)
        figure.savefig(comparison.out / name, dpi=120)
        pyplot.close(figure)


def draw_curves(comparison: Comparison, axes: Any, contestants: Iterable[Contestant]) -> None:
    finite = [c for c in contestants if not math.isinf(at_rate(*comparison.best(c)))]
    curves = {c.name: comparison.curve(c) for c in finite}
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, label=name, linewidth=1)
    axes.set_ylim(top=max((1.3 * losses[-1] for _, losses in curves.values()), default=None))
    axes.set(xlabel="step", ylabel="training, bits per byte, mean of the seeds")
    axes.legend(loc="lower left")


def draw_bytes(comparison: Comparison, axes: Any, contestants: Iterable[Contestant]) -> None:
    for c in contestants:
        size, loss = comparison.bytes_per_parameter(c), at_rate(*comparison.best(c))
        if math.isinf(loss):
            continue
        axes.plot(size, loss, "o")
        axes.annotate(c.name, (size, loss), xytext=(4, 4), textcoords="offset points")
    axes.margins(x=0.15)  # for the names
    axes.set(xlabel="bytes of optimizer state per parameter", ylabel="validation, bits per byte")


def of_model(contestants: Iterable[Contestant], model: str) -> list[Contestant]:
    return [c for c in contestants if c.model == model]
