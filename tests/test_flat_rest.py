"""What a model has besides its flattened parameters: buffers and modules left out, which are saved with them."""

from __future__ import annotations

import pytest
import torch
from flat_layouts import fsdp1
from harness import Pool
from torch import Tensor, nn

from sm3_dist import SM3
from sm3_dist.checkpoint import StateDictOptions, get_state_dict, set_state_dict

WHOLE = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """With buffers of two types, one of them not saved, and a layer that is not to be wrapped."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide = nn.Linear(3, 7)
        self.norm = nn.BatchNorm1d(7)
        self.apart = nn.Linear(7, 2)
        self.apart.requires_grad_(False)
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)
        self.norm(torch.randn(5, 7))


class Peculiar(nn.Linear):
    def get_extra_state(self) -> int:
        return 5


def wrapped(model: Model) -> nn.Module:
    return fsdp1(model, ignored_modules=[model.apart])


def moves() -> None:
    """Save one model and load it into another."""
    saved, other = wrapped(Model(1)), Model(2)
    weights, state = get_state_dict(saved, SM3(saved.parameters(), model=saved), options=WHOLE)
    expected = Model(1).state_dict()
    same(weights, expected)
    model = wrapped(other)
    optimizer = SM3(model.parameters(), model=model)
    refuses(model, optimizer, {**weights, "norm.running_mean": torch.zeros(3)}, state, r"running_mean has shape \(3,\)")
    refuses(model, optimizer, {**weights, "new": torch.zeros(1)}, state, "another model: unexpected: new$")
    del weights["norm.running_var"]
    refuses(model, optimizer, weights, state, "another model: missing: norm.running_var$")
    weights["new"] = torch.zeros(1)
    options = StateDictOptions(full_state_dict=True, strict=False)
    keys = set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    assert (keys.missing_keys, keys.unexpected_keys) == (["norm.running_var"], ["new"])
    found, _ = get_state_dict(model, optimizer, options=WHOLE)
    same(found, {**expected, "norm.running_var": Model(2).norm.running_var})
    assert other.scratch.tolist() == [2.0, 2.0]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def refuses(model: nn.Module, optimizer: SM3, weights: dict[str, Tensor], state: dict[str, object], why: str) -> None:
    """And changes nothing."""
    before, _ = get_state_dict(model, optimizer, options=WHOLE)
    with pytest.raises(RuntimeError, match=why):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=WHOLE)
    same(get_state_dict(model, optimizer, options=WHOLE)[0], before)
    same(before, Model(2).state_dict())


def without_frozen() -> list[str]:
    model = wrapped(Model(1))
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    return list(get_state_dict(model, SM3(model.parameters(), model=model), options=options)[0])


def refuses_extra_state() -> None:
    model = fsdp1(nn.Sequential(Peculiar(2, 3)))
    with pytest.raises(NotImplementedError, match=r"^0 has extra state"):
        get_state_dict(model, SM3(model.parameters(), model=model))


def test_buffers_and_modules_left_out_are_saved_and_loaded(workers: Pool) -> None:
    workers(2).run(moves)


def test_what_is_frozen_is_left_out_on_demand(workers: Pool) -> None:
    expected = [name for name in Model(1).state_dict() if not name.startswith("apart.")]
    assert workers(2).run(without_frozen) == [expected] * 2


def test_extra_state_is_refused(workers: Pool) -> None:
    workers(2).run(refuses_extra_state)
