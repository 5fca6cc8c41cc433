"""ZeRO-1: replicated parameters, each rank updating a range, must train as one process does, to the last bit."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from launch.benchmarks.zero1 import bytes_sent
from sm3_dist import SM3, GradientMismatchError, PlanMismatchError
from sm3_dist.layout.box import Box
from sm3_dist.layout.cover import grid
from sm3_dist.layout.shard import LocalShard
from sm3_dist.ranks import weight_gather as publish

WORLDS = [2, 3, 4]
PUBLISHING: dict[str, dict[str, Any]] = {
    "one-bucket": {"BUCKET_BYTES": publish.BUCKET_BYTES},
    "small-buckets": {"BUCKET_BYTES": 300, "IN_PLACE_BYTES": 40},  # some in place and some packed
    "in-place": {"BUCKET_BYTES": 300, "IN_PLACE_BYTES": 1},
    "all-gather": {"Broadcasts": publish.Gather},  # as on a GPU; gloo can do it too
    "small-all-gathers": {"Broadcasts": publish.Gather, "BUCKET_BYTES": 300},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"beta": 0.95, "weight_decay": 0.1},
    {"momentum": 0.9, "beta": 0.95, "maximize": True, "bias_correction": True, "nesterov": True},
    {"momentum": 0.9, "beta": 0.95, "update_rms": 0.2},
    {"momentum": 0.9, "cover_block": 2},
    {"momentum": 0.9, "beta": 0.95, "cover_block": 2, "cover_product": True, "update_rms": 0.2},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "stochastic_rounding": True},
]
# Odd and even, longer and shorter than any world, scalar, empty, of every number of dimensions from 0 to 5.
SHAPES: list[tuple[int, ...]] = [
    (3, 5),
    (7,),
    (),
    (8, 4),
    (6, 4, 3),
    (0, 3),
    (1, 9),
    (9, 1),
    (4, 1, 2, 1, 3),
    (40, 6),
    (1,),
]


def params_of(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def copies(params: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters of the same values, contiguous."""
    return [nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format)) for param in params]


def gradient(step: int, number: int, param: Tensor) -> Tensor | None:
    """The gradient in a step, the same on every rank. Some are None now and then, number 4 always."""
    if (step + number) % 4 == 3 or number == 4:
        return None
    generator = torch.Generator().manual_seed(100 * step + number)
    grad = torch.randn(param.shape, generator=generator) * 10.0 ** (number % 3 - 1)
    return grad.to(param.dtype)


def give(params: Sequence[Tensor], step: int) -> None:
    for number, param in enumerate(params):
        param.grad = gradient(step, number, param)


def assert_same(
    params: Sequence[Tensor], whole: Sequence[Tensor], sharded: SM3, alone: SM3, where: object = ""
) -> None:
    """Compare the weights, and what this rank stores with the part of it in the whole state."""
    stepped = [param for param in params if param in sharded.state]
    shards = {entry.param: entry.shard for entry in sharded._current_plan().entries}
    for number, (param, weight) in enumerate(zip(params, whole, strict=True)):
        assert torch.equal(param, weight), f"{where}: weight {number} of shape {tuple(weight.shape)}"
    for param in stepped:
        weight = whole[next(i for i, p in enumerate(params) if p is param)]
        assert_same_state(sharded.state[param], alone.state[weight], weight, shards[param])


def assert_same_state(held: dict[str, Any], state: dict[str, Any], weight: Tensor, shard: LocalShard) -> None:
    assert held.keys() == state.keys()
    assert held["step"] == state["step"]
    for i, rectangle in enumerate(shard.stored):
        whole = Box.whole(grid(shard.shape, i, shard.cover_block))
        expected = state[f"accumulator_{i}"].view(whole.shape)[rectangle.within(whole)]
        assert torch.equal(held[f"accumulator_{i}"].view(rectangle.shape), expected), (shard, i)
    if "update_square_average" in held and shard.boxes:
        assert held["update_square_average"] == state["update_square_average"]
    if "momentum_buffer" in held:
        moments = shard.views(state["momentum_buffer"])
        assert held["momentum_buffer"].numel() == shard.numel
        assert torch.equal(held["momentum_buffer"], torch.cat([m.reshape(-1) for m in moments] or [torch.zeros(0)]))


