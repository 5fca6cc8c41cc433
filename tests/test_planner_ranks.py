"""What the planner reckons for all ranks at once, against the boxes of each rank, one after another."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sm3_dist.layout.box import Box, bounding, flat_boxes, overlaps
from sm3_dist.layout.cover import accumulator_count, cell, touched
from sm3_dist.planner.decoder import Decoder, of_size
from sm3_dist.planner.flat_parts import FlatParts
from sm3_dist.planner.rank_shards import rank_shards
from sm3_dist.planner.rectangles import Rectangles, rectangles
from sm3_dist.planner.sharding import Sharding

shapes = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple)
blocks = st.sampled_from([None, 1, 2, 3, 4, 64])


def cells_of(shape: tuple[int, ...], block: int | None) -> list[tuple[int, ...]]:
    return [cell(shape, i, block) for i in range(accumulator_count(shape, block))]


def inside(box: Box, regions: tuple[Box, ...]) -> bool:
    return any((region & box) == box for region in regions)


def assert_shared(part: Rectangles | FlatParts, cells: Any, stored: list[Box], regions: list[tuple[Box, ...]]) -> None:
    """Of ranks that store an entry; nobody asks where those are that store none."""
    counts, within = part.shared(cells)
    assert within.dtype == torch.bool
    assert counts.tolist() == [sum(region.numel for region in each) for each in regions]
    for rank, (box, each) in enumerate(zip(stored, regions, strict=True)):
        assert not box.numel or bool(within.expand(len(stored))[rank]) == inside(box, each)


def explicit(shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[int | None, ...], first: bool) -> list[Box]:
    """The box of each rank, cut by the last dimension of the mesh first, or by the first."""
    boxes = []
    for coordinate in itertools.product(*map(range, mesh)):
        box = Box.whole(shape)
        for axis in sorted(range(len(mesh)), reverse=not first):
            if (d := cuts[axis]) is not None:
                length = -(-box.shape[d] // mesh[axis])
                start = box.start[d] + coordinate[axis] * length
                box = box.along(d, start, start + length)
        boxes.append(box)
    return boxes


@given(shapes, st.lists(st.tuples(st.integers(1, 4), st.integers(-1, 3)), min_size=1, max_size=2), blocks)
def test_rectangles(shape: tuple[int, ...], axes: list[tuple[int, int]], block: int | None) -> None:
    cuts = tuple(None if d < 0 else d % len(shape) for _, d in axes)
    compare_rectangles(shape, tuple(size for size, _ in axes), cuts, block)


def test_rectangles_that_two_mesh_dimensions_cut() -> None:
    """The same dimension of the tensor, or one each: blocks lie across edges in many ways."""
    shapes = itertools.product((4, 5, 7, 12), (1, 4, 9))
    meshes, cuts = ((2, 2), (2, 3), (3, 2)), ((0, 0), (0, 1), (1, 0))
    for case in itertools.product(shapes, meshes, cuts, (2, 3)):
        compare_rectangles(*case)


def compare_rectangles(
    shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[int | None, ...], block: int | None
) -> None:
    part, boxes = rectangles(shape, mesh, cuts), explicit(shape, mesh, cuts, first=False)
    assert part.numel().tolist() == [box.numel for box in boxes]
    coordinates = list(itertools.product(*map(range, mesh)))
    for cells in cells_of(shape, block):
        stored = [touched(box, cells) for box in boxes]
        assert part.stored(cells).tolist() == [box.numel for box in stored]
        peers = [axis for axis, d in enumerate(cuts) if d is not None and cells[d] != 1 and mesh[axis] > 1]
        assert list(part.peers(cells)) == peers
        regions: list[tuple[Box, ...]] = []
        for here, mine in zip(coordinates, stored, strict=True):
            theirs = [
                box
                for there, box in zip(coordinates, stored, strict=True)
                if all(a == b for axis, (a, b) in enumerate(zip(here, there, strict=True)) if axis not in peers)
            ]
            regions.append(() if not peers else overlaps(theirs) if block else (mine,))
        assert_shared(part, cells, stored, regions)
        if block is not None:
            assert_beside(part, cells, stored, coordinates, peers)


def assert_beside(part: Rectangles, cells: Any, needed: list[Box], coordinates: list[Any], peers: list[int]) -> None:
    grid = tuple(-(-n // c) for n, c in zip(part.shape, cells, strict=True))
    chunks = explicit(grid, part.mesh, part.cuts, first=False)
    if all(a == b or not (a.numel or b.numel) for a, b in zip(chunks, needed, strict=True)):
        held, lent = [0] * len(chunks), [0] * len(chunks)
    else:
        if any(part.cuts.count(d) == len(part.mesh) > 1 and cells[d] != 1 for d in range(len(grid))):
            chunks = explicit(grid, part.mesh, part.cuts, first=min(part.mesh) > 1)
        held, lent = [box.numel for box in chunks], []
        for here, mine in zip(coordinates, needed, strict=True):
            among = [
                k
                for k, there in enumerate(coordinates)
                if all(a == b for axis, (a, b) in enumerate(zip(here, there, strict=True)) if axis not in peers)
            ]
            lent.append(sum((piece & mine).numel for k in among for piece in chunks[k].without(needed[k])))
    assert [each.tolist() for each in part.beside(cells)] == [held, lent]


@given(shapes, st.lists(st.floats(0, 1), max_size=6), st.integers(0, 2), st.integers(0, 2), blocks)
def test_flat_parts(shape: tuple[int, ...], cuts: list[float], before: int, after: int, block: int | None) -> None:
    numel = math.prod(shape)
    ends = [0, *sorted(round(cut * numel) for cut in cuts), numel]
    part = FlatParts(shape, before + len(ends) - 1 + after, before, tuple(ends))
    ranges = [(0, 0)] * before + list(itertools.pairwise(ends)) + [(0, 0)] * after
    extents = [bounding(flat_boxes(shape, *each), len(shape)) for each in ranges]
    assert part.numel().tolist() == [stop - start for start, stop in ranges]
    assert list(zip(*map(Tensor.tolist, part.lengths()), strict=True)) == [box.shape for box in extents]
    for cells in cells_of(shape, block):
        holds = [start < stop for start, stop in ranges]
        stored = [touched(box, cells) for box in extents]
        assert part.stored(cells).tolist() == [box.numel * held for box, held in zip(stored, holds, strict=True)]
        regions = overlaps([box for box, held in zip(stored, holds, strict=True) if held])
        held_boxes = [box if held else Box.whole((0,) * len(shape)) for box, held in zip(stored, holds, strict=True)]
        assert_shared(part, cells, held_boxes, [regions] * len(ranges))


def test_thousands_of_ranks_are_no_more_work_than_eight() -> None:
    with torch.device("meta"):
        model = Decoder(of_size(7e9))
    told: dict[str, Any] = {"units": model.blocks, "tensor_parallel": model.tensor_parallel}
    for wrapper in ("fsdp2", "tp", "fsdp1"):
        few, many = (
            sum(len(unit.holdings) for unit in rank_shards(Sharding.of(model, world=world, wrapper=wrapper, **told)))
            for world in (8, 4096)
        )
        assert few == many <= 12
