"""sm3_dist.checkpoint: its options, and the whole state of a training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from moving import SETTINGS, STEPS, Wrapped, build, differences, expected, gradients, single, spoil, train, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from sm3_dist import SM3
from sm3_dist.checkpoint import (
    StateDictOptions,
    TrainState,
    get_optimizer_state_dict,
    get_state_dict,
    load,
    set_optimizer_state_dict,
    set_state_dict,
)
from sm3_dist.checkpoint.boxed import BoxedTensor
from sm3_dist.layout.box import Box

FULL = StateDictOptions(full_state_dict=True)
SOME = ("ddp", "zero", "fsdp2", "fsdp1_flat")


def whole_everywhere(world: int, options: StateDictOptions) -> list[str]:
    """Whole tensors of one layout set in another."""
    found = []
    for source, target in zip(SOME, SOME[1:] + SOME[:1], strict=True):
        first, second = build(source, world), build(target, world)
        train(first, range(STEPS))
        model, optimizer = get_state_dict(*first, options=FULL)
        if any(type(value) is not Tensor for each in optimizer["state"].values() for value in each.values()):
            found.append(f"{source}: not everything is whole")
        if options.broadcast_from_rank0 and dist.get_rank() > 0:
            model, optimizer = {}, {}
        spoil(second)
        set_state_dict(*second, model_state_dict=dict(model), optim_state_dict=optimizer, options=options)
        found += [f"{source} to {target}: {what}" for what in differences(second, expected(STEPS))]
    return found


@pytest.mark.parametrize("broadcast", [False, True])
def test_whole_tensors_from_every_rank_or_from_rank_0(workers: Pool, broadcast: bool) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    assert workers(3).run(whole_everywhere, 3, options) == [[]] * 3


def in_another_memory_order(wrapper: str) -> list[str]:
    """Send weights from rank 0 whose memory is in another order, as of convolutions in ``channels_last``."""
    net, other = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Conv2d(3, 4, 3)  # type: ignore[call-overload]
    whole = get_state_dict(net, SM3(net.parameters()), options=FULL)
    wanted = {name: value.clone() for name, value in whole[0].items()}
    model = fully_shard(other) if wrapper == "fsdp2" else DistributedDataParallel(other)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(-5)
    sent = whole if dist.get_rank() == 0 else ({}, {})
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    optimizer = SM3(model.parameters())
    set_state_dict(model, optimizer, model_state_dict=sent[0], optim_state_dict=sent[1], options=options)
    found = get_state_dict(model, optimizer, options=FULL)[0]
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_weights_in_another_memory_order_are_sent_as_they_are(workers: Pool, wrapper: str) -> None:
    assert workers(2).run(in_another_memory_order, wrapper) == [[], []]


def whole_on_cpu(world: int) -> list[bool]:
    wrapped = build("fsdp1_flat", world)
    return [bool(each) for each in get_state_dict(*wrapped, options=StateDictOptions(True, True))]


def test_whole_tensors_on_the_cpu_are_for_rank_0(workers: Pool) -> None:
    assert workers(2).run(whole_on_cpu, 2) == [[True, True], [False, False]]


def flattened_and_back(world: int) -> list[str]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    found = []
    for name in SOME:
        wrapped = build(name, world)
        train(wrapped, range(STEPS))
        flat = get_optimizer_state_dict(*wrapped, options=options)
        if not {"state.embed.weight.accumulator_0", "param_groups.block.0.bias.lr"} <= flat.keys():
            found.append(f"{name}: {list(flat)}")
        other = build(name, world)
        set_optimizer_state_dict(*other, flat, options=options)
        other.model.load_state_dict(wrapped.model.state_dict())
        found += [f"{name}: {what}" for what in differences(other, expected(STEPS))]
    return found


def test_flat_dict(workers: Pool) -> None:
    assert workers(2).run(flattened_and_back, 2) == [[]] * 2


def test_broadcast_needs_whole_tensors() -> None:
    with pytest.raises(ValueError, match="needs full_state_dict=True"):
        get_optimizer_state_dict(*single(1), options=StateDictOptions(broadcast_from_rank0=True))


def saved_in_the_background(folder: Path, world: int) -> list[str]:
    found = []
    for name in SOME:
        wrapped = build(name, world)
        train(wrapped, range(STEPS))
        group = dist.new_group(backend="gloo")  # training goes on in the others at the same time
        state = {"train": TrainState(*wrapped, step=STEPS)}
        future = async_save(state, checkpoint_id=folder / name, process_group=group)
        train(wrapped, range(STEPS, STEPS + 2))  # must not be seen in the checkpoint
        future.result()  # type: ignore[union-attr]
        other = build(name, world)
        load({"train": TrainState(*other)}, folder / name)
        found += [f"{name}: {what}" for what in differences(other, expected(STEPS))]
    return found


def test_asynchronous_saving_sees_the_state_when_it_was_called(workers: Pool, tmp_path: Path) -> None:
    assert workers(2).run(saved_in_the_background, tmp_path, 2) == [[]] * 2


def test_train_state_brings_back_everything(tmp_path: Path) -> None:
    def start() -> TrainState:
        model, optimizer = single(1)
        return TrainState(model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step)))

    first = start()
    train(Wrapped(first.model, first.optimizers[0]), range(STEPS))  # type: ignore[arg-type]
    for _ in range(STEPS):
        first.scheduler.step()  # type: ignore[union-attr]
    first.step = STEPS
    save({"train": first}, checkpoint_id=tmp_path, no_dist=True)
    wanted = torch.rand(3), random.random()
    second = start()
    load({"train": second}, tmp_path)
    assert torch.equal(torch.rand(3), wanted[0])
    assert random.random() == wanted[1]
    assert second.step == STEPS
    assert second.scheduler.last_epoch == STEPS  # type: ignore[union-attr]
    assert second.optimizers[0].param_groups[0]["lr"] == SETTINGS["lr"] / (1 + STEPS)


def test_hyperparameters_come_with_the_state() -> None:
    model, _ = wrapped = trained()
    state = get_optimizer_state_dict(*wrapped)
    other = SM3(model.parameters(), lr=5.0, momentum=0.5)
    set_optimizer_state_dict(model, other, state)
    assert {key: other.param_groups[0][key] for key in SETTINGS} == SETTINGS


def test_param_groups_are_matched_by_name() -> None:
    model = single(1).model
    by_name = dict(model.named_parameters())
    bias = by_name.pop("block.0.bias")
    first = SM3([{"params": by_name.values(), "weight_decay": 0.5}, {"params": [bias], "lr": 0.7}])
    second = SM3([{"params": [bias]}, {"params": by_name.values()}])
    set_optimizer_state_dict(model, second, get_optimizer_state_dict(model, first))
    assert [group["lr"] for group in second.param_groups] == [0.7, 0.1]
    assert [group["weight_decay"] for group in second.param_groups] == [0.0, 0.5]


def test_param_groups_are_matched_by_name_in_place_too(tmp_path: Path) -> None:
    """Other groups than were saved, of which one has a learning rate that was a tensor, and one that is one."""
    model = single(1).model
    bias, others = model.get_parameter("block.0.bias"), [p for n, p in model.named_parameters() if n != "block.0.bias"]
    saved = SM3([{"params": others}, {"params": [bias], "lr": torch.tensor(0.75)}], lr=0.25)
    save({"train": TrainState(model, saved)}, checkpoint_id=tmp_path, no_dist=True)
    rate = torch.tensor(5.0)
    optimizer = SM3([{"params": [bias], "lr": rate}, {"params": others[:2]}, {"params": others[2:]}])
    load({"train": TrainState(model, optimizer)}, tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.25, 0.25]
    assert optimizer.param_groups[0]["lr"] is rate, "a CUDA graph may have its address"
    another = SM3([{"params": [bias]}, {"params": others}])
    load({"train": TrainState(model, another)}, tmp_path)
    assert [group["lr"] for group in another.param_groups] == [0.75, 0.25]


def test_several_optimizers_of_which_one_is_not_sm3() -> None:
    model = single(1).model
    by_name = dict(model.named_parameters())
    bias = by_name.pop("block.0.bias")

    def make() -> list[Any]:
        return [SM3(by_name.values(), lr=0.2), torch.optim.AdamW([bias], lr=0.3)]

    first = make()
    for name, grad in gradients(0).items():
        model.get_parameter(name).grad = grad
    for optimizer in first:
        optimizer.step()
    state = get_optimizer_state_dict(model, first)
    assert state["state"].keys() == gradients(0).keys()
    second = make()
    set_optimizer_state_dict(model, second, state)
    assert torch.equal(second[1].state[bias]["exp_avg"], first[1].state[bias]["exp_avg"])
    weight = by_name["embed.weight"]
    assert torch.equal(second[0].state[weight]["accumulator_1"], first[0].state[weight]["accumulator_1"])


def a_scalar_of_two_opinions() -> float:
    """Rank 1 holds no element of the tensor, and its count of steps is one of before."""
    leads = dist.get_rank() == 0
    count = torch.tensor(8.0 if leads else 7.0)
    return float(BoxedTensor((), [Box((), ())], [count], [leads], count.dtype, count.device).full())


def test_a_whole_scalar_is_that_of_its_owner(workers: Pool) -> None:
    assert workers(2).run(a_scalar_of_two_opinions) == [8.0, 8.0]


def a_scalar_of_one_rank(folder: Path) -> list[str]:
    """With ``shard_over=`` one rank has the state of a parameter without dimensions, as CLIP's ``logit_scale``."""
    found = []
    for recipe in (SM3, SM3.adamw_like):
        models: list[Any] = [nn.ParameterDict({"w": torch.ones(4, 3), "scale": torch.tensor(2.0)}) for _ in range(2)]
        first, second = (recipe(model.parameters(), momentum=0.9, shard_over=dist.group.WORLD) for model in models)
        for param in models[0].parameters():
            param.grad = torch.full_like(param, 0.5)
        first.step()
        save({"train": TrainState(models[0], first)}, checkpoint_id=folder / recipe.__name__)
        load({"train": TrainState(models[1], second)}, folder / recipe.__name__)
        pairs = zip(models, (first, second), strict=True)
        one, two = (get_optimizer_state_dict(*pair, options=FULL)["state"] for pair in pairs)
        for name, values in one.items():
            found += [f"{key} of {name}" for key, value in values.items() if not torch.equal(value, two[name][key])]
        found += [] if one["scale"]["accumulator_0"] > 0 and one["scale"]["momentum_buffer"].shape == () else ["scale"]
    return found