def digest(params: Sequence[Tensor]) -> str:
    data = b"".join(
        p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in params if p.numel() and p.dim()
    )
    return hashlib.sha256(data).hexdigest()


def assert_replicas(digests: list[Any]) -> None:
    assert len(set(digests)) == 1, "the replicas differ"


def train_beside_one_process(params: Sequence[nn.Parameter], publishing: dict[str, Any], **keywords: Any) -> str:
    """Train ``params`` with, and copies of them without, ``shard_over``, where ``publish`` has these attributes."""
    keywords = {"shard_over": dist.group.WORLD, **keywords}
    alone_keywords = {k: v for k, v in keywords.items() if k not in ("shard_over", "shard_covers")}
    whole = copies(params)
    sharded, alone = SM3(params, **keywords), SM3(whole, **alone_keywords)
    with patch.multiple(publish, **publishing):
        for step in range(5):
            give(params, step)
            give(whole, step)
            sharded.step()
            alone.step()
            assert_same(params, whole, sharded, alone, where=(step, keywords))
    return digest(params)


def all_options(publishing: dict[str, Any]) -> str:
    for options in OPTIONS:
        result = train_beside_one_process(params_of(), publishing, lr=0.3, **options)
    return result


@pytest.mark.parametrize("publishing", list(PUBLISHING.values()), ids=list(PUBLISHING))
@pytest.mark.parametrize("world_size", WORLDS)
def test_equals_one_process(workers: Pool, world_size: int, publishing: dict[str, Any]) -> None:
    assert_replicas(workers(world_size).run(all_options, publishing))


def two_elements_at_a_time() -> str:
    return train_beside_one_process(params_of([(5, 3), (4,), (2, 3, 2)]), {"BUCKET_BYTES": 8, "IN_PLACE_BYTES": 8})


@pytest.mark.parametrize("world_size", [1, 3])
def test_equals_one_process_two_elements_at_a_time(workers: Pool, world_size: int) -> None:
    assert_replicas(workers(world_size).run(two_elements_at_a_time))


def with_sharded_covers() -> str:
    return train_beside_one_process(params_of(), PUBLISHING["one-bucket"], momentum=0.9, shard_covers=True)


@pytest.mark.parametrize("world_size", WORLDS)
def test_equals_one_process_with_sharded_covers(workers: Pool, world_size: int) -> None:
    assert_replicas(workers(world_size).run(with_sharded_covers))


def mixed_types(publishing: dict[str, Any]) -> str:
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [p for kind in kinds for p in params_of([(5, 7), (3,), (4, 3, 5)], kind)]
    return train_beside_one_process(params[::2] + params[1::2], publishing, momentum=0.9)


@pytest.mark.parametrize("publishing", list(PUBLISHING.values()), ids=list(PUBLISHING))
@pytest.mark.parametrize("world_size", [2, 3])
def test_types_mix(workers: Pool, world_size: int, publishing: dict[str, Any]) -> None:
    assert_replicas(workers(world_size).run(mixed_types, publishing))


def strided(publishing: dict[str, Any]) -> str:
    """Transposed, with gaps, channels last: the ranges are those of the tensors, whatever lies where in memory."""
    params = params_of([(9, 6), (5, 11), (4, 3, 2, 5), (10, 8)])
    transposed, gaps, channels_last, plain = (param.detach() for param in params)
    wide = torch.zeros(5, 40)
    wide[:, 3:36:3] = gaps
    strided = [transposed.t(), wide[:, 3:36:3], channels_last.contiguous(memory_format=torch.channels_last), plain]
    params = [nn.Parameter(tensor) for tensor in strided]
    assert [param.is_contiguous() for param in params] == [False, False, False, True]
    result = train_beside_one_process(params, publishing, momentum=0.9, beta=0.9)
    assert wide[:, [0, 1, 2, 4, 5, 37]].count_nonzero() == 0
    return result


@pytest.mark.parametrize("publishing", list(PUBLISHING.values()), ids=list(PUBLISHING))
@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_need_not_be_contiguous(workers: Pool, world_size: int, publishing: dict[str, Any]) -> None:
    assert_replicas(workers(world_size).run(strided, publishing))


