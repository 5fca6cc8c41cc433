"""A checkpoint or a state that does not fit: said, and nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from moving import SETTINGS, STEPS, Wrapped, differences, expected, fresh, single, spoil, trained
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from sm3_dist import SM3
from sm3_dist.checkpoint import (
    BoxedTensor,
    CheckpointError,
    StateDictOptions,
    TrainState,
    get_optimizer_state_dict,
    get_state_dict,
    load,
    set_optimizer_state_dict,
    set_state_dict,
)
from sm3_dist.checkpoint import train_state as train_state_module


def spoiled_state(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    state = copy.deepcopy(get_optimizer_state_dict(*trained()))
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"].pop("embed.weight"), r"nothing for 1 of the optimizer's tensors: embed\.weight"),
        (lambda s: s["state"]["embed.weight"].pop("accumulator_1"), "has no accumulator_1"),
        (lambda s: s["state"]["embed.weight"].pop("momentum_buffer"), "momentum_buffer.*needed for momentum > 0"),
        (lambda s: s["state"]["embed.weight"].update(accumulator_0=torch.ones(8)), r"\(8,\).*needs \(7,\)"),
        (lambda s: s["state"]["embed.weight"].update(exp_avg_sq=s["state"]["embed.weight"].pop("step")), "from_adamw"),
        (lambda s: s["state"].update({"embed.weight": {"step": torch.tensor(1.0)}}), "It is not the state of SM3"),
        (lambda s: s["param_groups"][0].update(beta=1.5), "beta must be"),
        (lambda s: s["param_groups"][0]["params"].remove("conv.weight"), r"conv\.weight"),
        (lambda s: s["param_groups"][0].update(update_rms=0.2), "needed for update_rms"),
        (lambda s: s["param_groups"][0].update(cover_block=9), "cover_block=9, but this optimizer has .*None"),
    ],
    ids=[
        "tensor",
        "accumulator",
        "momentum",
        "shape",
        "adamw",
        "other",
        "hyperparameter",
        "group",
        "update_rms",
        "covers",
    ],
)
def test_state_that_does_not_fit_changes_nothing(change: Callable[[dict[str, Any]], None], message: str) -> None:
    model, optimizer = wrapped = trained()
    with pytest.raises(ValueError, match=message):
        set_optimizer_state_dict(model, optimizer, spoiled_state(change))
    assert differences(wrapped, expected(STEPS)) == []
    assert optimizer.param_groups[0]["beta"] == SETTINGS["beta"]


def test_covers_of_another_size_change_nothing_though_their_shapes_are_equal() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    model = nn.ParameterDict({"weight": weight})
    optimizers = [SM3(model.named_parameters(), cover_block=block) for block in (64, 128)]
    weight.grad = torch.ones(8, 8)
    for optimizer in optimizers:
        optimizer.step()
    with pytest.raises(ValueError, match="cover_block=64, but this optimizer has cover_block=128"):
        set_optimizer_state_dict(model, optimizers[1], get_optimizer_state_dict(model, optimizers[0]))
    optimizers[1].step()
    assert optimizers[1].state[weight]["step"] == 2


def under_another_layout(shapes: list[tuple[int, ...]]) -> None:
    """What a rank has of each tensor under ZeRO-1 is less than a model on one rank needs, for some tensors at least."""
    weights = {str(i): torch.ones(shape) for i, shape in enumerate(shapes)}
    model, whole = (nn.ParameterDict({n: nn.Parameter(w.clone()) for n, w in weights.items()}) for _ in range(2))
    sharded = SM3(model.named_parameters(), shard_over=dist.group.WORLD)
    optimizer = SM3(whole.named_parameters(), lr=0.5)
    for each in (sharded, optimizer):
        for factor, param in enumerate(each.param_groups[0]["params"], 1):
            param.grad = torch.full_like(param, factor if each is sharded else 7.0)
        each.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="saved under another layout"):
        set_optimizer_state_dict(whole, optimizer, get_optimizer_state_dict(model, sharded))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("shapes", [[(4, 5)] * 3, [()]], ids=["parts", "one-rank-has-all"])
def test_state_under_another_layout_changes_nothing(workers: Pool, shapes: list[tuple[int, ...]]) -> None:
    workers(2).run(under_another_layout, shapes)


def stages(folder: Path) -> None:
    """Each rank has tensors and param groups of its own; what does not fit the first one's is an error of both."""
    rank = dist.get_rank()

    def made(momentum: float) -> dict[str, TrainState]:
        model = nn.ParameterDict({f"w{rank}{k}": nn.Parameter(torch.ones(4, 5)) for k in range(1 + rank)})
        optimizer = SM3([{"params": [each]} for each in model.items()], lr=0.1 / (1 + rank), momentum=momentum)
        return {f"stage{rank}": TrainState(model, optimizer)}

    save(made(0.9), checkpoint_id=folder)
    read = made(0.9)
    load(read, folder)
    assert [group["lr"] for group in read[f"stage{rank}"].optimizers[0].param_groups] == [0.1 / (1 + rank)] * (1 + rank)
    with pytest.raises(CheckpointError, match=r"'w00' has momentum_buffer too"):
        load(made(0.9 if rank else 0.0), folder)


def test_what_does_not_fit_one_stage_is_an_error_of_all(workers: Pool, tmp_path: Path) -> None:
    workers(2).run(stages, tmp_path)


