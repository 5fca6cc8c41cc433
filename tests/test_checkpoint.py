"""sm3_dist.checkpoint: options, errors, foreign states, and reading what is not to be trusted."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import SM3 as torch_sm3
import torch
import torch.distributed as dist
from harness import Pool
from moving import SETTINGS, STEPS, Wrapped, build, differences, expected, gradients, single, spoil, train
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim.lr_scheduler import LambdaLR

from sm3_dist import SM3
from sm3_dist.checkpoint import (
    BoxedTensor,
    CheckpointError,
    StateDictOptions,
    TrainState,
    from_adamw,
    from_torch_sm3,
    get_optimizer_state_dict,
    get_state_dict,
    load,
    set_optimizer_state_dict,
    set_state_dict,
)
from sm3_dist.checkpoint import train_state as train_state_module

FULL = StateDictOptions(full_state_dict=True)
SOME = ("ddp", "zero", "fsdp2", "fsdp1_flat")


def trained() -> Wrapped:
    wrapped = single(1)
    train(wrapped, range(STEPS))
    return wrapped


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one process."""
    save({"train": TrainState(*trained(), step=STEPS)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def fresh() -> TrainState:
    return TrainState(*single(1))


# ------------------------------------------------------------------------------------------------------------ options


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


# --------------------------------------------------------------------------------------------------- the whole state


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


# ------------------------------------------------------------------------------------------- what does not fit is said


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
        (lambda s: s["param_groups"][0].update(beta=1.5), "beta must be"),
        (lambda s: s["param_groups"][0]["params"].remove("conv.weight"), r"conv\.weight"),
        (lambda s: s["param_groups"][0].update(update_rms=0.2), "needed for update_rms"),
        (lambda s: s["param_groups"][0].update(cover_block=9), "cover_block=9, but this optimizer has .*None"),
    ],
    ids=["tensor", "accumulator", "momentum", "shape", "adamw", "hyperparameter", "group", "update_rms", "covers"],
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


def test_newer_format(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_state_module, "FORMAT_VERSION", 2)
    save({"train": TrainState(*trained())}, checkpoint_id=saved.with_name("newer"), no_dist=True)
    monkeypatch.undo()
    state = fresh()
    spoil(Wrapped(state.model, state.optimizers[0]))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"format version 2.*up to 1"):
        load({"train": state}, saved.with_name("newer"))
    assert all(bool((p == -5).all()) for p in state.model.parameters()), "something was loaded"


# ------------------------------------------------------------------------------------------------------ damaged files


