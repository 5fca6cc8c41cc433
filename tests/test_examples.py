"""The examples that need PyTorch alone: they come to what a plain loop comes to, interrupted or not."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from plain_loop import differing, plain_loop, weights_of

from sm3_dist import SM3

STEPS = 5


def against_a_plain_loop(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """Names of weights in which the example differs from a plain loop, and when interrupted from uninterrupted."""
    example = import_module(name)
    expected = plain_loop(
        example.make_model(),
        lambda model: SM3.adamw_like(model.parameters(), lr=2e-3, momentum_dtype=torch.int8),
        example.loss_of,
        dist.get_world_size(),
        STEPS,
    )
    whole = weights_of(example.train(STEPS))
    example.train(2, save=folder / "checkpoint")
    dist.barrier()
    resumed = weights_of(example.train(STEPS, resume=folder / "checkpoint"))
    return differing(whole, expected), differing(resumed, whole)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_an_example_trains_as_a_plain_loop(workers: Pool, tmp_path: Path, name: str) -> None:
    assert workers(2).run(against_a_plain_loop, name, tmp_path) == [([], [])] * 2
