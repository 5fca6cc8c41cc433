"""How flat ranges are cut, and which accumulator entries they share."""

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sm3_dist.layout.box import Box, bounding, flat_boxes
from sm3_dist.layout.cover import cell, touched
from sm3_dist.layout.ranges import even_cuts, shared_entries
from sm3_dist.layout.shard import Peers

PEERS = Peers((0, 1, 2), group=lambda: None)  # type: ignore[arg-type, return-value]


def gpt2(vocabulary: int = 50257, width: int = 768, layers: int = 12, length: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's 124 M parameters, output and input embedding tied."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (length, width), *block * layers, (width,), (width,)]


@pytest.mark.parametrize("parts", [2, 3, 8, 64])
def test_gpt2_is_cut_evenly_and_hardly_any_row_in_two(parts: int) -> None:
    shapes = gpt2()
    total = sum(map(math.prod, shapes))
    assert total == 124_439_808
    cuts = even_cuts(shapes, parts)
    sizes = [b - a for a, b in pairwise(cuts)]
    assert max(sizes) <= 1.01 * total / parts
    assert min(sizes) >= 0.99 * total / parts
    assert max(sizes) - total / parts < 4096  # a row or two
    starts = [sum(map(math.prod, shapes[:k])) for k in range(len(shapes))]
    for cut in cuts[1:-1]:
        tensor = max(k for k, start in enumerate(starts) if start <= cut)
        assert (cut - starts[tensor]) % math.prod(shapes[tensor][1:]) == 0


shape_lists = st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), max_size=6)


@given(shape_lists, st.integers(1, 9))
def test_cuts_are_even(shapes: list[tuple[int, ...]], parts: int) -> None:
    cuts = even_cuts(shapes, parts)
    total = sum(map(math.prod, shapes))
    assert len(cuts) == parts + 1
    assert (cuts[0], cuts[-1]) == (0, total)
    for start, stop in pairwise(cuts):
        assert abs(stop - start - total / parts) <= max(1, 0.01 * total / parts)


def test_where_a_cut_moves() -> None:
    assert even_cuts([(1000, 10), (1001, 10)], 2) == [0, 10000, 20010]  # 5 elements back, between the tensors
    assert even_cuts([(1000, 10), (1003, 10)], 2) == [0, 10010, 20030]  # 5 back, as between the tensors is 15
    assert even_cuts([(1000, 10), (1004, 10)], 2) == [0, 10020, 20040]  # stays, between rows
    assert even_cuts([(50, 60)], 4) == [0, 750, 1500, 2250, 3000]  # the rows are long: 30 elements from 1 % of 750


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    st.lists(st.integers(0, 1000), max_size=5),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_shared_entries_are_those_that_several_ranks_store(
    shape: tuple[int, ...], places: list[int], cover_block: int | None
) -> None:
    """Which is more than what their boxes touch: a rank stores the rectangle around that."""
    numel = math.prod(shape)
    ranges = list(pairwise([0, *sorted(place % (numel + 1) for place in places), numel]))
    boxes = [flat_boxes(shape, *run) for run in ranges]
    for i, shared in enumerate(shared_entries(shape, ranges, PEERS, cover_block)):
        sets = cell(shape, i, cover_block)
        touching = [{c for box in held for c in points(touched(box, sets))} for held in boxes]
        stored = [points(touched(bounding(held, len(shape)), sets)) if held else set() for held in boxes]
        regions = [point for region in shared.regions for point in points(region)] if shared else []
        assert in_several(touching) <= in_several(stored) == set(regions)
        assert len(regions) == len(set(regions))


def in_several(sets: list[set[tuple[int, ...]]]) -> set[tuple[int, ...]]:
    return {point for one, other in combinations(sets, 2) for point in one & other}


def points(box: Box) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for start, stop in zip(box.start, box.stop, strict=True):
        found = [(*point, k) for point in found for k in range(start, stop)]
    return set(found)
