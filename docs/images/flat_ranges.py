"""Draw flat_ranges.svg: how tensors that lie one after another are cut into parts, and what boxes the parts become.

    python docs/images/flat_ranges.py

The parts, the boxes and the shared entries are those of the package itself.
"""

from __future__ import annotations

import math
from pathlib import Path

from sm3_dist.layout.flat import shard_of
from sm3_dist.layout.flat_metadata import FlatTensor, Original
from sm3_dist.layout.shard import LocalShard, Peers

TENSORS = {"weight A": (4, 7), "bias": (4,), "weight B": (3, 6)}
WORLD = 3
COLOURS = ["#4e79a7", "#f28e2b", "#59a14f"]
SHARED = "#d9d9d9"
CELL, GAP, LEFT = 24, 10, 12


def text(x: float, y: float, words: str, style: str = "") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="12" fill="#333" {style}>{words}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "white") -> str:
    """A filled rectangle with an outline."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}"/>'


def originals() -> list[Original]:
    """The tensors, one after another."""
    found, start = [], 0
    for name, shape in TENSORS.items():
        found.append(Original(name, shape, start))
        start += math.prod(shape)
    return found


def shards(original: Original, part: int) -> list[LocalShard]:
    """What each rank holds of a tensor."""
    peers = Peers(tuple(range(WORLD)), group=lambda: None)  # type: ignore[arg-type, return-value]
    return [shard_of(FlatTensor(None, (original,), part, peers, rank, ""), original) for rank in range(WORLD)]  # type: ignore[arg-type]


def strip(tensors: list[Original], part: int, top: float) -> list[str]:
    """The flat tensor, each element in the colour of the rank that holds it; tensors framed and named."""
    width = 12.0
    lines = [text(LEFT, top - 26, "The flat tensor, in three equal parts, padded at the end", 'font-weight="bold"')]
    end = tensors[-1].start + tensors[-1].numel
    for position in range(part * WORLD):
        fill = COLOURS[position // part] if position < end else "white"
        lines += [rectangle(LEFT + position * width, top, width, CELL, fill, "white" if position < end else "#bbb")]
    for original in tensors:
        x = LEFT + original.start * width
        lines.append(rectangle(x, top, original.numel * width, CELL, "none", "#333"))
        lines.append(text(x + 2, top - 6, original.name))  # shapes stand below: there is no room for that of the bias
    return lines


def matrix(original: Original, part: int, left: float, top: float) -> list[str]:
    """A matrix with its accumulators: row entries at the left, column entries on top, and its boxes outlined."""
    held = shards(original, part)
    rows, columns = original.shape
    x0, y0 = left + CELL + GAP, top + CELL + GAP
    lines = [text(left, top - 8, f"{original.name}, {rows} x {columns}", 'font-weight="bold"')]
    for i, count in enumerate((rows, columns)):
        for k in range(count):
            at = (k, 0) if i == 0 else (0, k)
            touching = [r for r in range(WORLD) if _inside(held[r].stored[i].start, at, held[r].stored[i].stop)]
            fill = COLOURS[touching[0]] if len(touching) == 1 else SHARED
            lines.append(
                rectangle(left if i == 0 else x0 + k * CELL, y0 + k * CELL if i == 0 else top, CELL, CELL, fill)
            )
    for rank, shard in enumerate(held):
        for box in shard.boxes:
            (a, b), (c, d) = box.start, box.stop
            x, y, width, height = x0 + b * CELL, y0 + a * CELL, (d - b) * CELL, (c - a) * CELL
            lines.append(rectangle(x, y, width, height, COLOURS[rank], "white"))
            lines.append(rectangle(x + 2, y + 2, width - 4, height - 4, "none", "white"))
            lines.append(text(x + 6, y + 16, f"rank {rank}", 'style="fill:white"'))
    return lines


def _inside(start: tuple[int, ...], at: tuple[int, ...], stop: tuple[int, ...]) -> bool:
    return all(a <= j < b for a, j, b in zip(start, at, stop, strict=True))


def main() -> None:
    """Write the picture beside this file."""
    tensors = originals()
    part = -(-sum(original.numel for original in tensors) // WORLD)
    width, height = 660, 330
    lines = [rectangle(0, 0, width, height, "white"), *strip(tensors, part, 44)]
    lines += matrix(tensors[0], part, LEFT, 120)
    lines += matrix(tensors[2], part, LEFT + 260, 120)
    lines += [
        text(LEFT, height - 42, "A white outline is a box: contiguous in the memory of its rank."),
        rectangle(LEFT, height - 32, CELL, CELL, SHARED),
        text(LEFT + CELL + 6, height - 16, "accumulator entry that several ranks touch; all others are never sent"),
    ]
    body = "\n".join(lines)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n{body}\n</svg>\n'
    Path(__file__).with_name("flat_ranges.svg").write_text(svg)


if __name__ == "__main__":
    main()
