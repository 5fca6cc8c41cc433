"""Short runs of the training job, as several test files make them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import JOBS
from rich.console import Console

import launch
from launch.job.command_line import parse
from launch.job.world import World
from launch.train import Run

TRAIN = Path(launch.__file__).parent / "train.py"
# A run of about a second on one process; clipping is in force at every step.
FAST = "--model tiny --steps 12 --batch-size 8 --seq-len 32 --lr 0.01 --clip 0.5 --held-out-bytes 3000 --device cpu"


def figures(arguments: str, data: Path) -> dict[str, Any]:
    """Train in the process group that there is; return the final figures."""
    run = Run(parse([*arguments.split(), "--data", str(data)]), World.current(), Console(quiet=True))
    run.learn()
    return run.conclude(run.judge())


def torchrun(*arguments: str | Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(TRAIN)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    JOBS[2] += 1
    return subprocess.run(
        [*command, *FAST.split(), *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )
