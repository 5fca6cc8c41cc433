"""One rank does something else than the others: every rank learns what, or the run ends with the right bits.

``--one-rank-seconds`` says for how long random cases are tried, and ``--one-rank-seed`` from which seed on.
"""

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from layouts import LAYOUTS, Tensors, give, sharded_like
from one_rank import SAID, try_case
from sampling import takes_all
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from sm3_dist import SM3, PlanMismatchError
from sm3_dist.checkpoint import get_optimizer_state_dict
from sm3_dist.ranks import fingerprint, spot_check
from sm3_dist.ranks.bucket import MaxBucket, SumBucket
from sm3_dist.ranks.difference import Facts, facts_from, facts_to, in_which_they_differ

KNOWN: dict[str, tuple[int, str | None, str | None]] = {
    # what was not told once: seed, fault, layout; None for those of the seed
    "a closure that raises, of replicas that send nothing, goes on": (20033, None, None),
    "a frozen parameter, while gradients are compared": (30041, None, None),
    "a param group more, while gradients are compared": (629577409, None, None),
    "a param group more in the first step, which cuts the others anew": (62, None, None),
    "a param group more, while ranks ask one another for gradients": (60005, None, None),
    "another type, flattened": (20006, None, None),
    "a closure that raises before there is a plan": (21, "closure", "fsdp2"),
    "state replaced, and told to its sharding group alone": (60056, None, None),
    "state replaced, while ranks ask one another for gradients": (60082, None, None),
    "state loaded while ranks ask one another for gradients": (60119, None, None),
    "a step left out, the first": (60028, None, None),
    "a closure that raises before there is a plan, and its rank goes on": (60049, None, None),
    "a frozen parameter, with sharded covers": (71074, None, None),
    "state loaded before the first step, of which gradients are looked at first": (101029, None, None),
    "another lr, of replicas that send nothing": (7, "lr", "hsdp-replicas-only"),
    "a closure that raises before there is a plan, and goes on": (15, "closure, and on", "zero1"),
    "state loaded, which the other finds out in the next step": (58, "own state loaded", "fsdp2"),
}


@pytest.fixture(scope="module")
def apart() -> Iterator[Pool]:
    """Workers that may be killed by what they do."""
    with Pool() as pool:
        yield pool


@pytest.mark.exhaustive(in_sample=True)
def test_random_cases(apart: Pool, pytestconfig: pytest.Config) -> None:
    """The same in each run, as far as time allows; with ``-m exhaustive`` others."""
    seconds, seed = pytestconfig.getoption("one_rank_seconds"), pytestconfig.getoption("one_rank_seed")
    if seed is None and takes_all(pytestconfig):
        seed = random.SystemRandom().randrange(1 << 30)
    print(f"cases from seed {seed or 0} on")
    deadline, tried = time.monotonic() + seconds, 0
    while tried < 3 or time.monotonic() < deadline:
        case, verdict, words = try_case(apart, (seed or 0) + tried)
        assert verdict in ("right", "told"), f"{verdict}: {case}\n{words}"
        tried += 1


@pytest.mark.parametrize("fault", ["none", *SAID])
def test_every_fault(apart: Pool, fault: str) -> None:
    """Sharded, with a replica of each part: told by a bucket and through the store."""
    case, verdict, words = try_case(apart, 7, fault, "hsdp")
    assert verdict in ("right", "told"), f"{verdict}: {case}\n{words}"


@pytest.mark.parametrize("known", KNOWN)
def test_what_was_not_told_once(apart: Pool, known: str) -> None:
    case, verdict, words = try_case(apart, *KNOWN[known])
    assert verdict == "told", f"{verdict}: {case}\n{words}"


ENDS = """
import datetime, os, sys, torch, torch._dynamo, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sm3_dist import SM3

store, how = sys.argv[1:]
rank = 0 if os.fork() else 1  # two processes that end as others do, and share the imports
dist.init_process_group("gloo", f"file://{store}", datetime.timedelta(seconds=100), 2, rank)
model = fully_shard(torch.nn.Linear(8, 8))
optimizer = SM3.adamw_like(model.parameters(), cover_block=3)
if rank == 0:
    optimizer.step()
elif how == "error":
    raise RuntimeError("no data")
"""


@pytest.mark.parametrize("how", ["well", "error"])
def test_a_process_that_ends_before_its_first_step_leaves_word(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path / "store"), how]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    assert "PlanMismatchError: rank 1 ended before its first step of SM3" in told


