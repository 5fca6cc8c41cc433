"""The plan of bytes against bytes that were measured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flat_layouts import fsdp1, wrap_fairscale
from harness import Pool
from layouts import LAYOUTS, SHAPES, Tensors, distribute, in_turn
from sampling import crossed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sm3_dist
from sm3_dist import SM3, MuonLikeSM3
from sm3_dist.planner.planning import RankBytes, plan_muon_like
from sm3_dist.planner.sharding import Sharding
from sm3_dist.ranks.bucket import MaxBucket

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "update_rms": 0.2},
    {"momentum": 0.9, "momentum_dtype": torch.int8, "cover_block": 2},
]
SEVERAL = [*SHAPES, (64, 48), (300, 7)]


def count(tensors: Any) -> int:
    plain = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in plain if t.untyped_storage().nbytes())


def hsdp_tensor_parallel(module: Tensors) -> nn.Module:
    """Two replicas, each of two ranks that share it by tensor parallelism: nothing is left to cut."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replica", "shard", "tp"))
    distribute(module, mesh["tp"], lambda number, param: [in_turn(number, param)])
    return fully_shard(module, mesh=mesh["replica", "shard"])


WRAP: dict[str, Callable[[Tensors], nn.Module]] = {
    "fsdp2": fully_shard,
    "hsdp": LAYOUTS["hsdp"].wrap,
    "tp": LAYOUTS["tp"].wrap,
    "fsdp2+tp": LAYOUTS["fsdp2-tp"].wrap,
    "hsdp+tp": hsdp_tensor_parallel,
    "fsdp1": lambda module: fsdp1(module, auto_wrap_policy=by_block, use_orig_params=True),
    "fairscale": wrap_fairscale(nested=True),
}


def by_block(module: nn.Module, recurse: bool, **_: Any) -> bool:
    return recurse or isinstance(module, nn.ParameterList)


def model(dtype: torch.dtype, wrapper: str) -> Tensors:
    module = Tensors(SEVERAL, dtype)
    if wrapper != "fairscale" and "tp" not in wrapper:  # the one wants all or none, the other makes new ones
        next(module.parameters()).requires_grad_(False)
    return module


def given(wrapper: str, module: Tensors) -> dict[str, Any]:
    """What the plan must be told of the wrapper."""
    name, _, tensor_parallel = wrapper.removesuffix("-covers").partition("+")
    told: dict[str, Any] = {"world": dist.get_world_size(), "wrapper": name}
    if wrapper.endswith("-covers"):
        told["shard_covers"] = True
    if tensor_parallel:
        told["tp_size"] = dist.get_world_size() // 2
    if tensor_parallel or name == "tp":
        named = enumerate(module.named_parameters())
        told["tensor_parallel"] = {name: [0, p.dim() - 1][k % 3] for k, (name, p) in named if k % 3 < 2}
    if told["wrapper"] in ("fsdp1", "fairscale"):
        told["units"] = list(module.blocks)
    return told


def measured(module: nn.Module, told: dict[str, Any], options: dict[str, Any]) -> RankBytes:
    name = told["wrapper"] + "+tp" * ("tp_size" in told)
    module = WRAP.get(name, lambda module: module)(module)
    keywords: dict[str, Any] = {"shard_over": dist.group.WORLD} if told["wrapper"] == "zero1" else {}
    keywords["shard_covers"] = told.get("shard_covers", False)
    optimizer = SM3(module.parameters(), model=module, **options, **keywords)
    trained = [param for param in module.parameters() if param.requires_grad]
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    buckets = [bucket for bucket in optimizer._current_plan().buckets if isinstance(bucket, MaxBucket)]
    state = [value for each in optimizer._keeper.states.values() for value in each.values()]  # covers left sharded
    state += [bucket._owned for bucket in buckets if bucket._owned is not None]
    state += [cover.working for entry in optimizer._current_plan().entries for cover in entry.cut_covers]
    sent, kept = sum(bucket.numel * bucket.dtype.itemsize for bucket in buckets), count(state)
    sent += count(exchange._lent for exchange in optimizer._current_plan().exchanges)
    optimizer.state  # noqa: B018  # the collectives of this step end before the next begin
    adam: list[Any] = []
    if "tp_size" not in told:  # on a mesh of three dimensions it takes minutes
        moments = torch.optim.AdamW(trained, foreach=False)
        moments.step()
        adam = [value for each in moments.state.values() for key, value in each.items() if "exp_avg" in key]
    return RankBytes(count(module.parameters()), count(param.grad for param in trained), kept, sent, count(adam))