def loaded_by_two(folder: Path) -> None:
    load({"train": TrainState(*build("fsdp2", 2))}, folder)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (".metadata", lambda data: data[: len(data) // 2], "is damaged"),
        (".metadata", lambda data: b"", "is damaged"),
        (".metadata", None, "was not finished"),
        ("__0_0.distcp", lambda data: data[: len(data) // 2], "cannot load"),
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
    ],
    ids=["truncated-metadata", "empty-metadata", "no-metadata", "truncated-file", "missing-file"],
)
def test_damaged_checkpoint(
    workers: Pool, saved: Path, file: str, damage: Callable[[bytes], bytes] | None, message: str
) -> None:
    path = saved / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    workers(2).run_raises(CheckpointError, loaded_by_two, saved, match=message)


# ------------------------------------------------------------------------------------------------------ hostile files


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class SetsAttribute:
    """Unpickled, it sets an attribute of a class."""

    def __reduce__(self) -> Any:
        from torch.distributed.checkpoint.metadata import Metadata

        return _identity, (Metadata,), (None, {"planted": 1})


def _identity(cls: type) -> type:
    return cls


def test_metadata_that_would_run_code(saved: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    metadata.planner_data = Hostile(tmp_path / "mark")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"it asks for .*mkdir"):
        load({"train": fresh()}, saved)
    assert not (tmp_path / "mark").exists()
    FileSystemReader(saved).read_metadata()  # the file is what this test takes it for
    assert (tmp_path / "mark").exists()


def test_metadata_that_changes_a_class(saved: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    # A class on the stack, an attribute for it, BUILD.
    code = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x07\x00\x00\x00plantedK\x01stb."
    assert pickle.loads(code) is Metadata
    assert vars(Metadata)["planted"] == 1
    del Metadata.planted  # type: ignore[attr-defined]
    (saved / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="it changes"):
        load({"train": fresh()}, saved)
    assert "planted" not in vars(Metadata)


def test_value_that_would_run_code(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    state = fresh().state_dict() | {"step": Hostile(tmp_path / "mark")}
    save({"train": state}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError, match=r"train\.step holds more than plain values"):
        load({"train": fresh()}, folder)
    assert not (tmp_path / "mark").exists()


def test_tensor_that_would_run_code(saved: Path, tmp_path: Path) -> None:
    """The bytes of one tensor replaced by a pickle in the same kind of archive."""
    metadata = FileSystemReader(saved).read_metadata()
    payload = io.BytesIO()
    torch.save(Hostile(tmp_path / "mark"), payload)
    assert zipfile.is_zipfile(payload)
    for index, info in metadata.storage_data.items():
        if index.fqn == "train.model.embed.weight":
            info.relative_path, info.offset, info.length = "__1_0.distcp", 0, len(payload.getvalue())
    (saved / "__1_0.distcp").write_bytes(payload.getvalue())
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=re.escape("UnpicklingError")):
        load({"train": fresh()}, saved)
    assert not (tmp_path / "mark").exists()


def test_metadata_that_names_files_elsewhere(saved: Path) -> None:
    metadata = FileSystemReader(saved).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        load({"train": fresh()}, saved)


# ------------------------------------------------------------------------------------------------------ foreign states


def foreign_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", (4, 3)), ("b", (5,)), ("c", ()))}


def take_steps(optimizer: Any, parameters: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def holder() -> nn.Module:
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in foreign_parameters().items()})  # type: ignore[return-value]


def test_torch_sm3_goes_on_here() -> None:
    old = holder()
    optimizer = torch_sm3.SM3(old.parameters(), lr=0.1, momentum=0.9)
    take_steps(optimizer, list(old.parameters()), 3)
    model = holder()
    model.load_state_dict(old.state_dict())
    ours = SM3(model.parameters(), lr=5.0, momentum=0.9)
    converted = from_torch_sm3(optimizer.state_dict(), [name for name, _ in model.named_parameters()])
    set_optimizer_state_dict(model, ours, converted, options=FULL)
    assert ours.param_groups[0]["lr"] == 0.1
    for _ in range(2):
        take_steps(optimizer, list(old.parameters()), 1)
        take_steps(ours, list(model.parameters()), 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, old.get_parameter(name), rtol=1e-6, atol=1e-7)
        assert ours.state[parameter]["step"] == 5


@pytest.mark.parametrize("block", [None, 2])
def test_adamw_goes_on_here(block: int | None) -> None:
    model = holder()
    adamw = torch.optim.AdamW(model.parameters())
    take_steps(adamw, list(model.parameters()), 3)
    ours = SM3(model.parameters(), lr=0.2, momentum=0.9, beta=0.9, cover_block=block)
    names = [name for name, _ in model.named_parameters()]
    converted = from_adamw(adamw.state_dict(), names, cover_block=block)
    set_optimizer_state_dict(model, ours, converted, options=FULL)
    a = model.get_parameter("a")
    squares = adamw.state[a]["exp_avg_sq"]
    found = ours.state[a]
    assert ours.param_groups[0]["lr"] == 0.2
    assert found["step"] == 3
    assert not found["momentum_buffer"].any()
    if block is None:
        assert torch.equal(found["accumulator_0"], squares.amax(1))
        assert torch.equal(found["accumulator_1"], squares.amax(0))
    else:
        assert torch.equal(found["accumulator_0"], torch.stack([squares[:, :2].amax(1), squares[:, 2]], 1))
    take_steps(ours, list(model.parameters()), 1)
    sums = from_adamw(adamw.state_dict(), names, sums=True)
    assert torch.equal(sums["state"]["b"]["accumulator_0"], adamw.state[model.get_parameter("b")]["exp_avg_sq"] * 3)


def test_foreign_states_that_are_not_what_they_should_be() -> None:
    model = holder()
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    take_steps(sgd, list(model.parameters()), 1)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="no exp_avg_sq"):
        from_adamw(sgd.state_dict(), names)
    with pytest.raises(ValueError, match="no accumulator_0"):
        from_torch_sm3(sgd.state_dict(), names)
    with pytest.raises(ValueError, match="2 names for 3 parameters"):
        from_adamw(sgd.state_dict(), names[:2])
    with pytest.raises(ValueError, match="by number; pass names="):
        from_adamw(sgd.state_dict())
