"""SM3 as a ``torch.optim.Optimizer``: arguments, param groups, schedulers, memory."""

from contextlib import nullcontext
from typing import Any

import pytest
import SM3 as torch_sm3
import torch
from steps import assert_equal, parameters, take_steps, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sm3_dist import SM3, step_in_backward
from sm3_dist.maths.reference import ReferenceState, reference_step


def test_the_first_arguments_are_those_of_torch_sm3() -> None:
    ours, theirs = SM3(parameters()), torch_sm3.SM3(parameters())
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults
    positional = SM3(parameters(), 0.2, 0.8, 0.7, 1e-8, 0.01).defaults
    assert [positional[key] for key in ("lr", "momentum", "beta", "eps", "weight_decay")] == [0.2, 0.8, 0.7, 1e-8, 0.01]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", torch.ones(2)),
        ("momentum", 1.0),
        ("beta", -0.5),
        ("beta", 1.0),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
    ],
)
def test_refuses_values_out_of_range_and_says_which(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        SM3(parameters(), **{name: value})


def test_refuses_parameters_of_other_types() -> None:
    with pytest.raises(
        TypeError, match=r"parameter 0 of param group 0 of shape \(2,\) is torch.complex64.*view_as_real"
    ):
        SM3([torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(TypeError, match=r"parameter 'table'.* is torch.int64"):
        SM3([("table", torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(TypeError, match=r"float32, float64, bfloat16 and float16, but .* torch.float8_e4m3fn. Leave"):
        SM3([torch.zeros(2, dtype=torch.float8_e4m3fn)])


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises((ValueError, NotImplementedError), match="abacus"):
        SM3(parameters(), backend="abacus")


def test_named_parameters_keep_their_names() -> None:
    layer = nn.Linear(3, 2)
    optimizer = SM3(layer.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_a_tensor_learning_rate_equals_a_float() -> None:
    as_float, as_tensor = SM3(parameters(), lr=0.3, weight_decay=0.0), SM3(parameters(), lr=torch.tensor(0.3))
    take_steps(as_float, 3)
    take_steps(as_tensor, 3)
    assert_equal(as_float, as_tensor)
    assert isinstance(as_tensor.param_groups[0]["lr"], Tensor)


def test_schedulers_drive_the_learning_rate() -> None:
    for lr in (0.3, torch.tensor(0.3)):
        optimizer = SM3(parameters(), lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
        before = [w.clone() for w in weights(optimizer)]
        take_steps(optimizer, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(optimizer), strict=True))
        scheduler.step()
        take_steps(optimizer, 1)
        assert not any(torch.equal(a, b) for a, b in zip(before, weights(optimizer), strict=True))


def test_closure() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = SM3([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0  # type: ignore[call-overload]
    assert param.item() == pytest.approx(1.9)


def test_param_groups_have_their_own_settings() -> None:
    a, b, c = parameters()
    optimizer = SM3([{"params": [a], "lr": 0.5, "momentum": 0.9}, {"params": [b], "beta": 0.9}], weight_decay=0.1)
    optimizer.add_param_group({"params": c, "weight_decay": 0.0, "maximize": True})
    expected = [p.detach().clone() for p in (a, b, c)]
    states = [ReferenceState.zeros(w) for w in expected]
    options: list[dict[str, Any]] = [
        {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
        {"beta": 0.9, "weight_decay": 0.1},
        {"maximize": True},
    ]
    for step in range(3):
        take_steps(optimizer, 1, seed=step)
        for w, p, state, kwargs in zip(expected, (a, b, c), states, options, strict=True):
            assert p.grad is not None
            reference_step(w, p.grad, state, **kwargs)
    assert all(torch.equal(p, w) for p, w in zip((a, b, c), expected, strict=True))


def test_add_param_group_later_keeps_the_state() -> None:
    a, b, _ = parameters()
    optimizer = SM3([a], momentum=0.9)
    take_steps(optimizer, 2)
    before = {key: value.clone() for key, value in optimizer.state[a].items()}
    optimizer.add_param_group({"params": [b]})
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[a].items())
    take_steps(optimizer, 1)
    assert optimizer.state[a]["step"] == 3
    assert optimizer.state[b]["step"] == 1


def test_a_refused_param_group_is_not_added() -> None:
    optimizer = SM3(parameters())
    with pytest.raises(ValueError, match="momentum must be"):
        optimizer.add_param_group({"params": [torch.zeros(2)], "momentum": 2.0})
    assert len(optimizer.param_groups) == 1


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make: the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.layout == torch.strided and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("shape", [(3_000_000,), (1500, 2000), (2, 1_500_000), (1_500_000, 2), (1, 3_000_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temporaries_are_small_however_large_the_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SM3([param], momentum=0.9, beta=0.9, weight_decay=0.1, backend="eager")
    param.grad = torch.zeros_like(param)
    optimizer.step()  # makes the state
    with LiveBytes() as live:
        param.grad.fill_(1.0)
        optimizer.step()
    assert 0 < live.largest <= 1 << 20


def test_parameters_that_the_model_has_no_more_are_warned_of_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = SM3(model.parameters())
    model[0] = nn.Linear(4, 4)  # as fully_shard does, parameter by parameter
    for step in range(5):
        model(torch.ones(2, 4)).sum().backward()
        if step == 2:
            with pytest.warns(UserWarning, match=r"none of the 2 parameters .* make the optimizer later"):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("in_backward", [False, True])
def test_parameters_that_train_now_and_then_are_not_warned_of(in_backward: bool) -> None:
    model = nn.Linear(4, 4)
    optimizer = SM3(model.parameters())
    with step_in_backward(model, optimizer) if in_backward else nullcontext():
        for step in range(8):
            if step == 2:
                model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