def thin_shards() -> None:
    """Tensor parallelism leaves a rank nothing, and FSDP2 shards that."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Linear(1, 5, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(5, 1), mesh["tp"], [Shard(1)]))
    fully_shard(model, mesh=mesh["dp"])
    alone = nn.Parameter(torch.ones(5, 1))
    optimizer, whole = SM3.adamw_like(model.parameters(), cover_block=2), SM3.adamw_like([alone], cover_block=2)
    for _ in range(3):
        give(model.weight, torch.ones(5, 1))
        alone.grad = torch.ones(5, 1)
        optimizer.step()
        whole.step()
    here, there = model.weight.to_local(), sharded_like(model.weight, alone.detach()).to_local()
    assert torch.equal(here.reshape(-1), there.reshape(-1))  # (torch itself cannot put them together)
    assert here.numel() == (0 if mesh.get_coordinate()[1] else 3 - mesh.get_coordinate()[0])


def test_a_rank_that_tensor_parallelism_leaves_nothing(workers: Pool) -> None:
    workers(4).run(thin_shards)


def frozen_after_a_step() -> None:
    """Replicas that send nothing: one has frozen a tensor and saves, while the other is in the step before yet."""
    model = fully_shard(Tensors([(3, 5), (8, 4)]), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s")))
    optimizer, (first, second) = SM3(model.parameters(), lr=0.1), model.parameters()
    store, watch = dist.group.WORLD.get_group_store(), optimizer._keeper.watch
    first_steps = spot_check.FIRST  # in which they wait for one another

    def come_late() -> float:
        if dist.get_rank() == 1 and watch.call > first_steps:
            store.wait([f"{token}/anew" for token in watch.tokens.values()])
        return 0.0

    with patch.object(spot_check, "SECONDS", 0.0):
        for _ in range(first_steps + 1):
            for param in (first, second):
                give(param, torch.ones(param.shape))
            optimizer.step(come_late)
        second.requires_grad_(False)
        get_optimizer_state_dict(model, optimizer)
        give(first, torch.ones(first.shape))
        second.grad = None
        optimizer.step()
    assert (optimizer.state[first]["step"], optimizer.state[second]["step"]) == (first_steps + 2, first_steps + 1)


def test_a_plan_made_anew_between_steps_belongs_to_the_next(workers: Pool) -> None:
    workers(2).run(frozen_after_a_step)


class AllRaiseError(Exception):
    """Raised in a closure on every rank."""


def all_raise_in_the_next_step() -> None:
    """Replicas that send nothing: one stops in a step, as the other will, which is in the step before yet."""
    model = fully_shard(Tensors([(3, 5), (8, 4)]), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s")))
    optimizer = SM3(model.parameters(), lr=0.1)
    store, watch = dist.group.WORLD.get_group_store(), optimizer._keeper.watch
    before = spot_check.FIRST + 1

    def come_late_or_raise() -> float:
        if watch.call == before + 1:
            raise AllRaiseError
        if dist.get_rank() == 1 and watch.call == before:
            store.wait([f"{token}/stopped" for token in watch.tokens.values()])
        return 0.0

    with patch.object(spot_check, "SECONDS", 0.0):
        for step in range(before + 2):
            for param in model.parameters():
                give(param, torch.ones(param.shape))
            if step == before:
                with pytest.raises(AllRaiseError):
                    optimizer.step(come_late_or_raise)
            else:
                optimizer.step(come_late_or_raise)
    assert {int(state["step"]) for state in optimizer.state.values()} == {before + 1}


def test_an_error_of_all_ranks_is_none_of_the_step_before(workers: Pool) -> None:
    workers(2).run(all_raise_in_the_next_step)


def learning_rates_as_on_a_gpu(kind: str) -> None:
    """The fields for what the host does not read; looked at two steps later, as on a GPU."""
    model = LAYOUTS["fsdp2"].wrap(Tensors([(3, 5), (8, 4)]))
    options = {} if kind == "maxima" else {"beta": 0.9, "update_rms": 1.0, "cover_block": 1}
    optimizer = SM3(model.parameters(), lr=0.1, **options)
    rate = torch.tensor(0.1)
    fingerprint.Circle.lr_on_device = lambda self: [rate]  # type: ignore[method-assign]
    bucket = {"maxima": MaxBucket, "sums": SumBucket}[kind]
    for step in range(6):
        for param in model.parameters():
            give(param, torch.ones(param.shape))
        if step == 0:
            optimizer.step()
            sealed = [each for each in optimizer._current_plan().buckets if each._seal is not None]
            assert [type(each) for each in sealed] == [bucket]
            sealed[0]._seal._findings._lag = 2
            continue
        if step == 2 and dist.get_rank() == 1:
            rate.fill_(0.1000001)
        if step < 5:
            optimizer.step()
            continue
        with pytest.raises(PlanMismatchError, match="a learning rate, which is a tensor on the GPU"):
            optimizer.step()


@pytest.mark.parametrize("kind", ["maxima", "sums"])
def test_learning_rates_that_are_tensors_on_a_gpu(apart: Pool, kind: str) -> None:
    apart(2).run(learning_rates_as_on_a_gpu, kind)
    apart.kill()


def test_facts_survive_the_store() -> None:
    facts = Facts(7, ((0.1, 1e-30, True, None),), b"\x00\x01", 2, "stopped", "why")
    assert facts_from(facts_to(facts)) == facts
    assert facts_from(facts_to(facts)).digest == facts.digest


def test_the_words_for_a_difference() -> None:
    same = Facts(7, ((0.1,), (0.2,)), b"\x01\x01")
    for other, words in (
        (Facts(8, same.settings, same.moved), r"ranks \[1\] came to the exchange in call number 8 .*\[0, 2\] .* 7"),
        (Facts(7, ((0.1,), (0.3,)), same.moved), r"lr of param group 1 is 0.3 on ranks \[1\], and 0.2 on"),
        (Facts(7, same.settings, b"\x01\x00"), r"b has no gradient on ranks \[1\], and a gradient on ranks \[0, 2\]"),
        (Facts(7, same.settings, same.moved, 1), r"\[1\] threw gradients away 1 times"),
        (Facts(7, event="planned anew", words="Because."), r"\[1\] planned anew in step number 7, .* Because\."),
    ):
        found = in_which_they_differ([0, 1, 2], {0: same, 1: other, 2: same}, ["lr"], ["a", "b"])
        assert re.search(words, found), found
    assert "ranks [2] have not said" in in_which_they_differ([0, 1, 2], {0: same, 1: same}, ["lr"], [])
