"""accelerate, Lightning and Trainer on GPUs, unmodified: the bits of a plain loop, interrupted or not."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from framework_ranks import CASES, PATIENCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


def cases() -> list[object]:
    """Those of a framework in one process of xdist, and skipped where the framework is missing."""
    found: list[object] = []
    for framework in CASES:
        missing = pytest.mark.skipif(find_spec(framework) is None, reason=f"{framework} is not installed")
        marks = [pytest.mark.xdist_group(framework), missing]
        found += [pytest.param(framework, case, marks=marks, id=f"{framework}, {case}") for case in CASES[framework]]
    return found


@cache
def trained(framework: str, folder: Path) -> tuple[list[dict[str, str]], str]:
    """What became of all cases of the framework, by rank, and what the ranks said: one for each GPU, but two at most.

    For the plain loop cannot know in which order the gradients of more are added up.
    """
    ranks = min(torch.cuda.device_count(), 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(Path(__file__).with_name("framework_ranks.py")), framework, str(folder)]
    with (folder / "said").open("w") as said, contextlib.suppress(subprocess.TimeoutExpired):  # the files tell
        subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, timeout=PATIENCE + 20)
    files = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files], (folder / "said").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frameworks")


@pytest.mark.parametrize(("framework", "case"), cases())
def test_it_trains_as_a_plain_loop_and_goes_on_after_a_break(folder: Path, framework: str, case: str) -> None:
    (folder / framework).mkdir(exist_ok=True)
    by_rank, said = trained(framework, folder / framework)
    for done in by_rank:
        assert done.get(case, f"did not end: {said}") == "", said
