"""The tables that the command prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sm3_dist.planner.collective_volume import SENT, ring
from sm3_dist.planner.planning import RankBytes


@dataclass(frozen=True)
class Row:
    """What each rank holds with one optimizer.

    Args:
        name: of the optimizer.
        ranks: the bytes of each rank.
        weights: bytes of all weights that the wrapper gathers: of a rank's part under tensor parallelism.
        trained: of those that are trained.
        step: the most bytes that a step takes for itself on a GPU.
    """

    name: str
    ranks: Sequence[RankBytes]
    weights: int
    trained: int
    step: int = 0


def table(ranks: Sequence[RankBytes], parameters: int) -> str:
    """The bytes of the rank that holds most, of all ranks together, and of these per parameter.

    Example:
        >>> print(table([RankBytes(40, 40, 8, 0, 80), RankBytes(40, 40, 12, 0, 80)], 20))
        20 parameters, 2 ranks
        bytes               largest rank           all ranks  per parameter
        weights                       40                  80           4.00
        gradients                     40                  80           4.00
        state                         12                  20           1.00
        sent                           0                   0           0.00
        adam_moments                  80                 160           8.00
    """
    lines = [f"{parameters:,} parameters, {len(ranks)} rank{'s' * (len(ranks) > 1)}"]
    lines.append(f"{'bytes':<14}{'largest rank':>18}{'all ranks':>20}{'per parameter':>15}")
    for name in (field.name for field in fields(RankBytes)):
        each = [getattr(rank, name) for rank in ranks]
        if name == "exchanged" and not any(each):  # without orthogonal updates
            continue
        lines.append(f"{name:<14}{max(each):>18,}{sum(each):>20,}{sum(each) / max(1, parameters):>15.2f}")
    return "\n".join(lines)


def comparison(rows: Sequence[Row], wrapper: str, replicas: int, tp_size: int = 1) -> str:
    """What the rank that holds most needs with each optimizer, and what it sends in a step.

    Example:
        >>> print(comparison([Row("sm3", [RankBytes(4096, 4096, 96, 64, 0)] * 2, 4096, 4096)], "ddp", 1))
        on the rank that holds most   weights   gradients       state    together   step, GPU  sent: model  sent: state
        sm3                           4.10 kB     4.10 kB        96 B     8.29 kB         0 B      4.10 kB         64 B
    """
    heads = ("weights", "gradients", "state", "together", "step, GPU", "sent: model", "sent: state")
    widths = (9, 12, 12, 12, 12, 13, 13)
    lines = [_line("on the rank that holds most", heads, widths)]
    for row in rows:
        most = max(row.ranks, key=lambda each: each.weights + each.gradients + each.state)
        held = (most.weights, most.gradients, most.state)
        world, formula = len(row.ranks) // tp_size, SENT[wrapper]
        model = size(formula(row.weights, row.trained, world, replicas)) if formula else "activations"
        group = len(row.ranks) // replicas if wrapper == "hsdp" else len(row.ranks)
        cells = [*map(size, held), size(sum(held)), size(row.step), model, size(2 * ring(group) * most.sent)]
        lines.append(_line(row.name, cells, widths))
    return "\n".join(lines)


def _line(first: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{first:<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def size(count: float) -> str:
    """Write a number of bytes for people.

    Example:
        >>> size(980), size(3_370_000), size(2.5e9)
        ('980 B', '3.37 MB', '2.50 GB')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"
