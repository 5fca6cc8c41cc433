"""Steps during backward: the bits of a step after it, one gradient alive at a time, one all-reduce after the last."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from against_reference import EVERYTHING
from harness import Pool
from layouts import full
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from sm3_dist import SM3, in_backward, step_in_backward
from sm3_dist.ranks.bucket import MaxBucket

STEPS = 4


class Net(nn.Module):
    """With tied weights, a frozen and an unused parameter, and a layer that only every other step uses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.third.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.to(dtype)

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.second(self.first(x).tanh())
        return (self.third(x) if step % 2 == 0 else x).square().mean()


Wrap = Callable[[Net, DeviceMesh | None], None]


def as_it_is(net: Net, _: DeviceMesh | None) -> None:
    pass


def shard(net: Net, mesh: DeviceMesh | None = None) -> None:
    fully_shard(net.third, mesh=mesh)
    fully_shard(net, mesh=mesh)


def shard_replicas(net: Net, mesh: DeviceMesh | None) -> None:
    fully_shard(net, mesh=mesh)


def tensor_parallel(net: Net, mesh: DeviceMesh | None) -> None:
    """Its own columns of one layer on every rank, and rows of FSDP2 on top if there are more than two."""
    assert mesh is not None
    parallelize_module(net.third, mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))
    if mesh["data"].size() > 1:
        fully_shard(net, mesh=mesh["data"])


