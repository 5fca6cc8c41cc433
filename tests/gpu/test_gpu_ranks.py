"""Wrappers, GradScaler, checkpoints and CPU offloading on all GPUs of the machine, through NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_device import CHECKS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.xdist_group("ranks"),  # one process has them started, and tells of all checks
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each check, on as many ranks as there are GPUs."""
    file = tmp_path_factory.mktemp("ranks") / "done.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(torch.cuda.device_count()), str(Path(__file__).with_name("ranks.py"))]
    ran = subprocess.run([*command, str(file), "cuda"], capture_output=True, text=True, timeout=180)
    assert file.exists(), ran.stdout + ran.stderr
    found: dict[str, str] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_have_the_bits_of_one_process_on_the_cpu(done: dict[str, str], name: str) -> None:
    assert done[name] == "", done[name]
