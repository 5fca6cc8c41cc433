"""Run one function on every rank of a gloo process group, from inside a test.

    def sum_of_ranks():                       # module level: it is sent to the workers by name
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total)
        return total.item()

    def test_sum_of_ranks(workers):           # the fixture is in conftest.py
        assert workers(4).run(sum_of_ranks) == [6, 6, 6, 6]

Importing torch takes seconds, starting a gloo group milliseconds. So the processes persist over all tests, as many as
the largest world size asked for, and each run gets a default group of its own on the first ``world_size`` of them. They
are forked from a single-threaded server that has imported what tests import, and done nothing else: that is imported
once, and a pool that had to be killed is back at once.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")

# What many tests import, or test files that they import, and torch._dynamo, which the first DTensor operation imports.
# What is not installed is left out.
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "pytest",
    "hypothesis",
    "fairscale.nn",
    "launch.train",
    "moving",
    "against_reference",
    "flat_layouts",
]
TESTS = Path(__file__).parent
# Of the server, which must stay single-threaded to be forked and finds what it imports, and of the workers.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")])),
}
START_TIMEOUT = 120.0
JOBS: Counter[int] = Counter()  # how many runs this process has started, by world size
GRACE = 5.0  # how long the other ranks may go on after one has failed
CROWD = 40  # threads of a worker that is replaced
LEAVING = 3.0  # how long workers may take to leave a group before they are replaced
SLACK = datetime.timedelta(minutes=10)  # gloo must not give up before the harness does


class WorkersError(Exception):
    """A run failed; the message says what became of each rank. Its cause is the exception of the first to fail."""


@dataclass
class Outcome:
    """What became of the function on one rank."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""


@dataclass
class Worker:
    """One process, seen from the test's side."""

    process: Any
    connection: Connection
    log: Path
    printed: int = 0
    leaves: bool = False  # and has not said yet that it has

    def new_output(self) -> str:
        """What the process has written to stdout and stderr and nobody has printed yet."""
        return self.log.read_bytes()[self.printed :].decode(errors="replace")

    def left(self, deadline: float) -> bool:
        """Wait until it has left the group of its last run; whether it has."""
        if self.leaves:
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                return False
            with contextlib.suppress(EOFError, ConnectionError):  # a run will find that it is gone
                self.connection.recv_bytes()
            self.leaves = False
        return True

    def threads(self) -> int:
        """How many the process has, where the system tells."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return len(list(tasks.iterdir())) if tasks.exists() else 0


class Pool:
    """The worker processes of one pytest process. Call it with a world size to run functions on that many ranks."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self._runs = itertools.count()
        self._directory = tempfile.TemporaryDirectory(prefix="workers-")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def __call__(self, world_size: int, timeout: float = 60.0) -> World:
        return World(self, world_size, timeout)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._directory.cleanup()

    def kill(self) -> None:
        """End every worker. The next run starts new ones."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
        self.workers.clear()

    def execute(self, world_size: int, job: Callable[[], Any], timeout: float, grace: float) -> dict[int, Outcome]:
        """Call `job` on ranks 0 to `world_size - 1`; outcomes in the order in which they came in."""
        payload = pickle.dumps(job)
        store = f"{self._directory.name}/store-{next(self._runs)}"
        message = pickle.dumps((payload, store, world_size, datetime.timedelta(seconds=timeout) + SLACK, sys.path))
        try:
            self._start(world_size)
            JOBS[world_size] += 1
            for worker in self.workers[:world_size]:
                worker.connection.send_bytes(message)
            outcomes = self._collect(world_size, timeout, grace)
            for worker in self.workers[:world_size]:
                worker.connection.send_bytes(b"leave")
                worker.leaves = True
            return outcomes
        except BaseException:  # of the test's side, such as a KeyboardInterrupt: nobody knows where the ranks are
            self.kill()
            raise

    def _start(self, count: int) -> None:
        """Grow the pool to `count` workers and wait until all of them are ready.

        FSDP1 and fairscale leave models that hold themselves through autograd, and so their groups, of which each has
        a thread that wakes up a hundred times a second. Workers with too many of them are replaced; and those that
        cannot leave, for a group with a collective in it that others never came to waits for them when it is freed.
        """
        deadline = time.monotonic() + LEAVING
        if not all(worker.left(deadline) for worker in self.workers):
            self.kill()
        if any(worker.threads() > CROWD for worker in self.workers):
            self.kill()
        new = range(len(self.workers), count)
        for rank in new:
            ours, theirs = self._context.Pipe()
            log = Path(self._directory.name, f"rank-{rank}-{next(self._runs)}.log")
            process = self._context.Process(target=work, args=(rank, theirs, str(log)), daemon=True)
            with patch.dict(os.environ, ENVIRONMENT):
                process.start()
            theirs.close()
            self.workers.append(Worker(process, ours, log))
        for worker in self.workers[new.start :]:
            if not worker.connection.poll(START_TIMEOUT):
                raise WorkersError(f"a worker did not start within {START_TIMEOUT:g} s")
            worker.connection.recv_bytes()

    def _collect(self, world_size: int, timeout: float, grace: float) -> dict[int, Outcome]:
        """One outcome per rank. Ranks that are still busy at the end have their stacks printed and the pool killed."""
        deadline, limit = time.monotonic() + timeout, f"{timeout:g} s"
        outcomes: dict[int, Outcome] = {}
        busy = list(range(world_size))
        connections = [worker.connection for worker in self.workers]
        while busy and (ready := wait([connections[rank] for rank in busy], max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank in busy if connections[rank] in ready]:
                busy.remove(rank)
                outcomes[rank] = self._receive(rank)
                if outcomes[rank].error and time.monotonic() + grace < deadline:
                    deadline, limit = time.monotonic() + grace, f"{grace:g} s of the failure of rank {rank}"
        if busy:
            self._dump_stacks(busy)
        for rank in range(world_size):
            self._print_output(rank)
        if busy or any(isinstance(outcome.error, ProcessLookupError) for outcome in outcomes.values()):
            self.kill()
        for rank in busy:
            outcomes[rank] = Outcome(error=TimeoutError(f"did not return within {limit}; its stack is printed"))
        return outcomes

    def _receive(self, rank: int) -> Outcome:
        try:
            outcome = pickle.loads(self.workers[rank].connection.recv_bytes())
        except (EOFError, ConnectionError):
            process = self.workers[rank].process
            process.join(GRACE)
            return Outcome(error=ProcessLookupError(f"died with exit code {process.exitcode}"))
        assert isinstance(outcome, Outcome)
        return outcome

    def _dump_stacks(self, ranks: list[int]) -> None:
        """Have the ranks write the stacks of their threads to their logs."""
        for rank in ranks:
            os.kill(self.workers[rank].process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + GRACE
        before: list[str] = []
        now = [self.workers[rank].new_output() for rank in ranks]
        while time.monotonic() < deadline and not (now == before and all("(most recent call" in text for text in now)):
            time.sleep(0.1)
            before, now = now, [self.workers[rank].new_output() for rank in ranks]

    def _print_output(self, rank: int) -> None:
        worker = self.workers[rank]
        for line in worker.new_output().splitlines():
            print(f"[rank {rank}] {line}")
        worker.printed = worker.log.stat().st_size


@dataclass
class World:
    """The first `world_size` workers of a pool, with `timeout` seconds for each run."""

    pool: Pool
    world_size: int
    timeout: float

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call a module-level function on every rank; its results by rank.

        Raises:
            WorkersError: if it raised, hung or died on any rank.
        """
        outcomes = self.pool.execute(self.world_size, Call(function, args, kwargs), self.timeout, GRACE)
        errors = [outcome.error for outcome in outcomes.values() if outcome.error]
        if errors:
            raise WorkersError(report(outcomes)) from errors[0]
        return [outcomes[rank].value for rank in range(self.world_size)]

    def run_raises(
        self, expected: type[BaseException], function: Callable[..., Any], *args: Any, match: str = ""
    ) -> list[BaseException]:
        """Call a module-level function that must raise `expected`, its text matching `match`, on every rank.

        Returns:
            The exceptions by rank.

        Raises:
            WorkersError: if any rank returned, raised something else, hung or died.
        """
        outcomes = self.pool.execute(self.world_size, Call(function, args, {}), self.timeout, self.timeout)
        errors = [outcomes[rank].error for rank in range(self.world_size)]
        if not all(isinstance(error, expected) and re.search(match, str(error)) for error in errors):
            pattern = f" matching {match!r}" if match else ""
            raise WorkersError(f"{expected.__name__}{pattern} was to be raised on every rank\n{report(outcomes)}")
        return [error for error in errors if error]


@dataclass
class Call:
    """A function and its arguments, to be sent to the workers."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def report(outcomes: dict[int, Outcome]) -> str:
    """What became of each rank, in the order of the outcomes."""
    lines = []
    for rank, outcome in outcomes.items():
        text = outcome.trace or (repr(outcome.error) if outcome.error else f"returned {outcome.value!r}")
        lines.append(f"--- rank {rank}: {text}")
    return "\n".join(lines)


def work(rank: int, connection: Connection, log: str) -> None:
    """The life of a worker process: serve runs until the test's side is gone."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR1, file=descriptor)
    torch.set_num_threads(1)
    gc.freeze()  # what torch's import made is never garbage: collecting between tests takes 2 ms, not 200
    connection.send_bytes(b"ready")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send_bytes(serve(rank, connection.recv_bytes()))
            connection.recv_bytes()  # a rank that left its group earlier would cut off the others
            leave()
            connection.send_bytes(b"left")


def die_with_parent() -> None:
    """End this process, whatever it is doing, when the test's side is gone."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def serve(rank: int, message: bytes) -> bytes:
    """One run: join a fresh default group and call the function. The outcome, pickled."""
    payload, store, world_size, timeout, sys.path[:] = pickle.loads(message)

    def run() -> Any:
        dist.init_process_group("gloo", f"file://{store}", timeout, world_size, rank)
        torch.manual_seed(0)
        return pickle.loads(payload)()

    outcome = attempt(run)
    try:
        return survive_pickling(outcome)
    except Exception as error:
        sent = f"result {outcome.value!r}" if outcome.error is None else f"exception {outcome.error!r}"
        return pickle.dumps(Outcome(error=TypeError(f"the {sent} cannot be sent: {error!r}"), trace=outcome.trace))


def survive_pickling(outcome: Outcome) -> bytes:
    """Pickle, and make sure that the other side can read it: not every exception can be made from its `args`."""
    data = pickle.dumps(outcome)
    pickle.loads(data)
    return data


def attempt(function: Callable[[], Any]) -> Outcome:
    """Call a function and catch whatever it raises, a `pytest.skip` and a `SystemExit` included."""
    try:
        return Outcome(value=function())
    except BaseException as error:
        return Outcome(error=error, trace=traceback.format_exc())


def leave() -> None:
    """Leave the group and drop what the run left behind.

    Workers end by SIGKILL or `os._exit`, as forked processes do, and never finalize their interpreter, in which a
    thread of gloo that still holds a tensor would abort the process.
    """

    if dist.is_initialized():
        dist.destroy_process_group()
    forget_meshes()
    gc.collect()


def forget_meshes() -> None:
    """Have DTensor forget what it knows of meshes: they are equal to later ones, but hold groups that are gone.

    And keep them: each group of gloo has a thread that wakes up a hundred times a second for as long as it is held.
    """
    from torch.distributed.tensor import DTensor, _collective_utils, _redistribute, debug

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    else:  # PyTorch 2.9
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    if hasattr(_redistribute, "clear_redistribute_planner_cache"):  # PyTorch 2.10
        _redistribute.clear_redistribute_planner_cache()
    for value in (*vars(_redistribute).values(), _collective_utils.MeshTopoInfo.build_from_mesh):
        if hasattr(value, "cache_clear"):
            value.cache_clear()
