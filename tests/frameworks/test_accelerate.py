"""accelerate, unmodified: DDP, FSDP1 and FSDP2 come to what a plain loop comes to; DDP and FSDP2 after a break too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate_state import accelerate_anew
from harness import Pool
from plain_loop import differing, number_of_ranks, plain_loop, whole_weights
from torch import Tensor, nn

from sm3_dist import SM3, MuonLikeSM3

# Not imported here, where it would take seconds of every process that collects tests.
pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs pip install 'sm3_dist[frameworks]'")

STEPS = 5


@contextmanager
def accelerate_on_cpu(fsdp: int | None) -> Iterator[None]:
    """Have accelerate use the CPU and the process group that is there.

    It refuses FSDP on a CPU, though PyTorch does not. So its ``PartialState`` is told that the processes have GPUs,
    and that the device is the CPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with accelerate_anew(), patch.dict(os.environ, places):
        state = PartialState(cpu=True)
        assert state.distributed_type == DistributedType.MULTI_CPU
        if fsdp:
            state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
        yield


def against_a_plain_loop(
    fsdp: int | None,
    clip: float | None,
    folder: Path,
    interrupt: bool,
    recipe: Callable[..., SM3] = SM3.adamw_like,
    device: str = "cpu",
) -> tuple[list[str], list[str]]:
    """Names of weights in which accelerate differs from a plain loop, and when interrupted from uninterrupted."""
    import accelerate_fsdp as example

    ranks, data = number_of_ranks(), example.make_data()

    def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
        start = (step * ranks + rank) * example.BATCH
        return example.loss_of(model, *(part.to(device) for part in data[start : start + example.BATCH]))

    def optimizer_of(model: nn.Module) -> SM3:
        return recipe(model.named_parameters(), lr=2e-3, momentum_dtype=torch.int8)

    def trained(steps: int, **folders: Path) -> dict[str, Tensor]:
        given = patch.object(example, "SM3", SimpleNamespace(adamw_like=recipe))
        with given, accelerate_on_cpu(fsdp) if device == "cpu" else accelerate_anew():
            return whole_weights(example.train(steps, fsdp, clip=clip, **folders))

    expected = plain_loop(example.make_model().to(device), optimizer_of, loss_of, ranks, STEPS, clip)
    whole = trained(STEPS)
    if not interrupt:
        return differing(whole, expected), []
    trained(2, save=folder)
    resumed = trained(STEPS, resume=folder)
    return differing(whole, expected), differing(resumed, whole)


@pytest.mark.parametrize(("fsdp", "clip"), [(None, None), (None, 0.5), (2, None)], ids=["DDP", "DDP, clipped", "FSDP2"])
def test_accelerate_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, fsdp: int | None, clip: float | None) -> None:
    assert workers(2).run(against_a_plain_loop, fsdp, clip, tmp_path, True) == [([], [])] * 2


def test_the_recipe_with_orthogonal_updates_under_fsdp2_too(workers: Pool, tmp_path: Path) -> None:
    assert workers(2).run(against_a_plain_loop, 2, None, tmp_path, True, MuonLikeSM3) == [([], [])] * 2


def test_attached_under_fsdp1_it_trains_as_a_plain_loop(workers: Pool, tmp_path: Path) -> None:
    assert workers(2).run(against_a_plain_loop, 1, None, tmp_path, False) == [([], [])] * 2