def test_a_scalar_whose_state_lies_on_one_rank(workers: Pool, tmp_path: Path) -> None:
    assert workers(2).run(a_scalar_of_one_rank, tmp_path) == [[]] * 2


def of_no_elements(folder: Path, wrapper: str) -> list[str]:
    """Nobody holds any of a tensor that has none: its steps are counted all the same."""
    wrapped = []
    for _ in range(2):
        net: Any = nn.ParameterDict({"w": torch.ones(4, 3), "none": torch.zeros(0, 3), "b": torch.ones(5)})
        if wrapper == "zero":
            wrapped.append((net, SM3.adamw_like(net.parameters(), shard_over=dist.group.WORLD)))
            continue
        model = FullyShardedDataParallel(net, use_orig_params=wrapper == "fsdp1", device_id=torch.device("cpu"))
        wrapped.append((model, SM3.adamw_like(model.parameters(), model=model)))
    for param in wrapped[0][0].parameters():
        param.grad = torch.ones_like(param)
    wrapped[0][1].step()
    save({"train": TrainState(*wrapped[0])}, checkpoint_id=folder)
    load({"train": TrainState(*wrapped[1])}, folder)
    states = [get_optimizer_state_dict(*each, options=FULL)["state"] for each in wrapped]
    assert [int(state[name]["step"]) for state in states for name in ("w", "none", "b")] == [1] * 6
    return [
        f"{key} of {name}"
        for name, values in states[0].items()
        for key, value in values.items()
        if not torch.equal(value, states[1][name][key])
    ]


@pytest.mark.parametrize("wrapper", ["zero", "fsdp1", "fsdp1-flat"])
@pytest.mark.parametrize("world", [1, 2])
def test_tensors_without_elements(workers: Pool, tmp_path: Path, wrapper: str, world: int) -> None:
    assert workers(world).run(of_no_elements, tmp_path, wrapper) == [[]] * world
