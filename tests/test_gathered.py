"""Wrappers leave whole parameters in a model: state has its names, tensors their numbers, and weights their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import same
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from launch.job import fairscale_cpu
from sm3_dist import SM3, MuonLikeSM3, step_in_backward
from sm3_dist.checkpoint import TrainState, get_optimizer_state_dict, load, set_optimizer_state_dict
from sm3_dist.checkpoint.names import canonical_names

ROUNDED: dict[str, Any] = {"lr": 0.1, "momentum_dtype": torch.int8, "stochastic_rounding": True}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16()


def sharded(world: int, replicas: int = 1) -> nn.Module:
    """The last layer is the root's own: those are whole from its forward pass to the end of the backward pass."""
    mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    model = net()
    for layer in list(model.children())[:2]:
        fully_shard(layer, mesh=mesh if replicas > 1 else mesh["shard"])
    return fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])


def forward(model: nn.Module) -> Tensor:
    """The same on every rank; the gradients of two equal halves are those of one, to the bit."""
    return model(torch.linspace(-1, 1, 12, dtype=torch.bfloat16).reshape(2, 6)).square().sum()


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        forward(model)
    assert not all(isinstance(param, DTensor) for param in model.parameters()), "nothing is gathered"


def train(model: nn.Module, optimizer: SM3) -> None:
    forward(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def moved(folder: Path, replicas: int) -> list[str]:
    """Save the state of a model that was evaluated last, and bring it to another such."""
    found = []
    for way in ("set", "load"):
        models = [sharded(2, replicas) for _ in range(2)]
        optimizers = [SM3.adamw_like(model.named_parameters(), model=model, **ROUNDED) for model in models]
        train(models[0], optimizers[0])
        for model in models:
            evaluate(model)
        if way == "set":
            set_optimizer_state_dict(
                models[1], optimizers[1], get_optimizer_state_dict(models[0], optimizers[0]), options=None
            )
            models[1].load_state_dict(models[0].state_dict())
        else:
            save({"train": TrainState(models[0], optimizers[0])}, checkpoint_id=folder)
            evaluate(models[1])
            load({"train": TrainState(models[1], optimizers[1])}, folder)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer)
        states = [get_optimizer_state_dict(*both)["state"] for both in zip(models, optimizers, strict=True)]
        for name, one in states[0].items():
            found += [
                f"{way}: {key} of {name}"
                for key, value in one.items()
                if not torch.equal(
                    *(v.to_local() if isinstance(v, DTensor) else v for v in (value, states[1][name][key]))
                )
            ]
    return found


@pytest.mark.parametrize("replicas", [1, 2])
def test_state_of_a_model_that_was_evaluated_last(workers: Pool, tmp_path: Path, replicas: int) -> None:
    assert workers(2).run(moved, tmp_path, replicas) == [[], []]


def rounded(when: str) -> list[str]:
    """Weights that are not those of one process, where a plan is made while whole parameters are in the model."""
    models = [sharded(2), net()]
    optimizers = [SM3.adamw_like(model.named_parameters(), model=model, **ROUNDED) for model in models]
    for step in range(3):
        if when == "in backward" and step == 1:
            step_in_backward(models[0], optimizers[0])
            optimizers[0].load_state_dict(optimizers[0].state_dict())
        for model in models:
            forward(model).backward()
        if when == "after evaluation":
            evaluate(models[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        models[0].reshard()  # type: ignore[operator]  # or forward goes on from the weights of before
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    return [name for (name, param), alone in pairs if not same(param, alone.detach())]


@pytest.mark.parametrize("when", ["in backward", "after evaluation"])
def test_tensors_keep_the_numbers_by_which_they_are_rounded(workers: Pool, when: str) -> None:
    assert workers(2).run(rounded, when) == [[], []]


def added() -> list[list[bool]]:
    model = sharded(2)
    first, *others = model.parameters()
    optimizer = MuonLikeSM3([first], lr=0.1, model=model)
    evaluate(model)
    optimizer.add_param_group({"params": others})
    return [[bool(group["orthogonalize"])] * len(group["params"]) for group in optimizer.param_groups]


def test_matrices_are_known_in_a_model_that_was_evaluated_last(workers: Pool) -> None:
    assert workers(2).run(added) == [[[True], [True] * 2, [False] * 3]] * 2


def frozen_by_fairscale(folder: Path) -> list[str]:
    """Weights that are not those of before: of frozen ones fairscale leaves the whole after a backward pass."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    fairscale_cpu.install()
    options = {"process_group": dist.group.WORLD, "process_group_reduce_scatter": dist.group.WORLD}
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model[0].requires_grad_(False)
        first = model[0].weight.detach().clone()
        model[1] = FullyShardedDataParallel(model[1], **options, **fairscale_cpu.ARGUMENTS)
        models.append(FullyShardedDataParallel(model, **options, **fairscale_cpu.ARGUMENTS))
        if seed == 0:
            wanted = first
    optimizers = [SM3.adamw_like(model.parameters(), model=model) for model in models]
    for step in range(2):
        models[0](torch.ones(2, 4)).square().sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        save({"train": TrainState(models[0], optimizers[0])}, checkpoint_id=folder / str(step))
    load({"train": TrainState(models[1], optimizers[1])}, folder / "1")
    with models[0].summon_full_params():  # type: ignore[operator]  # who asks for whole ones keeps them
        whole = [param.shape for param in models[0].parameters()]
        canonical_names(models[0])
        assert [param.shape for param in models[0].parameters()] == whole
    names = ("0.weight", "1.weight")
    found, loaded = (model.state_dict() for model in models)
    different = [name for name in names if not torch.equal(found[name], loaded[name])]
    return different + ([] if torch.equal(loaded["0.weight"], wanted) else ["what was frozen"])


def test_frozen_weights_that_fairscale_has_gathered(workers: Pool, tmp_path: Path) -> None:
    assert workers(2).run(frozen_by_fairscale, tmp_path) == [[], []]
