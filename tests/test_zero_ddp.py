"""ZeRO-1 under DistributedDataParallel, and gradients that are not the same on every rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from replicas import WORLDS, assert_replicas, copies, digest, give, params_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sm3_dist import SM3, GradientMismatchError

Hook = Callable[[DistributedDataParallel], None]


def compress(model: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    # Not by its name, for which DDP wants a GPU.
    model.register_comm_hook(None, lambda _, bucket: bf16_compress_hook(None, bucket))  # type: ignore[arg-type]


def ddp_training(
    accumulate: bool, hook: Hook | None, ddp_options: dict[str, Any], optimizer_options: dict[str, Any]
) -> str:
    """Train a model under DDP, with a batch of its own on each rank."""
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.LayerNorm(17), nn.Linear(17, 5)), **ddp_options
    )
    if hook:
        hook(model)
    optimizer = SM3(model.named_parameters(), lr=0.1, momentum=0.9, **optimizer_options)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(6):
        inputs = torch.randn(8, 6, generator=generator)
        if accumulate:
            with model.no_sync():
                model(inputs[:3]).square().mean().backward()
        model(inputs[3:]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return digest(list(model.parameters()))


def both_ddp_trainings(accumulate: bool, hook: Hook | None, ddp_options: dict[str, Any]) -> str:
    """With and without ``shard_over``, DDP's gradients are the same to the bit, and so the weights must be."""
    keywords = {"shard_over": dist.group.WORLD, "check_gradients": 100}
    sharded = ddp_training(accumulate, hook, ddp_options, keywords)
    assert sharded == ddp_training(accumulate, hook, ddp_options, {})
    return sharded


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    ("accumulate", "hook", "options"),
    [
        (False, None, {}),
        (False, None, {"gradient_as_bucket_view": True}),
        (False, None, {"static_graph": True}),
        (True, None, {}),
        (True, None, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0002}),
        (False, compress, {}),
    ],
    ids=["plain", "bucket-view", "static-graph", "no-sync", "no-sync-small-bucket-views", "bf16-hook"],
)
def test_under_ddp(
    workers: Pool, world_size: int, accumulate: bool, hook: Hook | None, options: dict[str, Any]
) -> None:
    assert_replicas(workers(world_size).run(both_ddp_trainings, accumulate, hook, options))


def forget_ddp(steps: int, check_gradients: int, differ_from: int = 0) -> None:
    params = params_of([(4, 3), (5,)])
    optimizer = SM3(
        [("weight", params[0]), ("bias", params[1])], shard_over=dist.group.WORLD, check_gradients=check_gradients
    )
    for step in range(steps):
        give(params, 4 * step)
        if step >= differ_from and dist.get_rank() == dist.get_world_size() - 1:
            params[1].grad[2] = torch.nextafter(params[1].grad[2], torch.tensor(9.0))  # type: ignore[index]
        before = copies(params)
        try:
            optimizer.step()
        except GradientMismatchError:
            assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
            raise


@pytest.mark.parametrize("world_size", WORLDS)
def test_gradients_that_differ_are_an_error_on_every_rank(workers: Pool, world_size: int) -> None:
    """Be it by the last bit of one element, and before anything has been updated."""
    match = "'bias', and of 0 more of 2 .*DistributedDataParallel"
    workers(world_size).run_raises(GradientMismatchError, forget_ddp, 1, 3, match=match)


def test_gradients_are_checked_in_the_first_steps_alone(workers: Pool) -> None:
    workers(2).run_raises(GradientMismatchError, forget_ddp, 3, 3, 2)
    workers(2).run(forget_ddp, 4, 3, 3)
    workers(2).run(forget_ddp, 2, 0)


def one_rank_lacks_a_gradient() -> None:
    params = params_of([(4, 3), (5,)])
    optimizer = SM3(params, shard_over=dist.group.WORLD)
    give(params, 0)
    if dist.get_rank() == 0:
        params[0].grad = None
    optimizer.step()


def test_a_gradient_that_one_rank_lacks_is_an_error_on_every_rank(workers: Pool) -> None:
    workers(3).run_raises(GradientMismatchError, one_rank_lacks_a_gradient, match="parameter 0 of param group 0")
