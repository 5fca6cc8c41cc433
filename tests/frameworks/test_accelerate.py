"""accelerate, unmodified: DDP, FSDP1 and FSDP2 come to what a plain loop comes to; DDP and FSDP2 after a break too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from plain_loop import differing, plain_loop, whole_weights
from torch import Tensor, nn

from sm3_dist import SM3

pytest.importorskip("accelerate", reason="needs pip install 'sm3_dist[frameworks]'")

STEPS = 5


@contextmanager
def accelerate_on_cpu(fsdp: int | None) -> Iterator[None]:
    """Have accelerate use the CPU and the process group that is there.

    It refuses FSDP on a CPU, though PyTorch does not. So its ``PartialState`` is told that the processes have GPUs,
    and that the device is the CPU.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with patch.dict(os.environ, places):
        state = PartialState(cpu=True)
        assert state.distributed_type == DistributedType.MULTI_CPU
        if fsdp:
            state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
        try:
            yield
        finally:
            for each in (AcceleratorState, GradientState, PartialState):
                each._reset_state()


def against_a_plain_loop(
    fsdp: int | None, clip: float | None, folder: Path, interrupt: bool
) -> tuple[list[str], list[str]]:
    """Names of weights in which accelerate differs from a plain loop, and when interrupted from uninterrupted."""
    import accelerate_fsdp as example

    ranks, data = dist.get_world_size(), example.make_data()

    def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
        start = (step * ranks + rank) * example.BATCH
        return example.loss_of(model, *data[start : start + example.BATCH])

    def optimizer_of(model: nn.Module) -> SM3:
        return SM3.adamw_like(model.parameters(), lr=2e-3, momentum_dtype=torch.int8)

    expected = plain_loop(example.make_model(), optimizer_of, loss_of, ranks, STEPS, clip)
    with accelerate_on_cpu(fsdp):
        whole = whole_weights(example.train(STEPS, fsdp, clip=clip))
    if not interrupt:
        return differing(whole, expected), []
    with accelerate_on_cpu(fsdp):
        example.train(2, fsdp, save=folder, clip=clip)
    with accelerate_on_cpu(fsdp):
        resumed = whole_weights(example.train(STEPS, fsdp, resume=folder, clip=clip))
    return differing(whole, expected), differing(resumed, whole)


@pytest.mark.parametrize(("fsdp", "clip"), [(None, None), (None, 0.5), (2, None)], ids=["DDP", "DDP, clipped", "FSDP2"])
def test_accelerate_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, fsdp: int | None, clip: float | None) -> None:
    assert workers(2).run(against_a_plain_loop, fsdp, clip, tmp_path, True) == [([], [])] * 2


def test_attached_under_fsdp1_it_trains_as_a_plain_loop(workers: Pool, tmp_path: Path) -> None:
    assert workers(2).run(against_a_plain_loop, 1, None, tmp_path, False) == [([], [])] * 2
