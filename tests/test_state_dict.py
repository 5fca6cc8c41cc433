"""Copies, ``state_dict`` and ``load_state_dict``: what is loaded goes on alike."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import SM3 as torch_sm3
import torch
from steps import assert_equal, parameters, take_steps, weights
from torch import nn

from sm3_dist import SM3
from sm3_dist.checkpoint import get_optimizer_state_dict, set_optimizer_state_dict


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


def test_options_that_do_not_fit_are_refused_when_they_are_loaded() -> None:
    """Momentum in 8 bits was cut off, at 1.9375, for ever."""
    wide = SM3(parameters(), momentum=0.9, update_rms=5.0)
    narrow = SM3(parameters(), momentum=0.9, update_rms=1.0, momentum_dtype=torch.int8)
    take_steps(wide, 1)
    with pytest.raises(ValueError, match=r"update_rms=5\.0 would exceed"):
        narrow.load_state_dict(wide.state_dict())
    assert narrow.param_groups[0]["update_rms"] == 1.0


def test_momentum_that_was_set_to_0_on_the_way() -> None:
    model, twin = (nn.ParameterList(parameters()) for _ in range(2))
    optimizer, loaded, by_name = (
        SM3.adamw_like(model.parameters()),
        *(SM3.adamw_like(twin.parameters()) for _ in "ab"),
    )
    take_steps(optimizer, 1)
    optimizer.param_groups[0]["momentum"] = 0.0
    take_steps(optimizer, 1)
    loaded.load_state_dict(optimizer.state_dict())
    set_optimizer_state_dict(twin, by_name, get_optimizer_state_dict(model, optimizer))
    assert [each.param_groups[0]["momentum"] for each in (loaded, by_name)] == [0.0, 0.0]