def groups_come_and_go() -> str:
    """Two groups, a frozen parameter that thaws, one that freezes, and a group that is added later."""
    params = params_of()
    whole = copies(params)
    sides = []
    for side, keywords in ((params, {"shard_over": dist.group.WORLD}), (whole, {})):
        side[0].requires_grad_(False)
        groups = [{"params": side[:3]}, {"params": side[3:7], "lr": 0.01, "weight_decay": 0.1, "momentum": 0.0}]
        sides.append(SM3(groups, lr=0.3, momentum=0.9, **keywords))  # type: ignore[arg-type]
    sharded, alone = sides

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            for side, optimizer in ((params, sharded), (whole, alone)):
                give(side, step)
                for param in side:
                    param.grad = param.grad if param.requires_grad else None
                optimizer.step()
            assert_same(params, whole, sharded, alone, where=step)

    steps(0, 3)
    owned = _shards(sharded)
    for side in (params, whole):
        side[0].requires_grad_(True)
        side[3].requires_grad_(False)
    steps(3, 6)
    sharded.add_param_group({"params": params[7:], "beta": 0.5})
    alone.add_param_group({"params": whole[7:], "beta": 0.5})
    steps(6, 9)
    assert all(_shards(sharded)[param].boxes == shard.boxes for param, shard in owned.items())  # state stayed in place
    return digest(params)


def _shards(optimizer: SM3) -> dict[Tensor, LocalShard]:
    return {entry.param: entry.shard for entry in optimizer._current_plan().entries}


@pytest.mark.parametrize("world_size", WORLDS)
def test_groups_come_and_go(workers: Pool, world_size: int) -> None:
    assert_replicas(workers(world_size).run(groups_come_and_go))


def exchange() -> str:
    """Somebody puts other tensors in the place of the parameters, as accelerate does."""
    params, whole = params_of(), params_of()
    sharded, alone = SM3(params, momentum=0.9, shard_over=dist.group.WORLD), SM3(whole, momentum=0.9)
    for step in range(5):
        if step == 3:
            params = [nn.Parameter(param.detach().clone()) for param in params]
            sharded.param_groups[0]["params"] = params
        for side, optimizer in ((params, sharded), (whole, alone)):
            give(side, step)
            optimizer.step()
        assert_same(params, whole, sharded, alone)
    return digest(params)


def test_exchanged_parameters_keep_their_state(workers: Pool) -> None:
    assert_replicas(workers(3).run(exchange))


def resume() -> str:
    params, whole = params_of(), params_of()
    sharded, alone = SM3(params, momentum=0.9, shard_over=dist.group.WORLD), SM3(whole, momentum=0.9)
    for step in range(6):
        if step == 3:
            saved = sharded.state_dict()
            sharded = SM3(params, momentum=0.9, shard_over=dist.group.WORLD)
            sharded.load_state_dict(saved)
        for side, optimizer in ((params, sharded), (whole, alone)):
            give(side, step)
            optimizer.step()
        assert_same(params, whole, sharded, alone)
    with pytest.raises(ValueError, match="this rank stores"):
        sharded.load_state_dict(alone.state_dict())
    return digest(params)


def test_resumes_from_its_state_dict(workers: Pool) -> None:
    assert_replicas(workers(3).run(resume))


def on_a_mesh() -> str:
    return train_beside_one_process(
        params_of(), PUBLISHING["one-bucket"], shard_over=init_device_mesh("cpu", (dist.get_world_size(),))
    )


def test_a_mesh_in_place_of_the_group(workers: Pool) -> None:
    assert_replicas(workers(2).run(on_a_mesh))


