"""Boxes, and the boxes that a flat range consists of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sm3_dist.layout.box import Box, bounding, flat_boxes

shapes = st.lists(st.integers(1, 5), max_size=5).map(tuple)


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(flat_ranges())
def test_flat_boxes_hold_the_range_in_memory_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    tensor = torch.arange(math.prod(shape)).view(shape)
    boxes = flat_boxes(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel for box in boxes)
    elements = [tensor[box.within(Box.whole(shape))].flatten() for box in boxes]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *elements]), torch.arange(start, stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 13)])
def test_flat_boxes_refuses_a_range_outside_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"elements \[{start}, {stop}\) do not lie in a tensor of shape \(3, 4\)"):
        flat_boxes((3, 4), start, stop)


@given(shapes, st.integers(1, 40))
def test_chunks_partition_the_box(shape: tuple[int, ...], limit: int) -> None:
    box = Box.whole(shape)
    counts = torch.zeros(shape, dtype=torch.int)
    for chunk in box.chunks(limit):
        assert 0 < chunk.numel <= limit
        counts[chunk.within(box)] += 1
    assert torch.equal(counts, torch.ones(shape, dtype=torch.int))


def test_an_empty_box_has_no_chunks() -> None:
    assert list(Box((2, 0), (2, 5)).chunks(10)) == []


def test_intersection_and_bounding_box() -> None:
    a, b = Box((0, 0), (2, 5)), Box((1, 4), (6, 9))
    assert a & b == Box((1, 4), (2, 5))
    assert (a & Box((3, 0), (6, 5))).numel == 0
    assert bounding([a, b], 2) == Box((0, 0), (6, 9))
    assert bounding([], 2).numel == 0
