"""At the end of a session: which distributed worlds it ran, and that no process of it is left, which is an error.

Every process that a session starts, however indirectly, inherits its mark in the environment, and so is found by it:
the workers of the pool, ranks under torchrun, what those start. Who is found is named and killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MARK = "SM3_DIST_TEST_SESSION"
PATIENCE = 30.0  # seconds in which whoever is about to end may do so
total: pytest.StashKey[Counter[int]] = pytest.StashKey()
left: pytest.StashKey[list[Process] | None] = pytest.StashKey()
"""None where there is no /proc to look at."""


class Process(NamedTuple):
    """One that runs, as /proc has it."""

    pid: int
    parent: int
    command: str

    @property
    def ends_with_us(self) -> bool:
        """Whether it is a server of Python's own that ends when this process does."""
        servers = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
        return self.parent == os.getpid() and any(server in self.command for server in servers)


def running(mark: str) -> list[Process]:
    """The processes that have this mark in their environment, other than this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) == os.getpid() or mark.encode() not in (folder / "environ").read_bytes():
                continue
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended meanwhile, or is of another user
            continue
        if state not in "ZX":
            found.append(Process(int(folder.name), int(parent), command))
    return found


def wait_for_the_last(mark: str) -> list[Process]:
    """Those that are still there when the patience is at its end."""
    deadline = time.monotonic() + PATIENCE
    while (found := [each for each in running(mark) if not each.ends_with_us]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def is_worker(config: pytest.Config) -> bool:
    """Whether this is a process of pytest-xdist that runs some of the tests."""
    return hasattr(config, "workerinput")


def jobs_of_this_process() -> dict[int, int]:
    """How many worlds of each size; where no test needed the harness, nobody has imported it."""
    return dict(getattr(sys.modules.get("harness"), "JOBS", {}))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[total] = Counter()
    if not is_worker(config):
        os.environ[MARK] = ":".join([*os.environ.get(MARK, "").split(":"), uuid.uuid4().hex])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[total].update(getattr(node, "workeroutput", {}).get("worlds", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if is_worker(session.config):
        session.config.workeroutput["worlds"] = jobs_of_this_process()  # type: ignore[attr-defined]
        return
    session.config.stash[total].update(jobs_of_this_process())
    session.config.stash[left] = None
    if sys.platform == "linux":
        session.config.stash[left] = found = wait_for_the_last(os.environ[MARK].rpartition(":")[2])
        for process in found:
            os.kill(process.pid, signal.SIGKILL)
        if found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    jobs = sorted(config.stash[total].items())
    worlds = ", ".join(f"{count} of {size} rank{'s' * (size > 1)}" for size, count in jobs) or "none"
    terminalreporter.write_line(f"distributed worlds: {worlds}")
    found = config.stash.get(left, None)
    if found is None:
        terminalreporter.write_line("processes left: not looked for (there is no /proc here)")
    elif not found:
        terminalreporter.write_line("processes left: none")
    else:
        terminalreporter.write_line(f"processes left: {len(found)}, which is an error; killed", red=True)
        for process in found:
            terminalreporter.write_line(f"  {process.pid}: {process.command[:200]}", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not is_worker(config):
        os.environ[MARK] = os.environ[MARK].rpartition(":")[0]
