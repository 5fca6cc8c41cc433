"""The options together: the same bits as the reference under every layout, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from against_reference import EVERYTHING, OPTIONS, compare_with_reference
from harness import Pool
from layouts import Tensors, cases, full, give
from sampling import crossed
from test_maths import gradients, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import fully_shard

from sm3_dist import SM3
from sm3_dist.checkpoint import get_state_dict, set_state_dict
from sm3_dist.maths.reference import ReferenceState, reference_step
from sm3_dist.step.param_groups import ADAMW_LIKE, averaging, corrected_averaging

SHARDED_COVERS = [("fsdp2", 4), ("hsdp", 4), ("tp-2d", 4), ("fsdp2-tp", 4)]


@pytest.mark.sampled("name, world_size", list(cases()))
def test_the_recipe_equals_one_process(workers: Pool, name: str, world_size: int) -> None:
    """In every layout, of which edges cut its blocks."""
    workers(world_size).run(compare_with_reference, name, EVERYTHING)


@pytest.mark.sampled("name, world_size, options", crossed(cases(), range(len(OPTIONS))))
def test_equals_one_process(workers: Pool, name: str, world_size: int, options: int) -> None:
    workers(world_size).run(compare_with_reference, name, OPTIONS[options])


@pytest.mark.sampled("name, world_size, options", crossed(SHARDED_COVERS, range(len(OPTIONS))))
def test_equals_one_process_with_sharded_covers(workers: Pool, name: str, world_size: int, options: int) -> None:
    workers(world_size).run(compare_with_reference, name, OPTIONS[options], shard_covers=True)


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
        ({"update_rms": "1"}, "update_rms must be greater than 0 .* but is '1'"),
        ({"update_rms": 1.5, "momentum": 0.9, "momentum_dtype": torch.int8}, "multiply lr instead"),
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
    with pytest.raises(ValueError, match=r"cover_block, to 64 say, or pass it as False \(in param group 1\)"):
        SM3([groups[0], groups[1] | {"cover_product": True}])


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


def test_bias_correction_on_a_device_is_that_of_the_host():
    steps = torch.cat([torch.arange(2000.0), 2 ** torch.arange(11.0, 24.0)])
    for beta in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999):  # a scheduler may set 0: then they are sums
        group = {"beta": beta, "bias_correction": True}
        expected = torch.tensor([averaging(group, step) for step in steps.tolist()], dtype=torch.float32)
        actual = torch.stack(corrected_averaging(torch.tensor(beta, dtype=torch.float64), steps), 1)
        assert torch.equal(actual.float(), expected)


def test_the_corrected_average_of_equal_squares_is_that_square():
    group, average = {"beta": 0.9, "bias_correction": True}, 0.0
    for step in range(200):
        old, new = averaging(group, step)
        average = old * average + new * 3.0
        assert abs(average - 3) < 1e-12
