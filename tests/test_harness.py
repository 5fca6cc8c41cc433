"""The harness itself: what it returns, and how it ends what does not return."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from pickle import PicklingError

import harness
import pytest
import torch
import torch.distributed as dist
from harness import CROWD, Pool, WorkersError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def weighted_sum(weight, *, offset=0):
    total = torch.tensor(weight * dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item() + offset


def process_id():
    return os.getpid()


def on_mesh(shape, other_groups):
    for _ in range(other_groups):
        dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", shape)
    whole = torch.arange(35.0).reshape(5, 7)
    sharded = distribute_tensor(whole, mesh, [Shard(i) for i in range(len(shape))])
    return torch.equal((sharded * 2).full_tensor(), whole * 2)


def raise_on(ranks):
    dist.barrier()  # no rank is late, whatever else the machine has to do
    if dist.get_rank() in ranks:
        raise ValueError("bad input")
    dist.barrier()


def raise_then_return(ranks):
    if dist.get_rank() in ranks:
        raise ValueError("bad input")
    return "fine"


def hang_on(ranks):
    dist.barrier()
    if dist.get_rank() in ranks:
        time.sleep(3600)


def die_on(ranks):
    if dist.get_rank() in ranks:
        os._exit(7)
    dist.barrier()


def talk():
    print("out of", dist.get_rank())
    print("err of", dist.get_rank(), file=sys.stderr)


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__("args do not fit")


def raise_unsendable():
    raise Unsendable(1, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_by_rank(workers, world_size):
    total = 10 * sum(range(world_size))
    results = workers(world_size).run(weighted_sum, 10, offset=1)
    assert results == [(rank, world_size, total + 1) for rank in range(world_size)]


def test_processes_persist_while_the_world_size_changes():
    with Pool() as workers:
        four = workers(4).run(process_id)
        assert len({os.getpid(), *four}) == 5
        assert workers(2).run(process_id) == four[:2]
        assert workers(4).run(process_id) == four


def leave_threads(count):
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_worker_with_too_many_threads_is_replaced():
    with Pool() as workers:
        before = workers(1).run(process_id)
        workers(1).run(leave_threads, CROWD)
        assert workers(1).run(process_id) != before


HELD = []


def wait_for_nobody():
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(2), group=group, async_op=True)
    else:  # its end would end the wait of the other
        HELD.append(group)


def test_workers_that_cannot_leave_their_group_are_replaced():
    with Pool() as workers:
        before = workers(2).run(process_id)
        workers(2).run(wait_for_nobody)
        assert not set(before) & set(workers(2, timeout=20).run(process_id))


def test_meshes_of_later_runs_use_groups_of_their_own(workers):
    for world_size, shape, other_groups in [(4, (2, 2), 0), (4, (2, 2), 1), (3, (3,), 0), (4, (2, 2), 2), (2, (2,), 0)]:
        assert workers(world_size).run(on_mesh, shape, other_groups) == [True] * world_size


def test_exception_comes_with_rank_and_traceback(workers):
    pids = workers(2).run(process_id)
    with pytest.raises(WorkersError, match=r"(?s)rank 1: .*in raise_then_return.*bad input") as caught:
        workers(2).run(raise_then_return, [1])
    assert "rank 0: returned 'fine'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    assert workers(2).run(process_id) == pids


def test_exception_that_cannot_be_pickled_is_named(workers):
    with pytest.raises(WorkersError, match=r"(?s)rank 0: .*Unsendable: args do not fit"):
        workers(1).run(raise_unsendable)


def test_function_that_cannot_be_sent_harms_nothing(workers):
    pids = workers(2).run(process_id)
    with pytest.raises((AttributeError, TypeError, PicklingError), match=r"(?i)pickle|local object"):
        workers(2).run(lambda: None)
    assert workers(2).run(process_id) == pids


def test_rank_waiting_for_a_failed_one_is_ended(workers, capsys, monkeypatch):
    monkeypatch.setattr(harness, "GRACE", 3.0)
    with pytest.raises(WorkersError, match=r"(?s)rank 1: .*bad input.*rank 0: .*within 3 s of the failure of rank 1"):
        workers(2).run(raise_on, [1])
    assert "[rank 0]" in (printed := capsys.readouterr().out)
    assert "in barrier" in printed
    assert len(workers(2).run(process_id)) == 2


def test_hang_prints_every_stack_and_is_ended(workers, capsys):
    pids = workers(3).run(process_id)
    with pytest.raises(WorkersError, match=r"(?s)rank 1: returned None.*rank 0: .*did not return within 3 s"):
        workers(3, timeout=3).run(hang_on, [0, 2])
    printed = capsys.readouterr().out.splitlines()
    for rank in (0, 2):
        assert any(line.startswith(f"[rank {rank}]") and "in hang_on" in line for line in printed)
    assert not set(pids) & set(workers(3).run(process_id))


def test_death_of_a_rank_is_reported_and_survived(workers):
    with pytest.raises(WorkersError, match=r"rank 1: .*died with exit code 7"):
        workers(2).run(die_on, [1])
    assert workers(2).run(weighted_sum, 1) == [(0, 2, 1), (1, 2, 1)]


def test_run_raises_returns_the_exception_of_each_rank(workers):
    errors = workers(2).run_raises(ValueError, raise_on, [0, 1], match="^bad")
    assert [str(error) for error in errors] == ["bad input", "bad input"]


@pytest.mark.parametrize(
    ("expected", "function", "match", "said"),
    [
        (ValueError, raise_then_return, "bad", "rank 0: returned 'fine'"),
        (TypeError, raise_then_return, "bad", "TypeError matching 'bad' was to be raised"),
        (ValueError, raise_then_return, "good", "ValueError matching 'good' was to be raised"),
    ],
    ids=["returned", "other type", "other text"],
)
def test_run_raises_wants_every_rank(workers, expected, function, match, said):
    with pytest.raises(WorkersError, match=said):
        workers(2).run_raises(expected, function, [1], match=match)


def test_run_raises_does_not_take_a_hang_for_an_error(workers):
    with pytest.raises(WorkersError, match=r"(?s)rank 1: .*bad input.*rank 0: .*did not return within 3 s"):
        workers(2, timeout=3).run_raises(ValueError, raise_on, [1])


def test_output_of_the_ranks_is_shown(workers, capsys):
    workers(2).run(talk)
    printed = capsys.readouterr().out.splitlines()
    for rank in range(2):
        assert {f"[rank {rank}] out of {rank}", f"[rank {rank}] err of {rank}"} <= set(printed)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    while any(is_running(pid) for pid in pids):  # ended by the timeout of pytest if they stay
        time.sleep(0.05)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_closing_leaves_no_process():
    with Pool() as pool:
        pids = pool(2).run(process_id)
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)


@linux
def test_killed_session_leaves_no_process():
    script = """
        import harness, test_harness
        from harness import Pool

        harness.PRELOAD[:] = ["torch.distributed.tensor"]
        if __name__ == "__main__":
            pool = Pool()
            print("pids", *pool(2).run(test_harness.process_id), flush=True)
            pool(2, timeout=3600).run(test_harness.hang_on, [0])
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as session:
        try:
            line = next(line for line in session.stdout if line.startswith("pids"))  # up to 2.9 gloo has said something
            pids = [int(word) for word in line.split()[1:]]
        finally:
            session.kill()
    assert len(pids) == 2
    wait_until_gone(pids)