def on_subgroups() -> str:
    """Replicated over 4 ranks, sharded over 2 of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    return train_beside_one_process(params_of(), PUBLISHING["one-bucket"], momentum=0.9, shard_over=mesh["shard"])


def test_subgroups(workers: Pool) -> None:
    assert_replicas(workers(4).run(on_subgroups))


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


def other_parameters(difference: str) -> None:
    rank = dist.get_rank()
    params = params_of([(4, 3), (5 + rank,) if difference == "shape" else (5,)])
    if difference == "stride" and rank:
        params[0] = nn.Parameter(params[0].detach().t().contiguous().t())
    if difference == "history":  # one rank cuts the two together, the other one after another
        params[1].requires_grad_(rank == 0)
    optimizer = SM3(params, shard_over=dist.group.WORLD)
    give(params, 0)
    optimizer.step()


@pytest.mark.parametrize("difference", ["shape", "stride", "history"])
def test_ranks_with_other_parameters(workers: Pool, difference: str) -> None:
    workers(2).run_raises(PlanMismatchError, other_parameters, difference, match="rank 1 has")


def refused() -> None:
    params = params_of([(4, 3)])
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    with pytest.raises(ValueError, match=r"one dimension.*\(2, 1\).*'replica', 'shard'"):
        SM3(params, shard_over=mesh)
    with pytest.raises(TypeError, match="got int"):
        SM3(params, shard_over=2)  # type: ignore[arg-type]
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="not part of the process group"):
            SM3(params, shard_over=group)
    with pytest.raises(ValueError, match="at least 0"):
        SM3(params, shard_over=dist.group.WORLD, check_gradients=-1)
    one = init_device_mesh("cpu", (2,))
    distributed = nn.Parameter(distribute_tensor(torch.ones(4, 3), one, [Replicate()]))
    assert isinstance(distributed, DTensor)
    with pytest.raises(ValueError, match="sharded already"):
        SM3([distributed], shard_over=dist.group.WORLD)
    with pytest.raises(TypeError, match="view_as_real"):
        SM3([nn.Parameter(torch.ones(2, dtype=torch.complex64))], shard_over=dist.group.WORLD)


def test_refuses_what_it_cannot_do(workers: Pool) -> None:
    workers(2).run(refused)


def sparse() -> None:
    """With more buckets than are sent without waiting: a rank that has nothing to do with the table must raise too."""
    table = nn.Embedding(6, 4, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    params = params_of([(20, 9), (12, 12)])
    give(params, 0)
    with patch.object(publish, "BUCKET_BYTES", 100):
        SM3([*params, *table.parameters()], shard_over=dist.group.WORLD).step()


def test_sparse_gradients_are_refused_on_every_rank(workers: Pool) -> None:
    workers(2).run_raises(NotImplementedError, sparse, match="sparse=False")


def sent() -> int:
    """Bytes that this rank sends in a step and for it."""
    params = params_of([(1000, 300), (300,), (300, 700)])
    optimizer = SM3(params, momentum=0.9, shard_over=dist.group.WORLD, check_gradients=0)
    for _ in range(2):
        dist.barrier()
        before = bytes_sent()
        give(params, 0)
        optimizer.step()
        assert optimizer.state  # the maxima have arrived
    return bytes_sent() - before


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_step_sends_one_all_gather_of_the_weights(workers: Pool, world_size: int) -> None:
    weights = 4 * (1000 * 300 + 300 + 300 * 700)
    total = sum(workers(world_size).run(sent))
    assert (world_size - 1) * weights <= total <= 1.03 * (world_size - 1) * weights


def stored() -> tuple[int, int]:
    """Elements of momentum and of accumulators on this rank."""
    params = params_of([(300, 40), (40,), (40, 160), (160,), (160, 40)])
    optimizer = SM3(params, momentum=0.9, shard_over=dist.group.WORLD)
    give(params, 0)
    optimizer.step()
    states = optimizer.state.values()
    momentum = sum(state["momentum_buffer"].numel() for state in states)
    return momentum, sum(state[key].numel() for state in states for key in state if key.startswith("accumulator"))


def test_a_rank_stores_the_state_of_its_range_alone(workers: Pool) -> None:
    momentum, accumulators = zip(*workers(4).run(stored), strict=True)
    total = 300 * 40 + 40 + 2 * 40 * 160 + 160
    assert sum(momentum) == total
    assert max(momentum) <= 1.01 * total / 4
    whole = 300 + 40 + 40 + 2 * (40 + 160) + 160
    assert sum(accumulators) <= whole + 3 * (160 + 1)  # each of 3 cuts doubles the columns and perhaps a row
