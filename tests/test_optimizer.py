"""SM3 as a ``torch.optim.Optimizer``: arguments, param groups, gradients of every kind, saving and loading."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import SM3 as torch_sm3
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sm3_dist import SM3
from sm3_dist.maths.reference import ReferenceState, reference_step


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (5,), (2, 3, 2)]]


def take_steps(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Steps with gradients that depend on nothing but the shapes, the seed and the number of the step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Same weights and state, in the order of the param groups, to the last bit."""
    for one, other in zip(weights(a), weights(b), strict=True):
        assert torch.equal(one, other)
    states = [[optimizer.state[p] for g in optimizer.param_groups for p in g["params"]] for optimizer in (a, b)]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# Arguments


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


def test_refuses_complex_and_integer_parameters() -> None:
    with pytest.raises(
        TypeError, match=r"parameter 0 of param group 0 of shape \(2,\) is torch.complex64.*view_as_real"
    ):
        SM3([torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(TypeError, match=r"parameter 'table'.* is torch.int64"):
        SM3([("table", torch.zeros(2, dtype=torch.int64))])


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


# Gradients


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    a, b, frozen = parameters()
    frozen.requires_grad_(False)
    optimizer = SM3([a, b, frozen], momentum=0.9, beta=0.9, weight_decay=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    kept = [copy.deepcopy((w, optimizer.state.get(p))) for w, p in zip(weights(optimizer), (a, b, frozen), strict=True)]
    a.grad, b.grad = torch.ones_like(a), None
    optimizer.step()
    assert not torch.equal(a, kept[0][0])
    for param, (weight, state) in zip((b, frozen), kept[1:], strict=True):
        assert torch.equal(param, weight)
        assert all(torch.equal(value, optimizer.state[param][key]) for key, value in (state or {}).items())
    assert optimizer.state[b]["step"] == 1


def test_every_rank_makes_the_same_state_whatever_its_gradients() -> None:
    a, b, _ = parameters()
    optimizer = SM3([a, b], momentum=0.9)
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert set(optimizer.state[b]) == {"step", "accumulator_0", "momentum_buffer"}
    assert optimizer.state[b]["step"] == 0


def test_a_thawed_parameter_is_updated() -> None:
    a, b, _ = parameters()
    b.requires_grad_(False)
    optimizer = SM3([a, b])
    a.grad = torch.ones_like(a)
    optimizer.step()
    b.requires_grad_(True)
    before = b.detach().clone()
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert not torch.equal(before, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(6, 4, 5, generator=generator).to(dtype), torch.randn(3, 6, 4, 5, generator=generator)
    results = []
    for permute in [(0, 1, 2), (2, 0, 1), (1, 2, 0)]:
        inverse = [permute.index(d) for d in range(3)]
        param = nn.Parameter(start.permute(permute).clone(memory_format=torch.contiguous_format).permute(inverse))
        optimizer = SM3([param], momentum=0.9)
        for number, grad in enumerate(grads.to(dtype)):
            strided = grad.permute(permute).contiguous().permute(inverse)
            param.grad = strided if number else grad.clone()  # parameter and gradient of different strides, too
            optimizer.step()
        results.append(param.detach())
    assert all(torch.equal(results[0], result) for result in results[1:])


def sparse_grad(rows: list[int], values: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, size, check_invariants=True)


def test_sparse_gradient_updates_its_rows_alone() -> None:
    param = nn.Parameter(torch.ones(5, 3))
    optimizer = SM3([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 1.0], [2.0, 2.0, 2.0]])
    for _ in range(2):
        param.grad = sparse_grad([3, 1, 3], values, (5, 3))  # row 3 twice: summed first
        optimizer.step()
    expected, rows = torch.ones(5, 3), torch.zeros(5)
    summed = {1: values[1], 3: values[0] + values[2]}
    for _ in range(2):
        for row, grad in summed.items():
            nu = rows[row] + grad * grad
            expected[row] = expected[row] * (1 - 0.5 * 0.1) - (grad * torch.rsqrt(nu + 1e-30)) * 0.5
            rows[row] = nu.max()
    assert torch.equal(param, expected)
    assert torch.equal(optimizer.state[param]["accumulator_0"], rows)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.zeros(5, 3))


def test_sparse_gradients_of_an_embedding_train_it() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SM3(embedding.parameters(), lr=0.1, beta=0.9)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([2, 7, 2])).square().sum().backward()
    optimizer.step()
    changed = (embedding.weight != before).any(1).nonzero().flatten()
    assert changed.tolist() == [2, 7]


def test_sparse_gradients_of_several_sparse_dimensions() -> None:
    param = nn.Parameter(torch.zeros(3, 4))
    indices = torch.tensor([[2, 0, 2], [1, 3, 3]])
    param.grad = torch.sparse_coo_tensor(indices, torch.tensor([3.0, 1.0, 2.0]), (3, 4))
    optimizer = SM3([param], lr=1.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["accumulator_0"], torch.tensor([1.0, 0.0, 9.0]))
    assert torch.equal(optimizer.state[param]["accumulator_1"], torch.tensor([0.0, 9.0, 0.0, 4.0]))
    assert torch.equal(param, -(param.grad.to_dense() != 0).float())


def test_an_empty_sparse_gradient_changes_nothing() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = sparse_grad([], torch.zeros(0, 2), (3, 2))
    SM3([param]).step()
    assert torch.equal(param, torch.ones(3, 2))


def test_dense_gradients_may_follow_sparse_ones() -> None:
    """Whatever the cover, an entry bounds from above what was summed for every element that it covers."""
    param = nn.Parameter(torch.zeros(4, 3))
    optimizer = SM3([param])
    total = torch.zeros(4, 3)
    for step in range(4):
        grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        if step % 2 == 0:
            grad[1:3] = 0
            param.grad = sparse_grad([0, 3], grad[[0, 3]], (4, 3))
        else:
            param.grad = grad
        optimizer.step()
        total += grad * grad
        state = optimizer.state[param]
        assert (state["accumulator_0"] >= total.amax(1) * 0.999999).all()
        assert (state["accumulator_1"] >= total.amax(0) * 0.999999).all()


# Memory


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


# Copies, saving and loading


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_alike(copy_of: Any) -> None:
    optimizer = SM3(parameters(), momentum=0.9, beta=0.9)
    take_steps(optimizer, 2)
    twin = copy_of(optimizer)
    assert_equal(optimizer, twin)
    take_steps(optimizer, 2, seed=1)
    take_steps(twin, 2, seed=1)
    assert_equal(optimizer, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_state_dict_goes_on_alike(dtype: torch.dtype) -> None:
    def make() -> SM3:
        return SM3([nn.Parameter(p.detach().to(dtype)) for p in parameters()], momentum=0.9, lr=torch.tensor(0.1))

    optimizer = make()
    take_steps(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = make()
    with torch.no_grad():
        for ours, theirs in zip(weights(loaded), weights(optimizer), strict=True):
            ours.copy_(theirs)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(optimizer, loaded)
    take_steps(optimizer, 2, seed=1)
    take_steps(loaded, 2, seed=1)
    assert_equal(optimizer, loaded)


def test_a_state_dict_is_copied_when_it_is_loaded() -> None:
    optimizer = SM3(parameters())
    take_steps(optimizer, 1)
    saved = optimizer.state_dict()
    twin = SM3(parameters())
    twin.load_state_dict(saved)
    before = copy.deepcopy(twin.state_dict()["state"])
    take_steps(optimizer, 1)
    after = twin.state_dict()["state"]
    assert all(torch.equal(before[k][key], after[k][key]) for k in before for key in before[k])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_loads_what_torch_sm3_saved(momentum: float) -> None:
    theirs = torch_sm3.SM3([nn.Parameter(p.detach()) for p in parameters()], momentum=momentum)
    take_steps(theirs, 3)
    ours = SM3([nn.Parameter(w.clone()) for w in weights(theirs)], momentum=0.5, weight_decay=0.25)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["momentum"] == momentum
    assert ours.param_groups[0]["weight_decay"] == 0.25  # theirs has none: ours stays
    ours.param_groups[0]["weight_decay"] = 0.0
    assert ours.state[ours.param_groups[0]["params"][0]]["accumulator_1"].shape == (3,)
    take_steps(ours, 3, seed=1)
    take_steps(theirs, 3, seed=1)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert (a - b).abs().max() <= 4 * np.spacing(np.float32(2))


def test_loads_what_torch_sm3_saved_of_sparse_gradients() -> None:
    param = nn.Parameter(torch.zeros(3, 2))
    optimizer = SM3([param])
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": 4, "momentum_buffer": 0.0, "accumulator_0": torch.tensor([1.0, 0.0, 9.0])}}
    optimizer.load_state_dict(saved)
    state = optimizer.state[param]
    assert torch.equal(state["accumulator_0"], torch.tensor([1.0, 0.0, 9.0]))
    assert torch.equal(state["accumulator_1"], torch.tensor([9.0, 9.0]))  # the tightest bound that is known
    assert state["step"] == 4


def test_a_state_of_other_shapes_is_refused_and_nothing_is_changed() -> None:
    optimizer = SM3(parameters(), momentum=0.9)
    take_steps(optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    other = SM3([nn.Parameter(torch.zeros(4, 7)), *parameters()[1:]])
    take_steps(other, 1)
    with pytest.raises(ValueError, match=r"accumulator_1 of parameter 0 .* has shape \(7,\) .* stores \(3,\)"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for k, state in before["state"].items():
        assert all(torch.equal(value, after["state"][k][key]) for key, value in state.items())


def test_hooks_see_the_state_dict_that_is_loaded() -> None:
    optimizer = SM3(parameters())
    take_steps(optimizer, 1)
    twin, seen = SM3(parameters()), []

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {k: {key: value * 2 for key, value in s.items()} for k, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    twin.register_load_state_dict_pre_hook(double)
    twin.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    twin.load_state_dict(optimizer.state_dict())
    first, ours = weights(optimizer)[0], twin.state[twin.param_groups[0]["params"][0]]
    assert torch.equal(
        ours["accumulator_0"], optimizer.state[optimizer.param_groups[0]["params"][0]]["accumulator_0"] * 2
    )
    assert seen == [3]
    assert first.shape == (4, 3)


def test_exchanged_parameters_keep_their_state() -> None:
    """Some training libraries replace the tensors in ``param_groups`` after the optimizer was made."""
    optimizer, twin = SM3(parameters(), momentum=0.9), SM3(parameters(), momentum=0.9)
    take_steps(optimizer, 2)
    take_steps(twin, 2)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    take_steps(optimizer, 2, seed=1)
    take_steps(twin, 2, seed=1)
    assert_equal(optimizer, twin)
    assert len(optimizer.state) == 3
