"""Covers of blocks, and their product."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from against_reference import EVERYTHING
from harness import Pool
from hypothesis import given
from hypothesis import strategies as st
from layouts import Tensors, give
from test_maths import gradients, trained
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sm3_dist import SM3
from sm3_dist.layout.box import Box, overlaps
from sm3_dist.maths.reference import ReferenceState, reference_step

boxes = st.lists(
    st.tuples(*[st.tuples(st.integers(0, 6), st.integers(0, 6)) for _ in range(2)]).map(
        lambda sides: Box(tuple(min(side) for side in sides), tuple(max(side) for side in sides))
    ),
    max_size=6,
)


@given(boxes)
def test_overlaps_are_the_points_in_two_boxes_or_more(some: list[Box]) -> None:
    def points(box: Box) -> set[tuple[int, ...]]:
        return set(itertools.product(*map(range, box.start, box.stop)))

    held = Counter(point for box in some for point in points(box))
    found = Counter(point for box in overlaps(some) for point in points(box))
    assert found == Counter({point: 1 for point, times in held.items() if times > 1})
    assert overlaps(some) == overlaps(some[::-1])


def what_fsdp2_shares() -> None:
    """Two ranks with 8 rows each, then with 6 rows each; blocks of 4 rows."""
    for rows, cut in ((16, ()), (12, (Box((1, 0), (2, 6)),))):
        model = fully_shard(Tensors([(rows, 6)]))
        optimizer = SM3(model.parameters(), cover_block=4)
        (param,) = model.parameters()
        give(param, torch.ones(rows, 6))
        optimizer.step()
        by_rows, by_columns = optimizer.state[param]["accumulator_0"], optimizer.state[param]["accumulator_1"]
        (entry,) = optimizer._current_plan().entries
        shared_rows, shared_columns, shared_tiles = entry.shard.shared
        assert shared_rows is None
        assert isinstance(by_rows, DTensor)
        assert by_rows.shape == (rows, 2)
        if cut:
            assert shared_columns is not None
            assert shared_columns.regions == cut
            assert shared_tiles is not None
            assert shared_tiles.regions == (Box((1, 0), (2, 2)),)
            assert entry.accumulators[1].shape == (2, 6)  # neighbours both work on row 1 of the three
        else:
            assert shared_columns is shared_tiles is None
            assert optimizer._current_plan().buckets == []
            assert entry.cut_covers == []
        assert isinstance(by_columns, DTensor)
        assert by_columns.shape == (-(-rows // 4), 6)


def test_only_blocks_that_a_shard_edge_cuts_are_shared(workers: Pool) -> None:
    workers(2).run(what_fsdp2_shares)


CHUNKED = [(), (1,), (0, 4), (700, 900), (3, 90_000), (90_000, 3), (60, 70, 80)]


@pytest.mark.sampled("shape, block", list(itertools.product(CHUNKED, [3, 64, 1000])), ids=str)
def test_chunks_do_not_show_with_block_covers(shape: tuple[int, ...], block: int) -> None:
    """Strips end where blocks end, and chunks end anywhere."""
    options: dict[str, Any] = {"beta": 0.9, "cover_block": block}
    expected, state = torch.zeros(shape), ReferenceState.zeros(torch.zeros(shape), block)
    grads = gradients(shape, 2)
    for grad in grads:
        reference_step(expected, grad, state, **options)
    weight, got = trained(torch.zeros(shape), grads, **options)
    assert torch.equal(weight, expected)
    assert all(torch.equal(got[f"accumulator_{i}"], mu) for i, mu in enumerate(state.accumulators))


def test_blocks_of_one_are_adam_without_momentum() -> None:
    """With a cover set for each element SM3 is RMSprop, bias-corrected: Adam with beta1 = 0."""
    grads = gradients((5, 4), 10)
    theirs = torch.nn.Parameter(torch.ones(5, 4))
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.0, 0.95), eps=1e-12)
    for grad in grads:
        theirs.grad = grad.clone()
        adam.step()
    ours, _ = trained(torch.ones(5, 4), grads, lr=0.01, beta=0.95, bias_correction=True, cover_block=1)
    assert torch.allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_blocks_as_long_as_the_tensor_are_whole_slices() -> None:
    grads = gradients((5, 4), 3)
    blocks, state = trained(torch.ones(5, 4), grads, cover_block=5)
    slices, _ = trained(torch.ones(5, 4), grads)
    assert torch.equal(blocks, slices)
    assert [tuple(state[f"accumulator_{i}"].shape) for i in range(3)] == [(5, 1), (1, 4), (1, 1)]


def test_a_tensor_of_more_dimensions_counts_as_the_matrix_that_it_is_in_memory() -> None:
    """Rows of the first dimension, whose blocks of columns are whole in the last ones."""
    grads = gradients((6, 2, 4), 3)
    tensor, state = trained(torch.ones(6, 2, 4), grads, cover_block=4)
    matrix, _ = trained(torch.ones(6, 8), [grad.view(6, 8) for grad in grads], cover_block=4)
    assert torch.equal(tensor.view(6, 8), matrix)
    assert [tuple(state[f"accumulator_{i}"].shape) for i in range(3)] == [(6, 2, 1), (2, 2, 4), (2, 2, 1)]


def test_state_is_two_over_the_block_size() -> None:
    _, state = trained(torch.ones(128, 64), gradients((128, 64), 1), cover_block=32)
    assert [tuple(state[f"accumulator_{i}"].shape) for i in range(3)] == [(128, 2), (4, 64), (4, 2)]


def test_the_product_of_covers_knows_what_is_a_product() -> None:
    """Squared gradients that are products of a row's factor and a column's are estimated without an error."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(8, 1, generator=generator) * torch.rand(1, 12, generator=generator)
    for product in (True, False):
        param = torch.nn.Parameter(torch.zeros(8, 12))
        optimizer = SM3([param], lr=1.0, beta=0.5, cover_block=4, cover_product=product)
        for param.grad in (grad, torch.full_like(grad, 1e-9)):
            torch.nn.init.zeros_(param)
            optimizer.step()
        estimate = (1e-9 / param.detach()).square() / 0.5  # the second update is 1e-9 / sqrt(0.5 * estimate)
        exact = torch.allclose(estimate, 0.5 * grad.square(), rtol=1e-4)
        assert exact == product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (5, 6, 4)], ids=str)
def test_a_finite_gradient_whose_square_is_infinite_leaves_no_nan(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Covers of infinity beside covers of infinity, of 0 and of other numbers, in the product of them."""
    grads = gradients(shape, 6, dtype)
    grads[1].view(-1)[3] = torch.finfo(dtype).max / 2
    grads[2].view(-1)[[0, -1]] = torch.finfo(dtype).max / 4
    grads[1].view(-1)[:3] = grads[0].view(-1)[:3] = 0
    expected, state = torch.ones(shape, dtype=dtype), ReferenceState.zeros(torch.ones(shape, dtype=dtype), 4)
    moved = []
    for grad in grads:
        before = expected.clone()
        reference_step(expected, grad, state, **EVERYTHING | {"cover_block": 4})
        moved.append((expected - before).abs().min().item() > 0)
    weight, got = trained(torch.ones(shape, dtype=dtype), grads, **EVERYTHING | {"cover_block": 4})
    assert weight.isfinite().all()
    assert torch.equal(weight, expected)
    assert all(torch.equal(got[f"accumulator_{i}"], mu) for i, mu in enumerate(state.accumulators))
    assert moved[-1]  # every element goes on, the one that had the gradient too
