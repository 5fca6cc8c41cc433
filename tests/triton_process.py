"""Runs of a test file as a script, in a process that imports Triton anew: whether it interprets is decided then."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, interpret: str, *arguments: str) -> str:
    """What it prints, with Triton's caches in a folder of its own.

    Args:
        script: the file.
        interpret: "1" if kernels are interpreted, "0" if they are compiled.
        arguments: what to do.
    """
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
