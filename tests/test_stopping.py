"""Commands that are told to end: what they say, and that nothing goes on without them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import TRAIN

ROOT = TRAIN.parents[1]

COMMAND = """
import threading, time
from launch.job import stopping

def main(arguments):
    beside = threading.Thread(target=stopping.output, args=(["sleep", "60"], {}))
    beside.start()
    with stopping.child(["sleep", "60"]) as process:
        while len(stopping._children) < 2:
            time.sleep(0.01)
        print(*(child.pid for child in stopping._children), flush=True)
        process.wait()

raise SystemExit(stopping.run(main))
"""


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_command_that_started_them(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as command:
        assert command.stdout is not None
        children = [int(word) for word in command.stdout.readline().split()]
        assert len(children) == 2
        command.send_signal(number)
        assert command.communicate(timeout=30)[1] == f"stopped by {number.name}\n"
    assert command.returncode == 128 + number
    assert not any(map(runs, children))


SPAWNING = """
import time
from multiprocessing import get_context
from launch.job import stopping

def main(arguments):
    process = get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    print(process.pid, flush=True)
    process.join()

if __name__ == "__main__":
    raise SystemExit(stopping.run(main))
"""


def test_processes_of_a_benchmark_end_with_it(tmp_path: Path) -> None:
    """Python waits for those that it spawned, and a benchmark said that it was stopped and went on."""
    (tmp_path / "spawning.py").write_text(SPAWNING)
    command = [sys.executable, str(tmp_path / "spawning.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None
        spawned = int(process.stdout.readline())
        process.terminate()
        assert process.communicate(timeout=30)[1] == "stopped by SIGTERM\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert not runs(spawned)


IGNORING = """
import signal
from launch.job import stopping

def main(arguments):
    signal.raise_signal(signal.SIGINT)
    return 3

signal.signal(signal.SIGINT, signal.SIG_IGN)
raise SystemExit(stopping.run(main))
"""


def test_what_runs_in_the_background_is_not_stopped_by_ctrl_c() -> None:
    """A shell has it ignore the signal."""
    command = subprocess.run([sys.executable, "-c", IGNORING], capture_output=True, text=True, cwd=ROOT)
    assert (command.returncode, command.stderr) == (3, "")


def test_training_that_is_stopped_says_so(text: object) -> None:
    """In a line, however deep it was in a step."""
    options = f"--model tiny --steps 1000000 --batch-size 2 --seq-len 16 --device cpu --data {text}"
    with subprocess.Popen(
        [sys.executable, str(TRAIN), *options.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None
        while "trains tiny" not in training.stdout.readline():
            time.sleep(0)
        time.sleep(0.5)
        training.send_signal(signal.SIGINT)
        assert training.communicate(timeout=30)[1] == "stopped by SIGINT\n"
    assert training.returncode == 128 + signal.SIGINT
