"""Draw shards.svg: what each rank holds of a matrix and of its two accumulators, under three ways of sharding.

    python docs/images/shards.py

The boxes and the entries that they touch are those of the package itself.
"""

from __future__ import annotations

from pathlib import Path

from sm3_dist.layout.box import Box, flat_boxes
from sm3_dist.layout.cover import touched

SHAPE = (6, 8)
COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1"]
SHARED = "#d9d9d9"
CELL = 22
GAP = 10
PANEL = CELL * (SHAPE[1] + 1) + GAP + 40

PANELS: list[tuple[str, str, list[list[Box]]]] = [
    ("FSDP2 over 3 ranks", "whole rows", [[Box((2 * r, 0), (2 * r + 2, 8))] for r in range(3)]),
    (
        "FSDP2 + tensor parallel, 2 x 2",
        "rectangles",
        [[Box((3 * i, 4 * j), (3 * i + 3, 4 * j + 4))] for i in range(2) for j in range(2)],
    ),
    ("FSDP1 or ZeRO-1 over 3 ranks", "flat ranges", [flat_boxes(SHAPE, *ab) for ab in [(0, 19), (19, 34), (34, 48)]]),
]


def cell(x: float, y: float, colour: str) -> str:
    """One square."""
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour}" stroke="white"/>'


def text(x: float, y: float, words: str, style: str = "") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="12" fill="#333" {style}>{words}</text>'


def colour(holders: list[int]) -> str:
    """That of the only rank, or grey where several share an entry."""
    return COLOURS[holders[0]] if len(holders) == 1 else SHARED


def panel(left: float, title: str, subtitle: str, ranks: list[list[Box]]) -> list[str]:
    """A matrix with its row accumulator at the left and its column accumulator on top."""
    top, matrix_left = 48, left + CELL + GAP
    matrix_top = top + CELL + GAP
    parts = [text(left, 16, title, 'font-weight="bold"'), text(left, 32, subtitle)]

    def holders(box: Box, i: int | None) -> list[int]:
        area = [[b if i is None else touched(b, (1, 0) if i == 0 else (0, 1)) for b in boxes] for boxes in ranks]
        return [rank for rank, boxes in enumerate(area) if any((b & box).numel for b in boxes)]

    for row in range(SHAPE[0]):
        y = matrix_top + row * CELL
        parts.append(cell(left, y, colour(holders(Box((row, 0), (row + 1, 1)), 0))))
        for column in range(SHAPE[1]):
            one = Box((row, column), (row + 1, column + 1))
            parts.append(cell(matrix_left + column * CELL, y, colour(holders(one, None))))
    columns = [Box((0, column), (1, column + 1)) for column in range(SHAPE[1])]
    parts += [cell(matrix_left + box.start[1] * CELL, top, colour(holders(box, 1))) for box in columns]
    return parts


def main() -> None:
    """Write the picture beside this file."""
    width, height = PANEL * len(PANELS), 48 + CELL * 7 + GAP + 40
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, (title, subtitle, ranks) in enumerate(PANELS):
        parts += panel(10 + number * PANEL, title, subtitle, ranks)
    legend = 10.0
    for rank, name in enumerate(["rank 0", "rank 1", "rank 2", "rank 3"]):
        parts += [cell(legend, height - 30, COLOURS[rank]), text(legend + CELL + 5, height - 15, name)]
        legend += 80
    parts += [
        cell(legend, height - 30, SHARED),
        text(legend + CELL + 5, height - 15, "accumulator entry of several ranks: one all-reduce MAX"),
    ]
    body = "\n".join(parts)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n{body}\n</svg>\n'
    Path(__file__).with_name("shards.svg").write_text(svg)


if __name__ == "__main__":
    main()
