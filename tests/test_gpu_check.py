"""launch/gpu_check.sh with a stand-in for python: which commands it runs, and that they are understood."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import launch
from launch import bench, memory
from launch.benchmarks.contenders import PEERS, VARIANTS

SCRIPT = Path(launch.__file__).parent / "gpu_check.sh"
OTHERS = ["AdamW(foreach)", "Adafactor", "Muon", *(name for name, (_, _, on) in PEERS.items() if on in ("", "cuda"))]


def check(folder: Path, python: str) -> tuple[int, str, list[list[str]]]:
    """Run the script with this shell script as its python; status, output, and the arguments of each call."""
    (folder / "python").write_text(f'#!/bin/bash\nprintf "%q " "$@" >> "$0.calls"; echo >> "$0.calls"\n{python}\n')
    (folder / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(folder / "python")}
    command = ["bash", str(SCRIPT), str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    calls = [
        shlex.split(line) for line in (folder / "python.calls").read_text().splitlines() if not line.startswith("-c")
    ]
    return done.returncode, done.stdout + done.stderr, calls


def test_its_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, calls = check(tmp_path, "echo said")
    assert status == 0
    assert (tmp_path / "out" / "gpt2.txt").read_text() == "said\n"
    assert [call[:2] for call in calls[:2]] == [["setup.py", "-q"], ["-m", "pytest"]]
    assert "tests/gpu" in calls[1]
    benchmarks = [call[1:] for call in calls if call[0] == "launch/bench.py"]
    (measured,) = [call[1:] for call in calls if call[0] == "launch/memory.py"]
    assert len(calls) == 2 + len(benchmarks) + 1
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(bench.bench_step, "run", asked.append)
    for arguments in benchmarks:
        bench.main(arguments)
    assert {model for each in asked for model in each.models} == {"gpt2", "decoder", "small", "resnet50"}
    assert all(each.device == "cuda" for each in asked)
    assert all(
        any(name.startswith(tuple(asked[0].only)) for name in (kind, kind)) for kind in OTHERS if "pyt" not in kind
    )
    assert all(kind.format("triton").startswith(tuple(asked[0].only)) for kind in VARIANTS)
    made: list[Any] = []
    monkeypatch.setattr(memory, "all_gpus", lambda ranks, most: (1, 1e9))
    monkeypatch.setattr(memory.Measurements, "make_all", lambda self, console: made.append(self))
    monkeypatch.setattr(memory.Measurements, "draw", lambda self: None)
    monkeypatch.chdir(tmp_path)
    assert memory.main(measured) == 0
    assert made[0].device == "cuda"


def test_what_fails_is_told_at_the_end_and_nothing_is_left_out(tmp_path: Path) -> None:
    status, said, calls = check(tmp_path, '[[ "$*" == *gpt2* ]] && exit 3; [[ "$*" == *memory.py* ]] && exit 4; exit 0')
    assert status == 3
    assert "gpt2: 0 s, exit status 3" in said
    assert len(calls) == 6


def test_without_pytest_the_rest_is_run(tmp_path: Path) -> None:
    status, said, calls = check(tmp_path, '[[ "$*" == *"find_spec(\'pytest\')"* ]] && exit 1; exit 0')
    assert status == 1
    assert "tests: left out, for pytest is not installed" in said
    assert [call[0] for call in calls] == ["setup.py", *["launch/bench.py"] * 3, "launch/memory.py"]


def test_without_setuptools_the_rest_is_run(tmp_path: Path) -> None:
    status, said, calls = check(tmp_path, '[[ "$*" == *"import setuptools"* ]] && exit 1; exit 0')
    assert status == 0
    assert "library: left out, for setuptools is not installed" in said
    assert [call[0] for call in calls] == ["-m", *["launch/bench.py"] * 3, "launch/memory.py"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    status, said, calls = check(tmp_path, "exit 1")
    assert status == 1
    assert "needs torch, triton and a GPU that torch sees" in said
    assert calls == []
