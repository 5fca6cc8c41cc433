"""What travels between ranks, and when: one all-reduce per process group and step, hidden behind the next gradients."""

import datetime
import hashlib
import math
import time
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import LAYOUTS, Tensors, give
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from sm3_dist import SM3, PlanMismatchError
from sm3_dist.compat import ALL_GATHER, REDUCE_SCATTER, reduce_scatter_single
from sm3_dist.layout.box import Box
from sm3_dist.ranks import agreement, watch
from sm3_dist.ranks.bucket import MaxBucket, Slot
from sm3_dist.ranks.fingerprint import FIELDS
from sm3_dist.ranks.threaded_wait import ThreadedWait
from sm3_dist.ranks.watch import RankWatch


def wrapped(name: str, **options: Any) -> tuple[torch.nn.Module, SM3]:
    model = LAYOUTS[name].wrap(Tensors())
    return model, SM3(model.parameters(), **options)


def give_ones(model: torch.nn.Module) -> None:
    for param in model.parameters():
        give(param, torch.ones(param.shape))


def collectives_of_steps(name: str, options: dict[str, Any]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """For each step after the first: how often which operation ran, and how often on which process group."""
    model, optimizer = wrapped(name, **options)
    give_ones(model)
    optimizer.step()
    counts = []
    for missing in (False, True):  # gradients or none: the collectives are the same
        if missing:
            optimizer.zero_grad()
        groups: Counter[str] = Counter()

        def counting(collective: Any, groups: Counter[str] = groups) -> Any:
            def call(*args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
                groups[f"{collective.__name__} {group.group_name}"] += 1
                return collective(*args, group=group, **kwargs)

            return call

        names = ("all_reduce", ALL_GATHER, REDUCE_SCATTER)
        with CommDebugMode() as comm, patch.multiple(dist, **{n: counting(getattr(dist, n)) for n in names}):
            optimizer.step()
            if not optimizer.shard_covers:
                optimizer.state  # noqa: B018  # reading waits for the collective, it issues none
        counts.append(({str(op): n for op, n in comm.get_comm_counts().items()}, dict(groups)))
    return counts


@pytest.mark.parametrize(
    ("name", "world_size", "groups"),
    [
        ("ddp", 2, 0),
        ("fsdp2", 1, 0),
        ("fsdp2", 4, 1),
        ("hsdp", 4, 1),
        ("hsdp-replicas-only", 4, 0),
        ("tp", 3, 1),
        # Tensors cut along one mesh dimension or the other, and along both: three groups.
        ("tp-2d", 4, 3),
        ("fsdp2-tp", 4, 3),
    ],
)
def test_one_all_reduce_per_group_and_step(workers: Pool, name: str, world_size: int, groups: int) -> None:
    for steps in workers(world_size).run(collectives_of_steps, name, {}):
        for operations, by_group in steps:
            assert sum(operations.values()) == groups
            assert all("allreduce" in operation for operation in operations)
            assert list(by_group.values()) == [1] * groups


def test_sharded_covers_gather_before_and_scatter_after(workers: Pool) -> None:
    for steps in workers(4).run(collectives_of_steps, "fsdp2", {"shard_covers": True}):
        for operations, by_group in steps:
            assert sorted(name.split()[0] for name in by_group) == [ALL_GATHER, REDUCE_SCATTER]
            assert sum(operations.values()) == sum(by_group.values()) == 2


def sharded_cover_bytes() -> tuple[int, int]:
    """Bytes of accumulators between two steps, without and with sharded covers."""
    held = []
    for shard_covers in (False, True):
        model, optimizer = wrapped("fsdp2", shard_covers=shard_covers)
        give_ones(model)
        optimizer.step()
        accumulators = {
            value.to_local().untyped_storage()
            for state in optimizer._keeper.states.values()
            for key, value in state.items()
            if key.startswith("accumulator")
        }
        owned = [bucket._owned for bucket in optimizer._current_plan().buckets if bucket._owned is not None]
        held.append(sum(s.nbytes() for s in accumulators) + sum(o.untyped_storage().nbytes() for o in owned))
    return held[0], held[1]


def test_sharded_covers_store_each_shared_entry_once(workers: Pool) -> None:
    shared = sum(sum(shape[1:]) for shape in LAYOUTS["fsdp2"].shapes if len(shape) > 1)
    for replicated, sharded in workers(4).run(sharded_cover_bytes):
        assert replicated - sharded == 4 * (shared - -(-(shared + FIELDS) // 4))


def step_while_the_other_sleeps() -> float:
    """Rank 0 comes back from its step before rank 1 begins its own: nothing in a step waits for the other ranks."""
    model, optimizer = wrapped("fsdp2")
    give_ones(model)
    optimizer.step()
    dist.barrier()
    store, started = dist.group.WORLD.get_group_store(), time.monotonic()
    if dist.get_rank() == 1:
        store.wait(["rank 0 is through"], datetime.timedelta(seconds=30))
    optimizer.step()
    assert optimizer._current_plan().buckets[0].pending
    if dist.get_rank() == 0:
        store.set("rank 0 is through", "yes")
    optimizer.state  # noqa: B018
    assert not optimizer._current_plan().buckets[0].pending
    return time.monotonic() - started


def test_a_step_does_not_wait_for_other_ranks(workers: Pool) -> None:
    workers(2).run(step_while_the_other_sleeps)


def leave_with_a_reduction_under_way() -> None:
    model, optimizer = wrapped("fsdp2")
    give_ones(model)
    optimizer.step()


def test_leaving_right_after_a_step(workers: Pool) -> None:
    for _ in range(3):
        workers(2).run(leave_with_a_reduction_under_way)


def state_dict_on_one_rank() -> None:
    model, optimizer = wrapped("fsdp2")
    give_ones(model)
    optimizer.step()
    if dist.get_rank() == 0:
        optimizer.state_dict()
    optimizer.step()


def test_one_rank_alone_may_read_the_state(workers: Pool) -> None:
    workers(2).run(state_dict_on_one_rank)


def reduce_specials() -> list[float]:
    """Each rank has a NaN of one sign, an infinity, a denormal number and a zero where the other has 1."""
    specials = torch.tensor([float("nan"), -float("nan"), float("inf"), 1e-45, 0.0])
    mine = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)
    accumulator = torch.ones(5)
    accumulator[mine] = specials[mine]
    whole = Box((0,), (5,))
    assert dist.group.WORLD is not None
    slot = Slot(accumulator, whole, (whole,), contributes=True)
    bucket = MaxBucket(dist.group.WORLD, [slot], torch.device("cpu"), shard_covers=False, watch=RankWatch())
    bucket.start()
    bucket.finish()
    return accumulator.tolist()


def test_maxima_of_nan_infinity_denormals_and_zero(workers: Pool) -> None:
    for maxima in workers(2).run(reduce_specials):
        assert [math.isnan(value) for value in maxima] == [True, True, False, False, False]
        assert maxima[2:] == [math.inf, 1.0, 1.0]


# Ranks that differ


def sharded(shape: tuple[int, ...], requires_grad: bool = True) -> torch.nn.Parameter:
    """A parameter of any shape, whatever the other ranks hold: no communication."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    size, rank = -(-shape[0] // mesh.size()), dist.get_rank()
    rows = max(0, min(size, shape[0] - rank * size))
    stride = torch.empty(shape, device="meta").stride()
    part = DTensor.from_local(
        torch.zeros(rows, *shape[1:]), mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )
    return torch.nn.Parameter(part, requires_grad=requires_grad)


def differing_ranks(what: str) -> None:
    odd = dist.get_rank() == dist.get_world_size() - 1
    shapes = [(4, 3), (6, 2)]
    if what == "number" and odd:
        shapes = shapes[:1]
    if what == "shape" and odd:
        shapes[1] = (6, 5)
    if what == "order" and odd:
        shapes.reverse()
    params = [sharded(shape) for shape in shapes]
    if what == "frozen" and odd:
        params[1].requires_grad_(False)
        params[1].grad = None
    options: dict[str, Any] = {what: 0.5} if odd and what in ("lr", "momentum", "beta", "eps", "weight_decay") else {}
    if what == "maximize":
        options["maximize"] = odd
    optimizer = SM3(params, **options)
    started = time.monotonic()
    try:
        optimizer.step()
    finally:
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("number", r"rank \d has 1 tensors, and as number 1: \(no more parameters\)"),
        ("shape", r"number 1: parameter 1 of param group 0: shape \(6, 2\)[\s\S]* shape \(6, 5\)"),
        ("order", r"number 0: [^\n]*shape \(4, 3\)[\s\S]*number 0: [^\n]*shape \(6, 2\)"),
        ("frozen", r"\(no more parameters\)|requires_grad=False"),
    ]
    + [(name, rf"{name}=0.5") for name in ("lr", "momentum", "beta", "eps", "weight_decay")]
    + [("maximize", "maximize=True")],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_differ_are_told_what_differs(workers: Pool, world_size: int, what: str, difference: str) -> None:
    workers(world_size).run_raises(PlanMismatchError, differing_ranks, what, match=difference)


def absent_rank() -> None:
    params = [sharded((4, 3))] if dist.get_rank() else [torch.nn.Parameter(torch.zeros(3))]
    dist.group.WORLD.get_group_store().set_timeout(datetime.timedelta(seconds=1))
    with patch.object(agreement, "SLACK", datetime.timedelta(seconds=1)):
        SM3(params).step()
    if dist.get_rank() == 0:
        raise PlanMismatchError("rank 0 has no part in it")


def test_a_rank_that_does_not_come_is_named(workers: Pool) -> None:
    errors = workers(3).run_raises(PlanMismatchError, absent_rank)
    assert all("rank 0 of [0, 1, 2] did not" in str(error) for error in errors[1:])


def several_plans() -> None:
    """Two optimizers, and one that plans anew: every plan is compared with its own counterpart."""
    one, two = SM3([sharded((4, 3))]), SM3([sharded((6, 2))])
    for _ in range(2):
        one.step()
        two.step()
    one.add_param_group({"params": [sharded((5, 5))]})
    one.step()
    two.step()


def test_several_optimizers_and_new_param_groups(workers: Pool) -> None:
    workers(2).run(several_plans)


def after_a_restart() -> None:
    """Steps in a store where workers that died have called, and are answered first."""
    store, rank, size = dist.group.WORLD.get_group_store(), dist.get_rank(), dist.get_world_size()
    place = "sm3_dist/plan/" + hashlib.sha256(repr(tuple(range(size))).encode()).hexdigest()[:16]
    store.set(f"{place}/call/{rank}", f"of the dead {rank}")
    dist.barrier()
    if rank > 0:
        store.wait([f"{place}/answer/of the dead {rank}"], datetime.timedelta(seconds=20))
    SM3([sharded((4, 3))]).step()


def test_what_dead_workers_left_in_the_store_does_no_harm(workers: Pool) -> None:
    workers(3).run(after_a_restart)


def reduce_scatter_that_one_rank_begins_late() -> list[float]:
    """Seconds until a wait for it gave up, and until it had ended."""
    rank, buffer = dist.get_rank(), torch.arange(4, dtype=torch.int32) + 10 * dist.get_rank()
    owned = buffer.new_empty(2)
    dist.barrier()
    if rank == 1:
        time.sleep(1.0)
    started = time.monotonic()
    options = {"op": dist.ReduceOp.MAX, "group": dist.group.WORLD, "async_op": True}
    work = ThreadedWait(reduce_scatter_single(owned, buffer, **options))
    if rank == 0:
        with pytest.raises(RuntimeError, match="Operation timed out"):
            work.wait(datetime.timedelta(seconds=0.1))
        assert not work.is_completed()
    gave_up = time.monotonic() - started
    assert work.wait()
    assert work.is_completed()
    assert owned.tolist() == [10 + 2 * rank, 11 + 2 * rank]
    return [gave_up, time.monotonic() - started]


def test_a_wait_for_a_reduce_scatter_ends_in_time(workers: Pool) -> None:
    (gave_up, ended), _ = workers(2).run(reduce_scatter_that_one_rank_begins_late)
    assert gave_up < ended


class EndsAsTheWaitGivesUp:
    """A collective that ends between a wait for it that took too long and the question whether it has ended."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self, *timeout: datetime.timedelta) -> bool:
        try:
            return self.work.wait(*timeout)
        except RuntimeError:
            while not self.is_completed():
                time.sleep(0.01)
            raise

    def is_completed(self) -> bool:
        return self.work.is_completed()


class Breaks:
    def wait(self) -> bool:
        time.sleep(0.3)
        raise RuntimeError("Connection reset by peer")


def collective_that_ends_as_the_wait_gives_up() -> None:
    everywhere = torch.tensor(dist.get_rank())
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.3)
    with patch.object(watch, "LOOK_EVERY", datetime.timedelta(seconds=0.1)):
        assert watch._done(EndsAsTheWaitGivesUp(dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, async_op=True)))
        assert everywhere.item() == 1
        with pytest.raises(RuntimeError, match="Connection reset by peer"):
            watch._done(EndsAsTheWaitGivesUp(ThreadedWait(Breaks())))


def test_a_collective_that_ends_as_a_wait_for_it_gives_up_has_not_failed(workers: Pool) -> None:
    workers(2).run(collective_that_ends_as_the_wait_gives_up)
