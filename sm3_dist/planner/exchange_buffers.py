"""The buffers in which updates travel to be made orthogonal, reckoned from shapes as a step does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sm3_dist.layout.box import Box
from sm3_dist.maths.orthogonal import TYPE, work
from sm3_dist.ranks.matrix_exchange import Matrix, bucketed, owners

ALIVE = 3
"""Buckets at a time: one is filled, one travels to the owners, one comes back."""


@dataclass(frozen=True)
class Pieces:
    """A tensor whose update is made orthogonal.

    Attributes:
        shape: its shape.
        boxes: what each rank holds of it.
        replicated: whether that is all of it on every rank, and all do the same.
        cut: whether it is cut along its dimensions: then all ranks have part in it, even with nothing.
    """

    shape: tuple[int, ...]
    boxes: Sequence[tuple[Box, ...]]
    replicated: bool
    cut: bool


def exchange_bytes(pieces: Sequence[Pieces], ranks: int) -> list[int]:
    """The most bytes of buffers that each rank has at a time within a step.

    Args:
        pieces: the tensors whose update is made orthogonal, in the order of the param groups.
        ranks: how many share them.
    """
    matrices = [piece for piece in pieces if len(piece.shape) > 1 and 0 not in piece.shape]
    kinds = list(dict.fromkeys(_travels(piece, ranks) for piece in matrices))
    by_rank = []
    for rank in range(ranks):
        sizes: list[int] = []
        for travel in kinds:  # in the order in which the first of each comes
            these = [piece for piece in matrices if _travels(piece, ranks) is travel]
            loads = {r: _load(matrices, r, ranks) for r in range(ranks)} if travel else None
            sizes += _buckets(these if travel else [p for p in these if p.boxes[rank]], rank, ranks, travel, loads)
        by_rank.append(max((sum(sizes[k : k + ALIVE]) for k in range(len(sizes))), default=0))
    return by_rank


def _travels(piece: Pieces, ranks: int) -> bool:
    return ranks > 1 and not piece.replicated and (piece.cut or sum(map(bool, piece.boxes)) > 1)


def _load(matrices: Sequence[Pieces], rank: int, ranks: int) -> int:
    """What a rank has to do for tensors that it alone holds, where ranks hold them one after another."""
    alone = (p for p in matrices if not p.replicated and not _travels(p, ranks) and p.boxes[rank])
    return sum(work(piece.shape) for piece in alone)


def _buckets(
    pieces: Sequence[Pieces], rank: int, ranks: int, travel: bool, loads: dict[int, int] | None
) -> Iterator[int]:
    """The bytes of each bucket on a rank."""
    shapes = [piece.shape for piece in pieces]
    boxes: list[dict[int, tuple[Box, ...]]] = [
        dict(enumerate(piece.boxes)) if travel else {rank: piece.boxes[rank]} for piece in pieces
    ]
    holders = [{r: sum(box.numel for box in held) for r, held in each.items()} for each in boxes]
    chosen, order = owners([work(shape) for shape in shapes], holders, loads)
    matrices = [Matrix(shapes[k], None, boxes[k], chosen[k]) for k in order]
    for bucket in bucketed(matrices, TYPE.itemsize):
        these = [matrices[k] for k in bucket]
        sent = sum(matrix.numel(rank) + 1 for matrix in these)
        mine = [matrix for matrix in these if travel and matrix.owner == rank]
        received = sum(matrix.numel(r) + 1 for matrix in mine for r in range(ranks))
        yield TYPE.itemsize * (sent + received)
