"""Orthogonal updates: what they are, and that weights and state are one process's to the last bit under every wrapper."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import against_reference
import flat_layouts
import layouts
import pytest
import replicas
import test_flat
import torch
import torch.distributed as dist
from harness import Pool
from torch import Tensor

from sm3_dist import SM3
from sm3_dist.ranks import exchange

MUON: dict[str, Any] = {"momentum": 0.95, "beta": 0.95, "bias_correction": True, "nesterov": True}
MUON |= {"orthogonalize": True}
OPTIONS: list[dict[str, Any]] = [
    MUON,
    {**MUON, "cover_block": 2, "cover_product": True, "update_rms": 1.0, "weight_decay": 0.1},
    {"orthogonalize": True, "maximize": True},
]
NARROW: list[dict[str, Any]] = [
    {"momentum_dtype": torch.bfloat16, "rounding_seed": 7},
    {"momentum_dtype": torch.int8, "rounding_seed": 8},
]


SMALL_BUCKETS = patch.object(exchange, "BUCKET_BYTES", 100)  # several, of one or two matrices each


def compare_dtensors(name: str) -> None:
    for options in OPTIONS:
        against_reference.compare_with_reference(name, options)
    with SMALL_BUCKETS:
        against_reference.compare_with_reference(name, MUON)
    for keywords in NARROW:
        against_reference.compare_with_reference(name, MUON, torch.bfloat16, **keywords)


@pytest.mark.sampled("name, world_size", list(layouts.cases()))
def test_dtensors_equal_one_process(workers: Pool, name: str, world_size: int) -> None:
    workers(world_size).run(compare_dtensors, name)


def compare_flat(name: str) -> None:
    test_flat.compare_with_reference(name, OPTIONS[1])
    with SMALL_BUCKETS:
        test_flat.compare_with_reference(name, MUON, torch.float32, **NARROW[1])


@pytest.mark.sampled("name, world_size", list(flat_layouts.cases()))
def test_flat_tensors_equal_one_process(workers: Pool, name: str, world_size: int) -> None:
    workers(world_size).run(compare_flat, name)


def compare_replicas() -> str:
    for options in [*OPTIONS, {**MUON, "momentum_dtype": torch.bfloat16, "stochastic_rounding": True}]:
        with SMALL_BUCKETS:
            digest = replicas.train_beside_one_process(
                replicas.params_of(), replicas.BUCKETING["small-buckets"], lr=0.3, **options
            )
    return digest


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_replicas_equal_one_process(workers: Pool, world_size: int) -> None:
    replicas.assert_replicas(workers(world_size).run(compare_replicas))
