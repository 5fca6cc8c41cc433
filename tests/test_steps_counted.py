"""Steps of tensors of which some ranks have no gradient: experts that no token of a rank's batch went to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flat_layouts import fsdp1
from harness import Pool
from layouts import Tensors, give
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

from sm3_dist import SM3
from sm3_dist.checkpoint import TrainState, load
from sm3_dist.layout.describe import local_tensor

SHAPES = [(100, 70), (6, 5)]
OPTIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "rounded": {"update_rms": None, "beta": 0.0, "momentum_dtype": torch.int8},
    "corrected": {"update_rms": None},
}


def start(wrapper: str, options: str) -> tuple[nn.Module, SM3]:
    module = Tensors(SHAPES)
    model = fully_shard(module) if wrapper == "fsdp2" else fsdp1(module, use_orig_params=True)
    return model, SM3.adamw_like(model.parameters(), lr=0.01, model=model, **OPTIONS[options])


def train(optimizer: SM3, step: int) -> None:
    """Rank 1 has no gradients in the first two steps, and nobody has any in the third."""
    generator = torch.Generator().manual_seed(step)
    for param in optimizer.param_groups[0]["params"]:
        grad = torch.randn(param.shape, generator=generator)
        absent = step == 2 or (dist.get_rank() == 1 and step < 2)
        give(param, None if absent else grad)
    optimizer.step()


def counts(optimizer: SM3) -> list[float]:
    return [state["step"].item() for state in optimizer.state.values()]


def resumed(wrapper: str, options: str, folder: Path) -> tuple[list[float], list[str]]:
    model, optimizer = start(wrapper, options)
    for step in range(4):
        train(optimizer, step)
    save({"train": TrainState(model, optimizer)}, checkpoint_id=folder)
    other_model, other = start(wrapper, options)
    load({"train": TrainState(other_model, other)}, folder)
    for step in range(4, 6):
        train(optimizer, step)
        train(other, step)

    def local(model: nn.Module) -> list[Tensor]:
        return [local_tensor(param.detach()) for param in model.parameters()]

    found = [
        str(tuple(a.shape)) for a, b in zip(local(model), local(other_model), strict=True) if not torch.equal(a, b)
    ]
    return counts(optimizer), found + ["counts"] * (counts(optimizer) != counts(other))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1"])
def test_a_tensor_has_one_count(workers: Pool, tmp_path: Path, wrapper: str, options: str) -> None:
    assert workers(2).run(resumed, wrapper, options, tmp_path) == [([5.0, 5.0], [])] * 2