def compare(wrapper: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    module = model(dtype, wrapper)
    told = given(wrapper, module)
    expected = sm3_dist.plan(module, **told, **options)[dist.get_rank()]
    found = measured(module, told, options)
    names = ["weights", "gradients", "state", "sent"] + ["adam_moments"] * (
        told["wrapper"] != "zero1" and "tp_size" not in told
    )
    for name in names:
        assert getattr(found, name) == getattr(expected, name), name


PLACES = [
    *(("none", 1), ("ddp", 2), ("zero1", 2), ("zero1", 3), ("zero1-covers", 3)),
    *(("fsdp2", 1), ("fsdp2", 3), ("fsdp2-covers", 3), ("hsdp", 4), ("tp", 3), ("tp-covers", 3)),
    *(("fsdp2+tp", 2), ("fsdp2+tp", 4), ("fsdp2+tp-covers", 4), ("hsdp+tp", 4)),
    *(("fsdp1", 3), ("fsdp1-covers", 3), ("fairscale", 2)),
]
TABLE = [
    row
    for row in crossed(PLACES, (torch.float32, torch.bfloat16, torch.float64), range(len(OPTIONS)))
    if row[0] != "fairscale" or row[2] == torch.float32  # its only one
]


@pytest.mark.sampled("wrapper, world_size, dtype, options", TABLE, ids=str)
def test_planned_bytes_are_measured_bytes(
    workers: Pool, wrapper: str, world_size: int, dtype: torch.dtype, options: int
) -> None:
    workers(world_size).run(compare, wrapper, dtype, OPTIONS[options])


def test_a_model_need_not_exist() -> None:
    """On the meta device it takes no memory."""
    for options in OPTIONS:
        with torch.device("meta"):
            absent = torch.nn.Linear(300, 70)
        there: list[Tensor] = list(torch.nn.Linear(300, 70).parameters())
        module = torch.nn.ParameterList(there)
        assert sm3_dist.plan(absent, world=4, wrapper="fsdp2", **options) == sm3_dist.plan(
            module, world=4, wrapper="fsdp2", **options
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wrapper": "abacus"}, "wrapper must be one of"),
        ({"world": 2}, "wrapper='none'"),
        ({"world": 0, "wrapper": "ddp"}, "world must be at least 1 and at most 1,000,000, but is 0"),
        ({"world": 10**8, "wrapper": "fsdp2"}, "at most 1,000,000, but is 100,000,000"),
        ({"world": 4, "wrapper": "hsdp", "replicas": 3}, "4 ranks cannot hold 3 replicas"),
        ({"world": 2, "wrapper": "tp"}, "needs tensor_parallel="),
        ({"world": 2, "wrapper": "tp", "tensor_parallel": {"bias": 1}}, "cuts 'bias' in dimension 1"),
        ({"world": 2, "wrapper": "tp", "tensor_parallel": {"beads": 0}}, "no parameter of that name"),
        ({"world": 2, "wrapper": "ddp", "step_in_backward": True}, "no steps can be taken during backward"),
        ({"world": 2, "wrapper": "fsdp2", "step_in_backward": True, "shard_covers": True}, "with shard_covers"),
        (
            {"world": 2, "wrapper": "fsdp2", "tp_size": 2, "tensor_parallel": {}, "orthogonalize": ["weight"]},
            "orthogonalize= is not planned together with tp_size=",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sm3_dist.plan(torch.nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize("wrapper", ["fsdp1", "fairscale"])
def test_what_is_flattened_together_is_of_one_type(wrapper: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"of one type, but these have torch\.bfloat16, torch\.float32"):
        sm3_dist.plan(module, world=2, wrapper=wrapper)
    sm3_dist.plan(module, world=2, wrapper=wrapper, units=list(module))


def test_gradients_in_backward_are_those_of_one_unit() -> None:
    """Which are whole parameters without FSDP2."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    in_backward = {"step_in_backward": True}
    assert sm3_dist.plan(module, **in_backward)[0].gradients == 4 * 32
    sharded = {"wrapper": "fsdp2", "world": 2, **in_backward}
    assert sm3_dist.plan(module, **sharded)[0].gradients == 4 * (20 + 40 + 18) // 2
    assert sm3_dist.plan(module, **sharded, units=[module[1]])[0].gradients == 4 * 40 // 2


def muon_like(wrapper: str) -> None:
    module = model(torch.float32, wrapper)
    told = given(wrapper, module)
    expected = plan_muon_like(Sharding.of(module, **told))[dist.get_rank()]
    wrapped = WRAP.get(wrapper, lambda module: module)(module)
    keywords: dict[str, Any] = {"shard_over": dist.group.WORLD} if wrapper == "zero1" else {}
    optimizer = MuonLikeSM3(wrapped.parameters(), model=wrapped, **keywords)
    for param in optimizer._keeper.states or wrapped.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    optimizer.step()
    current = optimizer._current_plan()
    state = [value for each in optimizer._keeper.states.values() for value in each.values()]
    state += [cover.working for entry in current.entries for cover in entry.cut_covers]
    assert count(state) == expected.state
    sent = sum(b.numel * b.dtype.itemsize for b in current.buckets if isinstance(b, MaxBucket))
    sent += count(exchange._lent for exchange in current.exchanges)
    exchanges = [bucket.exchange for bucket in current.orthogonal.buckets]
    assert exchanges
    sent += sum(2 * part.numel() for each in exchanges if each.group is not None for part in each.parts)
    assert sent == expected.sent
    optimizer.state  # noqa: B018  # the collectives of this step end before the next begin


@pytest.mark.parametrize(
    ("wrapper", "world_size"),
    [("none", 1), ("ddp", 2), ("zero1", 3), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4), ("fsdp1", 3)],
)
def test_orthogonal_updates_take_the_bytes_that_are_planned(workers: Pool, wrapper: str, world_size: int) -> None:
    workers(world_size).run(muon_like, wrapper)