def test_what_is_missing_may_stay_as_it_is() -> None:
    state = spoiled_state(lambda s: s["state"].pop("embed.weight"))
    model, optimizer = single(1)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    assert not optimizer.state[model.get_parameter("embed.weight")]["accumulator_0"].any()
    assert optimizer.state[model.get_parameter("conv.weight")]["accumulator_0"].all()


def test_parameter_of_no_model() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of param group 0.*is not a parameter of the model"):
        get_optimizer_state_dict(nn.Linear(2, 2), SM3(nn.Linear(2, 2).parameters()))


def test_a_boxed_tensor_is_not_to_be_calculated_with() -> None:
    shell = BoxedTensor((4,), [], [], [], torch.float32, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="full_state_dict=True"):
        shell + 1


def of_another_model(folder: Path, world: int) -> None:
    model = nn.Linear(3, 3)
    load({"train": TrainState(model, SM3(model.parameters()))}, folder)


def test_checkpoint_of_another_model(workers: Pool, saved: Path) -> None:
    workers(2).run_raises(CheckpointError, of_another_model, saved, 2, match="another model")


def other_settings(folder: Path, world: int) -> None:
    model = single(1).model
    load({"train": TrainState(model, SM3(model.parameters(), update_rms=0.2))}, folder)


def test_checkpoint_of_other_settings(workers: Pool, saved: Path) -> None:
    workers(2).run_raises(CheckpointError, other_settings, saved, 2, match="update_square_average.*other settings")


OVERWRITTEN = {
    # what was found when all had been loaded in place: settings of the checkpoint, those of the optimizer, words
    "momentum": ({"momentum": 0.9}, {}, "momentum_buffer too, .* saved with momentum > 0"),
    "update_rms": ({"update_rms": 0.5}, {}, "update_square_average too, .* saved with update_rms"),
    "covers": ({"cover_block": 64}, {"cover_block": 128}, "cover_block=64, but this optimizer has cover_block=128"),
}


@pytest.mark.parametrize("case", [*OVERWRITTEN, "param groups"])
def test_what_a_checkpoint_has_more_is_found_before_anything_is_loaded(tmp_path: Path, case: str) -> None:
    first, second = single(1).model, single(1).model
    then, now, words = OVERWRITTEN.get(case, ({}, {}, "different hyperparameters: lr of 0.5 and of 0.1"))
    embed, *others = first.parameters()
    groups = [{"params": [embed], "lr": 0.5}, {"params": others}] if case == "param groups" else [*first.parameters()]
    save({"train": TrainState(first, SM3(groups, **then))}, checkpoint_id=tmp_path, no_dist=True)  # type: ignore[arg-type]
    wrapped = Wrapped(second, SM3(second.parameters(), **now))
    spoil(wrapped)
    with pytest.raises(CheckpointError, match=words):
        load({"train": TrainState(*wrapped)}, tmp_path)
    assert all(bool((p == -5).all()) for p in second.parameters()), "something was loaded"


def test_newer_format(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_state_module, "FORMAT_VERSION", 2)
    save({"train": TrainState(*trained())}, checkpoint_id=saved.with_name("newer"), no_dist=True)
    monkeypatch.undo()
    state = fresh()
    spoil(Wrapped(state.model, state.optimizers[0]))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"format version 2.*up to 1"):
        load({"train": state}, saved.with_name("newer"))
    assert all(bool((p == -5).all()) for p in state.model.parameters()), "something was loaded"


def test_what_does_not_fit_one_of_several_optimizers_changes_none() -> None:
    model, saved = single(1).model, trained()
    embed, *others = model.parameters()
    optimizers = [SM3([embed], momentum=0.9), SM3(others, momentum=0.9, cover_block=3)]
    with pytest.raises(ValueError, match="cover_block=None, but this optimizer has cover_block=3"):
        set_optimizer_state_dict(model, optimizers, get_optimizer_state_dict(*saved))
    assert not optimizers[0].state[embed]["accumulator_0"].any()


def test_weights_of_another_model_change_no_optimizer() -> None:
    weights, state = get_state_dict(*trained())
    model, optimizer = single(1)
    model.register_buffer("more", torch.zeros(3))
    frozen = model.get_parameter("embed.weight").requires_grad_(False)
    with pytest.raises(RuntimeError, match="more"):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert not optimizer.state[model.get_parameter("conv.weight")]["accumulator_0"].any()
    assert frozen not in optimizer.state


def rank_0_has_none(state: Any) -> None:
    set_optimizer_state_dict(*single(1), state, options=StateDictOptions(True, broadcast_from_rank0=True))


def test_what_rank_0_cannot_send_is_an_error_on_every_rank(workers: Pool) -> None:
    for state in (None, {"state": {"embed.weight": {"momentum_buffer": None}}, "param_groups": []}):
        workers(2).run_raises(ValueError, rank_0_has_none, state, match="rank 0 cannot send what is to be loaded")


def test_frozen_parameters_may_be_missing() -> None:
    model, optimizer = wrapped = trained()
    frozen = model.get_parameter("embed.weight").requires_grad_(False)
    options = StateDictOptions(ignore_frozen_params=True)
    state = get_optimizer_state_dict(*wrapped, options=options)
    assert "embed.weight" not in state["state"]
    set_optimizer_state_dict(model, optimizer, state, options=options)
    assert optimizer.state[frozen]["accumulator_0"].all(), "it lost what it had"


def test_a_learning_rate_that_is_a_tensor_is_copied() -> None:
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    other = single(1)
    set_optimizer_state_dict(*other, get_optimizer_state_dict(model, optimizer))
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert other.optimizer.param_groups[0]["lr"] == 0.25
