"""Updates of a wanted root mean square, and the sums of squares for it."""

import math
from typing import Any

import pytest
import torch
from against_reference import some_gradient
from test_layouts import STEPS
from test_maths import gradients, trained
from torch import Tensor

from sm3_dist import SM3
from sm3_dist.maths.reference import ReferenceState, reference_step
from sm3_dist.maths.rms import LARGEST, square_sum


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
    """However long updates were before, and those of the step are."""
    for average in (0, 1, LARGEST):
        squares = square_sum((numel,), torch.tensor(average))
        assert numel * squares.cap <= LARGEST < 2**63
        carrier = squares.carrier(first=1.0)
        largest = min(squares.cap, carrier.item() / 2 * squares.per_one)
        for value in (math.inf, math.nan, 1e30, 40.0):
            squares.partial.zero_()
            squares.add(torch.tensor([value]), carrier)
            assert squares.partial.item() == largest  # to the last bit: a power of 2
    assert largest == squares.cap


def test_small_squares_are_not_lost() -> None:
    """Not even in a tensor of 10^9 elements."""
    assert square_sum((1000, 10**6), torch.zeros((), dtype=torch.int64)).per_one * 0.005**2 > 100


def test_squares_that_have_become_tiny_are_not_lost() -> None:
    """Each counts as one grain: a 512th, or less, of the mean square so far."""
    squares = square_sum((1000,), torch.tensor(LARGEST // 2000))
    squares.add(torch.full((1000,), 1e-18), squares.carrier(first=1.0))
    assert 0 < squares.partial.item() <= LARGEST // 2000 // 512


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
