"""What a session says at its end of worlds and processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from worlds import running

pytest_plugins = ["pytester"]

TESTS = """
import os, subprocess, sys
import pytest
from harness import Pool, WorkersError

@pytest.fixture(scope="session")
def workers():
    with Pool() as pool:
        yield pool

def answer():
    return 42

@pytest.mark.parametrize("world_size", [1, 1, 2])
def test_worlds(workers, world_size):
    workers(world_size).run(answer)

def test_who_stays():
    if "STAY" in os.environ:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
"""


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini(f"[pytest]\npythonpath = {Path(__file__).parent}")
    pytester.makeconftest("pytest_plugins = ['worlds']")
    pytester.makepyfile(test_some=TESTS)
    return pytester


@pytest.mark.parametrize("processes", ["0", "2"])
def test_worlds_are_counted(session: pytest.Pytester, processes: str) -> None:
    result = session.runpytest_subprocess("-n", processes)
    lines = ["distributed worlds: 2 of 1 rank, 1 of 2 ranks"]
    if sys.platform == "linux":
        lines.append("processes left: none")
    result.stdout.fnmatch_lines(lines)
    assert result.ret == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_stays_is_an_error(session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAY", "1")
    (session.path / "conftest.py").write_text("import worlds; worlds.PATIENCE = 0.1\npytest_plugins = ['worlds']")
    result = session.runpytest_subprocess("-k", "stays")
    result.stdout.fnmatch_lines(["processes left: 1, which is an error; killed", "  *time.sleep(600)*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    pid = next(int(line.split(":")[0]) for line in result.outlines if "time.sleep(600)" in line)
    assert pid not in [process.pid for process in running("")]
