"""Bias correction, Nesterov momentum, RMS matching and block covers: to the last bit, under every layout."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pool
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, Tensors, cases, full, give, same
from test_layouts import STEPS, gradient
from test_maths import gradients, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sm3_dist import SM3
from sm3_dist.checkpoint import get_state_dict, set_state_dict
from sm3_dist.layout.box import Box, overlaps
from sm3_dist.maths.reference import ReferenceState, reference_step
from sm3_dist.maths.rms import LARGEST, square_sum
from sm3_dist.step.param_groups import ADAMW_LIKE, correction, correction_of

EVERYTHING: dict[str, Any] = {
    "momentum": 0.9,
    "beta": 0.95,
    "weight_decay": 0.1,
    "bias_correction": True,
    "nesterov": True,
    "update_rms": 0.2,
    "cover_block": 2,
    "cover_product": True,
}
OPTIONS: list[dict[str, Any]] = [
    EVERYTHING,
    {"momentum": 0.9, "beta": 0.95, "bias_correction": True},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
    {"beta": 0.95, "update_rms": 0.2},
    {"momentum": 0.9, "update_rms": 0.01, "cover_block": 3},
    {"cover_block": 3, "cover_product": True},
    {"momentum": 0.9},
    {"beta": 0.9, "cover_block": 1},
    {"momentum": 0.5, "cover_block": 100},
]


def some_gradient(step: int, number: int, shape: torch.Size) -> Tensor | None:
    """Of the first parameter one element alone has a gradient at first: when all have, ``update_rms`` cuts them off."""
    grad = gradient(step, number, shape)
    if number == 0 and grad is not None and step < STEPS - 1:
        grad.view(-1)[1:] = 0
    return grad


def compare_with_reference(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    rounding_seed: int | None = None,
    **keywords: Any,
) -> None:
    """Train a wrapped module and whole tensors side by side."""
    layout, block = LAYOUTS[name], options.get("cover_block")
    whole = [weight.detach().clone() for weight in Tensors(layout.shapes, dtype).parameters()]
    states = [ReferenceState.zeros(weight, block, keywords.get("momentum_dtype")) for weight in whole]
    model = layout.wrap(Tensors(layout.shapes, dtype))
    if rounding_seed is not None:
        keywords |= {"stochastic_rounding": True, "rounding_seed": rounding_seed}
    optimizer = SM3(model.named_parameters(), lr=0.3, **options, **keywords)
    for step in range(STEPS):
        for number, (param, weight, state) in enumerate(zip(model.parameters(), whole, states, strict=True)):
            grad = some_gradient(step, number, weight.shape)
            grad = None if grad is None else grad.to(dtype)
            give(param, grad)
            if grad is not None:
                rounding = None if rounding_seed is None else (rounding_seed, number)
                reference_step(weight, grad, state, lr=0.3, rounding=rounding, **options)
        optimizer.step()
    held, plan = optimizer.state, optimizer._current_plan()
    for entry, param, weight, state in zip(plan.entries, model.parameters(), whole, states, strict=True):
        where = f"{name}, {options}, shape {tuple(weight.shape)}"
        assert same(param, weight), where
        for i, (part, accumulator) in enumerate(zip(entry.accumulators, state.accumulators, strict=True)):
            rectangle = entry.shard.stored[i]
            grid = [n if d == i else 1 for d, n in enumerate(weight.shape)] if block is None else accumulator.shape
            expected = accumulator.view(grid)[tuple(map(slice, rectangle.start, rectangle.stop))]
            assert torch.equal(part, expected), f"{where}, accumulator {i}, entries {rectangle}"
        if options.get("momentum"):
            for box, moment in zip(entry.shard.boxes, entry.shard.state_views(entry.momentum_buffer), strict=True):
                expected = state.momentum_buffer.view(entry.shard.shape)[tuple(map(slice, box.start, box.stop))]
                assert moment.dtype == expected.dtype
                assert torch.equal(moment, expected), f"{where}, momentum of {box}"
        if options.get("update_rms") and (entry.shard.boxes or not entry.shard.replicated):
            assert held[param]["update_square_average"].item() == state.update_square_average, where


def compare_all_options(name: str, keywords: dict[str, Any]) -> None:
    for options in OPTIONS:
        compare_with_reference(name, options, **keywords)


@pytest.mark.parametrize(("name", "world_size"), list(cases()))
def test_equals_one_process(workers: Pool, name: str, world_size: int) -> None:
    workers(world_size).run(compare_all_options, name, {})


@pytest.mark.parametrize(("name", "world_size"), [("fsdp2", 3), ("hsdp", 4), ("tp-2d", 4)])
def test_equals_one_process_with_sharded_covers(workers: Pool, name: str, world_size: int) -> None:
    workers(world_size).run(compare_all_options, name, {"shard_covers": True})


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
            assert by_columns.shape == (2, 6)  # neighbours both have row 1 of the three
            assert not isinstance(by_columns, DTensor)
        else:
            assert shared_columns is shared_tiles is None
            assert optimizer._current_plan().buckets == []
            assert isinstance(by_columns, DTensor)
            assert by_columns.shape == (4, 6)


def test_only_blocks_that_a_shard_edge_cuts_are_shared(workers: Pool) -> None:
    workers(2).run(what_fsdp2_shares)


def steps_of(model: torch.nn.Module, optimizer: SM3, steps: range) -> None:
    for step in steps:
        for number, param in enumerate(model.parameters()):
            give(param, torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + number)))
        optimizer.step()


def train_and_save() -> dict[str, Any]:
    model = fully_shard(Tensors([(7, 5), (6,), (4, 3, 5)]))
    optimizer = SM3(model.parameters(), **EVERYTHING)
    steps_of(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optim": state}


def load_and_go_on(saved: dict[str, Any] | None) -> list[Tensor]:
    """``None``: never stopped."""
    model = fully_shard(Tensors([(7, 5), (6,), (4, 3, 5)]))
    optimizer = SM3(model.parameters(), **EVERYTHING)
    if saved is None:
        steps_of(model, optimizer, range(3))
    else:
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"], options=options
        )
    steps_of(model, optimizer, range(3, 6))
    return [full(param) for param in model.parameters()]


def test_a_checkpoint_moves_to_other_numbers_of_ranks(workers: Pool) -> None:
    """Three ranks, one and two: edges cut other blocks each time."""
    (alone,) = workers(1).run(load_and_go_on, None)
    saved = workers(3).run(train_and_save)[0]
    assert saved["optim"]["state"]["blocks.0.0"]["accumulator_2"].shape == (4, 3)
    for world_size in (1, 2):
        for weights in workers(world_size).run(load_and_go_on, saved):
            assert all(map(torch.equal, weights, alone))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    grads = gradients((7, 5), 4, dtype)
    expected = torch.ones(7, 5, dtype=dtype)
    state = ReferenceState.zeros(expected, 2)
    for grad in grads:
        reference_step(expected, grad, state, **EVERYTHING)
    weight, _ = trained(torch.ones(7, 5, dtype=dtype), grads, **EVERYTHING)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (700, 900), (3, 90_000), (90_000, 3), (60, 70, 80)], ids=str)
@pytest.mark.parametrize("block", [3, 64, 1000])
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
    grads = gradients((5, 4, 3), 3)
    blocks, state = trained(torch.ones(5, 4, 3), grads, cover_block=5)
    slices, _ = trained(torch.ones(5, 4, 3), grads)
    assert torch.equal(blocks, slices)
    shapes = [tuple(state[f"accumulator_{i}"].shape) for i in range(4)]
    assert shapes == [(5, 1, 1), (1, 4, 1), (1, 1, 3), (1, 1, 1)]


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


def test_the_comparison_cuts_elements_off() -> None:
    """Or the comparison with the reference would not see whether that is done."""
    weight = torch.zeros(6, 5)
    state = ReferenceState.zeros(weight)
    for step in range(STEPS):
        before = weight.clone()
        if (grad := some_gradient(step, 0, weight.shape)) is not None:
            reference_step(weight, grad, state, lr=1, beta=0.95, update_rms=0.2)
    assert (weight - before).abs().max().item() == pytest.approx(5 * 0.2)


def root_mean_squares(grads: list[Tensor], **options: Any) -> list[float]:
    """Of the change of the weights in each step, at a learning rate of 1."""
    param = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = SM3([param], lr=1.0, **options)
    result = []
    for grad in grads:
        before = param.detach().clone()
        param.grad = grad
        optimizer.step()
        result.append((param.detach() - before).square().mean().sqrt().item())
    return result


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.95}, {"beta": 0.95, "cover_block": 8, "cover_product": True}], ids=str
)
def test_updates_have_the_wanted_root_mean_square(options: dict[str, Any]) -> None:
    found = root_mean_squares(gradients((40, 30), 150), **options | {"update_rms": 0.2})
    assert math.isclose(found[0], 0.2, rel_tol=1e-4)  # the first is known beforehand
    later = math.sqrt(sum(rms**2 for rms in found[130:]) / 20)
    assert math.isclose(later, 0.2, rel_tol=0.1)  # others are held there in the long run


def test_a_longer_gradient_makes_a_longer_update() -> None:
    """The root mean square is that of many steps, and not made the same in each."""
    grads = [grad * (2 if k == 50 else 1) for k, grad in enumerate(gradients((40, 30), 51))]
    found = root_mean_squares(grads, beta=0.95, update_rms=0.2)
    assert found[50] > 1.5 * found[49]


def test_no_element_moves_further_than_five_times_the_root_mean_square() -> None:
    """One of ten thousand had a gradient, and so the scale is huge when all have."""
    one = torch.zeros(100, 100)
    one[3, 4] = 1
    found = root_mean_squares([one] * 60 + [torch.ones(100, 100)], beta=0.95, update_rms=0.2)
    assert math.isclose(found[-1], 1.0, rel_tol=0.01)


def test_a_gradient_of_zero_at_first_does_no_harm() -> None:
    weight, state = trained(torch.ones(3, 4), [torch.zeros(3, 4)], update_rms=0.2)
    assert torch.equal(weight, torch.ones(3, 4))
    assert state["update_square_average"] == 0
    found = root_mean_squares([torch.zeros(3, 4), torch.ones(3, 4)], update_rms=0.2)
    assert found[0] == 0
    assert math.isclose(found[1], 0.2, rel_tol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_value_that_is_not_finite_spoils_its_own_weight_alone(value: float) -> None:
    grads = gradients((50, 40), 6)
    grads[2][3, 4] = value
    weight, _ = trained(torch.zeros(50, 40), grads, lr=0.1, beta=0.95, momentum=0.9, update_rms=0.2, cover_block=1)
    assert weight.isnan().sum() == 1
    assert weight.nan_to_num().abs().max() < 1.0


@pytest.mark.parametrize("numel", [1, 2, 3, 1000, 10**6, 10**9, 10**12, 2**50 - 1])
def test_a_sum_of_squares_cannot_overflow(numel: int) -> None:
    squares = square_sum((numel,), torch.zeros((), dtype=torch.int64))
    assert numel * squares.cap <= LARGEST < 2**63
    for value in (math.inf, math.nan, 1e30, 40.0):
        squares.partial.zero_()
        squares.add(torch.tensor([value]))
        assert squares.partial.item() == squares.cap  # to the last bit: a power of 2


def test_small_squares_are_not_lost() -> None:
    """Not even in a tensor of 10^9 elements."""
    assert square_sum((1000, 10**6), torch.zeros((), dtype=torch.int64)).per_one * 0.005**2 > 100


def test_a_loaded_state_goes_on_as_if_nothing_had_been() -> None:
    grads = gradients((7, 5), 8)
    once, _ = trained(torch.ones(7, 5), grads, **EVERYTHING)
    param = torch.nn.Parameter(torch.ones(7, 5))
    optimizer = SM3([param], **EVERYTHING)
    for k, grad in enumerate(grads):
        if k == 4:
            saved, optimizer = optimizer.state_dict(), SM3([param])  # the options come with the state
            optimizer.load_state_dict(saved)
        param.grad = grad
        optimizer.step()
    assert torch.equal(param.detach(), once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias_correction": True}, "beta is 0"),
        ({"nesterov": True}, "momentum is 0"),
        ({"update_rms": 0.0}, "update_rms must be greater than 0"),
        ({"update_rms": math.nan}, "update_rms must be greater than 0"),
        ({"cover_product": True}, "cover_product=True is for block covers"),
        ({"cover_block": 0}, "cover_block must be an integer of at least 1"),
        ({"cover_block": 2.0}, "cover_block must be an integer of at least 1"),
        ({"cover_block": True}, "cover_block must be an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SM3([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({"momentum": 0.0}, "nesterov"),
        ({"beta": 0.0}, "bias_correction"),
        ({"cover_block": None}, "cover_product"),
    ],
    ids=str,
)
def test_the_recipe_may_lack_what_others_need(options: dict[str, Any], off: str) -> None:
    (usual,) = SM3.adamw_like([torch.nn.Parameter(torch.ones(2))]).param_groups
    (group,) = SM3.adamw_like([torch.nn.Parameter(torch.ones(2))], **options).param_groups
    assert usual[off]
    assert not group[off]


def test_the_recipe_is_that_of_the_documentation() -> None:
    (group,) = SM3.adamw_like([torch.nn.Parameter(torch.ones(2))], lr=1e-3).param_groups
    wanted = {"momentum": 0.9, "nesterov": True, "beta": 0.95, "bias_correction": True}
    wanted |= {"update_rms": 1.0, "cover_block": 64, "cover_product": True, "weight_decay": 0.0, "lr": 1e-3}
    assert {key: group[key] for key in wanted} == wanted
    documented = (Path(__file__).parent.parent / "docs" / "quality.md").read_text()
    for key, value in ADAMW_LIKE.items():
        assert f"| `{key}` | {value} |" in documented


def test_a_param_group_of_the_recipe_may_take_sparse_gradients() -> None:
    """As the message says that refuses them."""
    embedding, layer = torch.nn.Embedding(5, 4, sparse=True), torch.nn.Linear(4, 3)
    off = {"update_rms": None, "cover_block": None, "cover_product": False, "momentum": 0, "nesterov": False}
    off |= {"stochastic_rounding": False}
    groups = [{"params": embedding.parameters(), **off}, {"params": layer.parameters()}]
    optimizer = SM3.adamw_like(groups, lr=1e-3)
    layer(embedding(torch.tensor([1, 3]))).sum().backward()
    before = embedding.weight.detach().clone()
    optimizer.step()
    assert (embedding.weight != before).any(1).tolist() == [False, True, False, True, False]


def test_a_message_says_which_param_group_is_wrong() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    with pytest.raises(ValueError, match=r"cover_block, to 64 say, or leave it out \(in param group 1\)"):
        SM3([groups[0], groups[1] | {"cover_product": True}])


def test_the_squares_of_a_step_that_failed_are_forgotten() -> None:
    layer, table = torch.nn.Linear(4, 3, bias=False), torch.nn.Embedding(5, 4, sparse=True)
    optimizer = SM3([*layer.parameters(), *table.parameters()], beta=0.9, update_rms=1.0, backend="eager")
    layer(torch.ones(4)).sum().backward()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse gradient"):
        optimizer.step()
    assert optimizer.state[layer.weight]["accumulator_0"].all()  # that one had taken its step
    (entry,) = (entry for entry in optimizer._current_plan().entries if entry.param is layer.weight)
    assert entry.squares.partial == 0


@pytest.mark.parametrize("options", [{"update_rms": 0.2}, {"cover_block": 2}], ids=str)
def test_sparse_gradients_refuse_what_has_no_meaning_for_them(options: dict[str, Any]) -> None:
    embedding = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = SM3(embedding.parameters(), **options)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse gradient"):
        optimizer.step()


def test_eager_steps_on_a_device_wait_for_nothing(monkeypatch):
    """Not for the count of steps either, which lies there too. Nobody can read a tensor on the meta device."""
    monkeypatch.setattr("sm3_dist.step.state.step_device", lambda param: param.device)
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(40, 30), (7,), (4, 3, 2, 2)]]
    optimizer = SM3.adamw_like(params, lr=0.1, backend="eager", nesterov=True, weight_decay=0.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert {value.device.type for param in params for value in optimizer.state[param].values()} == {"meta"}


def test_the_correction_on_a_device_is_that_of_the_host():
    steps = torch.cat([torch.arange(2000.0), 2 ** torch.arange(11.0, 24.0)])
    for beta in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999):
        group = {"beta": beta, "bias_correction": True}
        expected = torch.tensor([correction_of(group, step) for step in steps.tolist()], dtype=torch.float32)
        assert torch.equal(correction(torch.tensor(beta, dtype=torch.float64), steps).float(), expected)