def mesh_for(wrap: Wrap) -> DeviceMesh | None:
    """For all models of a world: each of their own would take a group, and PyTorch its time to work out what to do."""
    if wrap is as_it_is:
        return None
    names = {shard: ("data",), shard_replicas: ("replica", "shard"), tensor_parallel: ("data", "tensor")}[wrap]
    world = dist.get_world_size()
    return init_device_mesh("cpu", (world // 2, 2) if len(names) > 1 else (world,), mesh_dim_names=names)


def trained(
    during: bool,
    wrap: Wrap = as_it_is,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype = torch.float32,
    passes: int = 1,
    clip_value: float | None = None,
    **options: Any,
) -> list[Tensor]:
    """Weights and state after some steps."""
    net = Net(dtype)
    wrap(net, mesh)
    optimizer = SM3(net.parameters(), lr=0.1, **options)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    handle = step_in_backward(net, optimizer, clip_value=clip_value) if during else None
    for step in range(STEPS):
        for k in range(passes):
            if passes > 1:
                net.set_requires_gradient_sync(k == passes - 1)
            data = torch.randn(8, 6, generator=torch.Generator().manual_seed(passes * step + k)).to(dtype)
            net(data, step).backward()
        assert all(param.grad is None for param in net.parameters()) or not during
        if clip_value is not None and not during:
            nn.utils.clip_grad_value_(net.parameters(), clip_value, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    if handle is not None:
        handle.remove()
    state = [value for param in net.parameters() for value in optimizer.state.get(param, {}).values()]
    return [*map(full, net.parameters()), *map(full, state)]


def compare(wrap: Wrap, passes: int = 1) -> None:
    mesh = mesh_for(wrap)
    narrow: dict[str, Any] = {"dtype": torch.bfloat16, "momentum_dtype": torch.int8, "stochastic_rounding": True}
    for options in (
        {},
        {"momentum": 0.9, "beta": 0.9, "clip_value": 0.01},
        EVERYTHING,
        {"backend": "eager"},
        {"momentum": 0.9, **narrow},
    ):
        after = trained(False, wrap, mesh, passes=passes, **options)
        during = trained(True, wrap, mesh, passes=passes, **options)
        assert len(after) == len(during) > 10
        assert all(torch.equal(a, b) for a, b in zip(after, during, strict=True)), options


def test_the_bits_of_a_step_after_backward() -> None:
    compare(as_it_is)


def test_the_bits_of_a_step_after_backward_sharded(workers: Pool) -> None:
    workers(2).run(compare, shard)
    workers(4).run(compare, shard_replicas)
    for world in (2, 4):
        workers(world).run(compare, tensor_parallel)


def test_fsdp2_may_accumulate_what_it_has_not_reduced(workers: Pool) -> None:
    workers(2).run(compare, shard, 3)


def test_one_gradient_is_alive_at_a_time() -> None:
    net = Net()
    alive: list[int] = []
    for param in net.parameters():
        if param.requires_grad:  # before those of the handle: hooks run in the order in which they were registered
            param.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(param.grad is not None for param in net.parameters()))
            )
    optimizer = SM3(net.parameters())
    with step_in_backward(net, optimizer):
        net(torch.ones(2, 6), 0).backward()
    assert alive == [1] * 4


def test_clipping_cuts_off_elements() -> None:
    """Rarely used rows too, and what a parameter without a hook has."""
    net, late = nn.Embedding(4, 3, sparse=True), nn.Parameter(torch.zeros(2))
    optimizer = SM3(net.parameters(), lr=1.0)
    with step_in_backward(net, optimizer, clip_value=0.5):
        optimizer.add_param_group({"params": [late]})
        (net(torch.tensor([2, 2])) * torch.tensor([0.125, -7.0, 0.5])).sum().backward()
        late.grad = torch.tensor([-2.0, 0.25])
        optimizer.step()
    assert optimizer.state[net.weight]["accumulator_0"][2] == 0.25
    assert torch.equal(optimizer.state[net.weight]["accumulator_1"], torch.tensor([0.0625, 0.25, 0.25]))
    assert torch.equal(optimizer.state[late]["accumulator_0"], torch.tensor([0.25, 0.0625]))
    with pytest.raises(ValueError, match="clip_value must be greater than 0"):
        step_in_backward(net, optimizer, clip_value=0.0)


def clip_a_sum() -> Tensor:
    """Each rank has part of the gradient: 3 and -2, and what is cut off is their sum."""
    mesh = init_device_mesh("cpu", (2,))
    net = nn.ParameterList([nn.Parameter(distribute_tensor(torch.zeros(1), mesh, [Replicate()]))])
    optimizer = SM3(net.parameters())
    data = distribute_tensor(torch.tensor([3.0, -2.0]), mesh, [Shard(0)])
    placements: list[Any] = []
    net[0].register_post_accumulate_grad_hook(lambda param: placements.append(param.grad.placements))
    with step_in_backward(net, optimizer, clip_value=2.0):
        (net[0] * data).sum().backward()
        optimizer.step()
    assert placements == [(Partial(),)]
    return full(optimizer.state[net[0]]["accumulator_0"])


def test_clipping_comes_after_reduction(workers: Pool) -> None:
    assert workers(2).run(clip_a_sum) == [torch.ones(1)] * 2


def reductions() -> list[str]:
    """What happens in two steps."""
    events: list[str] = []
    start = MaxBucket.start

    def noted(self: MaxBucket) -> None:
        events.append("reduce")
        start(self)

    net = Net()
    shard(net)
    optimizer = SM3(net.parameters())
    with step_in_backward(net, optimizer), patch.object(MaxBucket, "start", noted):
        for step in range(2):
            net(torch.ones(2, 6), step).backward()
            events.append("backward")
            optimizer.step()
    assert len(optimizer._current_plan().buckets) == 1
    return events


def test_one_reduction_after_the_last_gradient(workers: Pool) -> None:
    assert workers(2).run(reductions) == [["backward", "reduce"] * 2] * 2


def test_a_second_gradient_before_the_step_is_an_error() -> None:
    net = Net()
    optimizer = SM3(net.parameters())
    step_in_backward(net, optimizer)
    net(torch.ones(2, 6), 0).backward()
    with pytest.raises(RuntimeError, match="second gradient before"):
        net(torch.ones(2, 6), 0).backward()


def test_a_layer_frozen_after_backward_changes_no_bit() -> None:
    """The plan is made anew then, in the midst of a step."""
    results = []
    for during in (False, True):
        net = Net()
        optimizer = SM3(net.parameters(), lr=0.1, **EVERYTHING)
        handle = step_in_backward(net, optimizer) if during else None
        for step in range(STEPS):
            net(torch.randn(8, 6, generator=torch.Generator().manual_seed(step)), step).backward()
            if step == 2:
                net.unused.requires_grad_(False)
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        state = [optimizer.state[param] for param in net.parameters() if param in optimizer.state]
        results.append([*net.parameters(), *(value for each in state for value in each.values())])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


def test_gradients_of_removed_parameters_are_left_where_they_are() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = SM3([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.1)
    before = [layer.weight.detach().clone() for layer in (first, second)]
    step_in_backward(nn.Sequential(first, second), optimizer)
    del optimizer.param_groups[1]
    second(first(torch.ones(2, 3))).square().sum().backward()
    assert second.weight.grad is not None
    assert torch.equal(second.weight, before[1])
    assert first.weight.grad is None
    assert not torch.equal(first.weight, before[0])


def test_it_does_not_keep_the_optimizer_alive() -> None:
    net = Net()
    optimizer = SM3(net.parameters(), momentum=0.9)
    step_in_backward(net, optimizer)
    net(torch.ones(2, 6), 0).backward()
    optimizer.step()
    known = [*map(weakref.ref, net.parameters()), weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert all(each() is None for each in known)


def test_it_can_be_undone() -> None:
    net = Net()
    optimizer = SM3(net.parameters())
    with step_in_backward(net, optimizer):
        net(torch.ones(2, 6), 0).backward()
        optimizer.step()
    before = net.first.weight.detach().clone()
    for _ in range(2):
        net(torch.ones(2, 6), 0).backward()
    assert net.first.weight.grad is not None
    assert torch.equal(net.first.weight, before)
    optimizer.step()
    assert not torch.equal(net.first.weight, before)


def test_grad_scaler_is_refused() -> None:
    net = Net()
    optimizer = SM3(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with step_in_backward(net, optimizer):
        scaler.scale(net(torch.ones(2, 6), 0)).backward()
        with pytest.raises(RuntimeError, match="GradScaler skips a step"):
            scaler.step(optimizer)


def refuse_wrappers() -> None:
    plain = Net()
    net = DistributedDataParallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel, which averages"):
        step_in_backward(net, SM3(net.parameters()))
    flat = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="wrapped in FullyShardedDataParallel"):
        step_in_backward(flat, SM3(flat.parameters(), model=flat))
    with pytest.raises(ValueError, match="shard_over="):
        step_in_backward(plain, SM3(plain.parameters(), shard_over=dist.group.WORLD))
    with pytest.raises(ValueError, match="shard_covers=True"):
        step_in_backward(plain, SM3(plain.parameters(), shard_covers=True))


def test_what_cannot_be_combined_is_refused(workers: Pool) -> None:
    workers(2).run(refuse_wrappers)


def test_threads_of_autograd_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one for each device. A second gradient that comes while the step begins must wait for that."""
    begin, begun = in_backward.StepInBackward._begin, []

    def slowly(self: in_backward.StepInBackward) -> None:
        begun.append(threading.get_ident())
        time.sleep(0.3)
        begin(self)

    monkeypatch.setattr(in_backward.StepInBackward, "_begin", slowly)
    model = nn.Linear(4, 3)
    optimizer = SM3.adamw_like(model.named_parameters(), lr=0.1)
    before = [param.detach().clone() for param in model.parameters()]
    with in_backward.step_in_backward(model, optimizer) as handle:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        threads = [threading.Thread(target=handle._step, args=(param,)) for param in model.parameters()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) == 1
        assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
        optimizer.step()
