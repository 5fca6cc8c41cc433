"""State dicts that somebody keeps while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from harness import Pool
from moving import STEPS, build, train, with_settings
from torch import Tensor

from sm3_dist.checkpoint import BoxedTensor, get_optimizer_state_dict
from sm3_dist.layout.describe import local_tensor


def parts(state: Any) -> list[Tensor]:
    """What this rank has of all accumulators."""
    named = [(key, value) for values in state["state"].values() for key, value in values.items()]
    found = [value for key, value in named if "accumulator_" in key or key == "cover_minimum"]
    return [p for v in found for p in (v.parts if isinstance(v, BoxedTensor) else [local_tensor(v)])]


def kept(name: str, world: int) -> list[str]:
    """Keep state dicts over steps with sharded covers, between which the accumulators of SM3 have no memory."""
    wrapped = build(name, world)
    train(wrapped, range(STEPS))
    states = [wrapped.optimizer.state_dict(), get_optimizer_state_dict(*wrapped)]
    before = [part.clone() for state in states for part in parts(state)]
    train(wrapped, range(STEPS, STEPS + 1))
    after = [part for state in states for part in parts(state)]
    assert after
    return [f"{tuple(new.shape)}" for new, old in zip(after, before, strict=True) if not torch.equal(new, old)]


def test_sharded_covers(workers: Pool) -> None:
    for name in ("fsdp2", "zero", "fsdp1"):
        assert workers(2).run(with_settings, {"shard_covers": True}, kept, name, 2) == [[]] * 2
