"""The checks that GPUs are to pass, on the CPU."""

import itertools

import pytest
import torch
from harness import Pool
from on_device import CHECKS, OPTIONS, WRAPPERS


def check(name: str) -> None:
    CHECKS[name](torch.device("cpu"))


@pytest.mark.sampled("wrapper, options, world_size", list(itertools.product(WRAPPERS, OPTIONS, (1, 2))))
def test_a_wrapper_that_gpus_are_to_train_in(workers: Pool, wrapper: str, options: str, world_size: int) -> None:
    workers(world_size).run(check, f"{wrapper} {options}")


@pytest.mark.parametrize("name", ["scaled", "resumed"])
def test_what_else_gpus_are_to_do(workers: Pool, name: str) -> None:
    workers(2).run(check, name)
