"""What a session says at its end of worlds and processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from worlds import running

pytest_plugins = ["pytester"]

TESTS = """
import subprocess, sys, types
import pytest

harness = sys.modules.setdefault("harness", types.SimpleNamespace(JOBS={}))  # without torch, which takes seconds

@pytest.mark.parametrize("world_size", [1, 1, 2])
def test_worlds(world_size):
    harness.JOBS[world_size] = harness.JOBS.get(world_size, 0) + 1

def test_who_stays():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
"""


def test_worlds_are_counted_and_a_process_that_stays_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\npythonpath = {Path(__file__).parent}")
    pytester.makeconftest("import worlds; worlds.PATIENCE = 1.0\npytest_plugins = ['worlds']")
    pytester.makepyfile(test_some=TESTS)
    result = pytester.runpytest_subprocess("-n", "2", "-W", "ignore")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["distributed worlds: 2 of 1 rank, 1 of 2 ranks"])
    if sys.platform == "linux":
        result.stdout.fnmatch_lines(["processes left: 1, which is an error; killed", "  *time.sleep(600)*"])
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        pid = next(int(line.split(":")[0]) for line in result.outlines if "time.sleep(600)" in line)
        assert pid not in [process.pid for process in running("")]
